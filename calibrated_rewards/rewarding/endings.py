"""Special tokens that a trainer leaves at the end of completions: taken off, or at least seen.

>>> without(("<|im_end|>", "<pad>"), "Hello!<|im_end|><pad><pad>")
'Hello!'
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from calibrated_rewards.prompts import Completion

logger = logging.getLogger("calibrated_rewards")
_SPECIAL = re.compile(r"(<\|[^<>|\s]{1,30}\|>|</s>|<(?:eos|pad|end_of_turn)>|\[(?:EOS|PAD|SEP)\])\s*$")


def without(endings: Sequence[str], completion: Completion) -> Completion:
    """A text without these at its end, however many there are; messages as they are."""
    while isinstance(completion, str) and (found := next(filter(completion.endswith, filter(None, endings)), None)):
        completion = completion.removesuffix(found)
    return completion


@dataclass
class EndingsWatch:
    """Says, once, that completions end with what looks like a special token: the calibration had none."""

    told: bool = False

    def look(self, name: str, completions: Sequence[Completion]) -> None:
        """At completions as the reward model is about to read them."""
        found = None if self.told else left_over(completions)
        if found is not None:
            self.told = True
            logger.warning(
                "%s: a completion ends with %r, which looks like a special token that the trainer left there, and "
                "the reward model will read it. If so, say endings=(%r,)",
                name,
                found,
                found,
            )


def left_over(completions: Sequence[Completion]) -> str | None:
    """What looks like a special token at the end of a text.

    >>> left_over(["Hello!", "Hi</s>"])
    '</s>'
    """
    texts = (text for text in completions if isinstance(text, str) and text.endswith((">", "]")))
    return next((found[1] for text in texts if (found := _SPECIAL.search(text))), None)
