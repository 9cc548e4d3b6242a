"""Made-up tokens that a model reads once, so that one that cannot be used is refused before its first text."""

from calibrated_rewards.reading.body import vocabulary
from calibrated_rewards.reading.own_forward import OwnForward

# More than any model needs as a fewest; some fail at lengths that their settings do not divide.
TOKENS = 17
# Words from all over the vocabulary: its first tokens are often ones that no text has.
STEP = 97
# Numbers as near as this, as a part of the largest, are the same but for rounding. Fresh weights are this insensitive:
# with BERT's, scores of the two inputs are a few millionths apart.
SAME = 1e-7


def check_reads(reader: OwnForward, limit: int) -> None:
    """Refuse a model that does not read token ids alone, or gives the same numbers whatever they are."""
    size = min(vocabulary(reader.model), 2**14)
    end = [] if reader.separate is None else [reader.separate]
    middle = range(1, min(TOKENS, limit) - 1 - len(end))
    # Their first and last tokens, where heads read, are the same: what is between has to be read from there.
    made_up = [[3 % size, *((first + STEP * i) % size for i in middle), 5 % size] for first in (3, 11)]
    numbers = reader([[token for token in row if token not in end] + end for row in made_up])
    if float((numbers[0] - numbers[1]).abs().max()) <= SAME * float(numbers.abs().max()):
        name = type(reader.model).__name__
        raise ValueError(
            f"a reward model gives different inputs different numbers, {name} gives {numbers[0].tolist()} to two: its "
            "head is empty, or it lacks a kernel without which it reads nothing (MRA outside CUDA)"
        )
