"""Which log-probability a rollout is given: of the distribution that it was drawn from, or none."""

from dataclasses import replace

from calibrated_rewards.samplers.protocol import Decoding


def of_the_draw(told: float | None, decoding: Decoding, processed: bool) -> float | None:
    """What an engine tells, if that is of the draw: it is `processed`, or the decoding bends nothing.

    >>> of_the_draw(-3.5, Decoding(9, stop=("END",)), processed=False)
    -3.5
    >>> of_the_draw(-3.5, Decoding(9, temperature=0.7), processed=False)
    """
    plain = replace(decoding, max_tokens=1, stop=(), stop_token_ids=()) == Decoding(max_tokens=1)
    return told if processed or plain else None
