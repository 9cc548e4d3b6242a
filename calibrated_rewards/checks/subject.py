"""A scorer under examination: the pairs it is asked about, what it gave for them, and how near two scores are equal."""

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.checks.probes import Pairs
from calibrated_rewards.prompts import start_of
from calibrated_rewards.scorers.protocol import Scorer, fingerprint, score

# Equal scores are this near, in standard deviations; arithmetic of 16 bits rounds otherwise for each batch shape.
TOLERANCE, TOLERANCE_16_BIT = 1e-4, 0.1
# How scorers, transformers and servers say that they do not read the whole of an input.
TOO_LONG = re.compile(r"truncat|too long|max_length|maximum (sequence|context|model)|longer than", re.IGNORECASE)
# What is wrong where a neighbour in the batch changes a score.
PADS = "padding is read: pad on the right, pass attention_mask (and position_ids), and pool the last token of each row"
FEW_BITS = ("float16", "bfloat16", "float8", "int8", "int4", "uint8")


class Outcome(NamedTuple):
    """What came of a check: it held, it failed, or it does not apply; and what was seen."""

    status: Literal["ok", "FAIL", "-"]
    detail: str = ""


@runtime_checkable
class Wrapping(Protocol):
    """A scorer around another one: one that loads it, turns its sign, ..."""

    scorer: Any


@runtime_checkable
class Tokenizing(Protocol):
    """A scorer that shows its tokenizer."""

    tokenizer: Any


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer as those of transformers."""

    chat_template: Any
    all_special_tokens: Any

    def get_vocab(self) -> dict[str, int]:
        """Its tokens and their ids."""


@runtime_checkable
class Modelled(Protocol):
    """A scorer that shows its model."""

    model: Any


@runtime_checkable
class Embedding(Protocol):
    """A model with token embeddings, as those of transformers and PEFT."""

    def get_input_embeddings(self) -> Any:
        """The module that token ids go through first."""

    def modules(self) -> Any:
        """All of its parts."""

    def train(self, mode: bool = True) -> Any:
        """Turn dropout on, or off."""


@dataclass(frozen=True, eq=False)
class Subject:
    """The scorer, and what its scores are compared by."""

    scorer: Scorer
    pairs: Pairs
    tolerance: float | None
    chat: bool
    sign: bool
    discrete: bool
    long_words: int

    def score(self, pairs: Pairs) -> Float32[np.ndarray, " n"]:
        """The checked scores of pairs, in one call; warnings are for the checks that ask for them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return score(self.scorer, pairs.prompts, pairs.completions)

    def heard(self, pairs: Pairs) -> tuple[Float32[np.ndarray, " n"], list[str]]:
        """The same, and the warnings that say that an input was too long."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scores = score(self.scorer, pairs.prompts, pairs.completions)
        return scores, [str(x.message) for x in caught if TOO_LONG.search(f"{x.category.__name__} {x.message}")]

    def refuses(self, pairs: Pairs) -> bool:
        """Whether the scorer itself raises, for its own reasons; a nan that it gives is no refusal."""
        try:
            self.scorer(pairs.prompts, pairs.completions)
        except (ValueError, TypeError, AttributeError, RuntimeError, LookupError):
            return True
        return False

    def reads_whole(self, pairs: Pairs) -> bool:
        """Whether the scorer neither refuses them nor says that it leaves something out."""
        try:
            return not self.heard(pairs)[1]
        except (ValueError, RuntimeError, LookupError):
            return False

    def one_by_one(self, pairs: Pairs) -> Float32[np.ndarray, " n"]:
        """Their scores, each in a call of its own."""
        return np.array([self.score(pairs.at([i]))[0] for i in range(len(pairs))], np.float32)

    @cached_property
    def mixed(self) -> Float32[np.ndarray, " n"]:
        """The scores of all pairs, in one call."""
        return self.score(self.pairs)

    @cached_property
    def sd(self) -> float:
        """Their standard deviation: the unit of every difference."""
        return float(self.mixed.std(dtype=np.float64))

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What the scorer says of itself."""
        return fingerprint(self.scorer)

    @cached_property
    def few_bits(self) -> list[str]:
        """The types of 16 bits and fewer that its fingerprint names."""
        return sorted({kind for kind in map(str, values_of(self.fingerprint, "dtype")) if kind.startswith(FEW_BITS)})

    @property
    def limit(self) -> int | None:
        """The most tokens that it reads, by its fingerprint; None if that does not say."""
        return max((n for n in values_of(self.fingerprint, "max_length") if isinstance(n, int)), default=None)

    @property
    def near(self) -> float:
        """How far apart equal scores may be, in standard deviations."""
        if self.tolerance is not None:
            return self.tolerance
        return TOLERANCE_16_BIT if self.few_bits else TOLERANCE

    @cached_property
    def inside(self) -> Any:
        """The scorer that reads text, within those that wrap it."""
        scorer: Any = self.scorer
        while isinstance(scorer, Wrapping):
            scorer = scorer.scorer
        return scorer

    @property
    def model(self) -> Embedding | None:
        """The scorer's model, if it shows one of torch."""
        held = self.inside.model if isinstance(self.inside, Modelled) else None
        return held if isinstance(held, Embedding) else None

    @property
    def tokenizer(self) -> Any:
        """The scorer's tokenizer, if it shows one of transformers; or None."""
        held = self.inside.tokenizer if isinstance(self.inside, Tokenizing) else None
        return held if isinstance(held, Tokenizer) else None

    def same(self, pairs: Pairs, found: np.ndarray, expected: np.ndarray, hint: str) -> Outcome:
        """Whether two ways to the scores of pairs agree; the worst of them is shown."""
        apart = np.abs(np.asarray(found, np.float64) - expected)
        worst = int(apart.argmax())
        gap = in_units(float(apart[worst]), self.sd)
        if gap <= self.near:
            return Outcome("ok", f"{gap:.0e} sd" if gap else "")
        advice = (
            "" if self.few_bits or gap > TOLERANCE_16_BIT else f"; of a 16-bit model, say tolerance={TOLERANCE_16_BIT}"
        )
        return Outcome(
            "FAIL",
            f"{gap:.1e} sd apart, at most {self.near:.0e} is equal: {start_of(pairs.completions[worst], 40)} "
            f"{expected[worst]:.6g} becomes {found[worst]:.6g} -> {hint}{advice}",
        )


def in_units(difference: float, sd: float) -> float:
    """A difference in standard deviations; of scores without any spread, nothing but equal is near."""
    if difference == 0:
        return 0.0
    return difference / sd if sd > 0 else float("inf")


def values_of(told: Any, name: str) -> Iterator[Any]:
    """Whatever a fingerprint has under a name, at any depth.

    >>> list(values_of({"kind": "ensemble", "of": [{"dtype": "bfloat16"}, {"dtype": "float32"}]}, "dtype"))
    ['bfloat16', 'float32']
    """
    if isinstance(told, Mapping):
        yield from (value for key, value in told.items() if key == name)
    if isinstance(told, Mapping | list | tuple):
        for part in told.values() if isinstance(told, Mapping) else told:
            yield from values_of(part, name)
