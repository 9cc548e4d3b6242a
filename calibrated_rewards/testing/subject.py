"""A scorer under examination: the pairs it is asked about, what it gave for them, and how near two scores are equal."""

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.prompts import start_of
from calibrated_rewards.scorers.protocol import Scorer, call, fingerprint, score
from calibrated_rewards.testing.probes import Pairs, answers, long_prompt
from calibrated_rewards.testing.process_state import process_state

# Equal scores are this near, in standard deviations: the farthest pair of float32. Arithmetic of 16 bits rounds
# otherwise for each batch shape, which makes some pair stray far: there it is the root mean square (rms) that counts.
# Plain ways to run a Llama of 135M parameters in bfloat16, padded or not, were 0.09 to 0.17 sd rms apart.
TOLERANCE, TOLERANCE_16_BIT = 1e-4, 0.25
# In 16 bits no pair may stray farther than so many tolerances; so of fewer pairs than its square the rms, which a
# single one decides, is taken as if there were that many.
STRAY = 4
# So far may the farthest pair of a sound 16-bit model be, if its fingerprint does not say what it is.
FARTHEST_16_BIT = 0.5
IN_FLOAT32 = "; 16 bits: run it in float32 (--dtype float32) to tell rounding from a fault"
# A change in the text that moves the score by less than this, in standard deviations, was not read.
UNREAD = 1e-6
# How scorers, transformers and servers say that they do not read the whole of an input.
TOO_LONG = re.compile(r"truncat|too long|max_length|maximum (sequence|context|model)|longer than", re.IGNORECASE)
# What is wrong where a neighbour in the batch changes a score.
PADS = "padding is read: pad on the right, pass attention_mask (and position_ids), and pool the last token of each row"
# Words of the long prompts that are scored before any short one; the first that the scorer reads whole is taken.
# BigBird, whose first short input changes it, reads sparsely from 704 tokens on.
LONG_FIRST = (1_000, 300, 60)
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


@dataclass
class Spare:
    """Seconds that an examination may spend on more than the least that it asks."""

    seconds: float

    @contextmanager
    def spent(self) -> Iterator[None]:
        """Take off what is spent inside."""
        began = perf_counter()
        try:
            yield
        finally:
            self.seconds -= perf_counter() - began


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
    reads_prompt: bool = True
    may_ignore: Collection[str] = ()
    """Differences in a text that the scorer is meant not to see, by their names in `characters.KINDS`."""
    spare: "Spare" = field(default_factory=lambda: Spare(0.0))
    """Seconds for more than the least that is asked."""
    before: Mapping[str, Any] = field(default_factory=process_state)
    """The process before the scorer's first call."""
    scored_pairs: list[int] = field(default_factory=list)
    """The number of pairs of each call."""

    def score(self, pairs: Pairs) -> Float32[np.ndarray, " n"]:
        """The checked scores of pairs, in one call; warnings are for the checks that ask for them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.scored(pairs)

    def scored(self, pairs: Pairs) -> Float32[np.ndarray, " n"]:
        """The same, warnings and all; of copies, so that a scorer that changes its inputs spoils no other check."""
        given = deepcopy(pairs)
        self.scored_pairs.append(len(pairs))
        return score(self.scorer, given.prompts, given.completions).copy()

    def heard(self, pairs: Pairs) -> tuple[Float32[np.ndarray, " n"], list[str]]:
        """The same, and the warnings that say that an input was too long."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scores = self.scored(pairs)
        return scores, [str(x.message) for x in caught if TOO_LONG.search(f"{x.category.__name__} {x.message}")]

    def refuses(self, pairs: Pairs) -> bool:
        """Whether the scorer itself raises, for its own reasons; a nan that it gives is no refusal."""
        given = deepcopy(pairs)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call(self.scorer, given.prompts, given.completions)
        except (ValueError, TypeError, AttributeError, RuntimeError, LookupError):
            return True
        return False

    def reads_whole(self, pairs: Pairs) -> bool:
        """Whether the scorer neither refuses them nor says that it leaves something out; a nan is no refusal."""
        try:
            return not self.heard(pairs)[1]
        except (ValueError, TypeError, AttributeError, RuntimeError, LookupError):
            if not self.refuses(pairs):
                raise
            return False

    def one_by_one(self, pairs: Pairs) -> Float32[np.ndarray, " n"]:
        """Their scores, each in a call of its own."""
        return np.array([self.score(pairs.at([i]))[0] for i in range(len(pairs))], np.float32)

    def tells_apart(self, ones: Pairs, others: Pairs) -> bool:
        """Whether any pair scores otherwise than its other version; each is scored alone, until one does."""
        gaps = (abs(float(self.score(ones.at([i]))[0] - self.score(others.at([i]))[0])) for i in range(len(ones)))
        return any(in_units(gap, self.sd) > UNREAD for gap in gaps)

    def gap_alone(self, one: Pairs, other: Pairs) -> float:
        """How far apart the first pairs of both score, each in a call of its own."""
        return abs(float(self.score(one.at([0]))[0]) - float(self.score(other.at([0]))[0]))

    def reads_alike(self, one: str, other: str) -> bool:
        """Whether the tokenizer that the scorer shows makes the same tokens of two texts."""
        if self.tokenizer is None:
            return False
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (one, other)]
        return bool(ids[0] == ids[1])

    @property
    def continuous(self) -> bool:
        """Whether any change of a text may be asked to show in its score: of no grade, and no constant."""
        return not self.discrete and self.sd > 0

    @cached_property
    def first(self) -> tuple[Float32[np.ndarray, " n"], list[str]]:
        """The scores of the scorer's very first call, and the warnings that an input was too long."""
        return self.heard(self.pairs)

    @cached_property
    def mixed(self) -> Float32[np.ndarray, " n"]:
        """The scores of all pairs, in one call."""
        return self.score(self.pairs)

    @cached_property
    def long_first(self) -> tuple[Pairs, Float32[np.ndarray, " n"]] | None:
        """Long inputs and their scores, asked for before anything short was; None if the scorer reads none whole."""
        for words in LONG_FIRST:
            pairs = Pairs([long_prompt(words, self.chat)] * 2, answers(0)[:2])
            try:
                scores, cut = self.heard(pairs)
            except Exception:  # noqa: BLE001 (a scorer is anybody's code, which other checks ask again)
                continue
            if not cut:
                return pairs, scores
        return None

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
        gap = in_units(rms_or_stray(apart) if self.few_bits else float(apart[worst]), self.sd)
        unit = "sd rms" if self.few_bits else "sd"
        if gap <= self.near:
            return Outcome("ok", f"{gap:.0e} {unit}" if gap else "")
        perhaps = f"; of a 16-bit model, say tolerance={FARTHEST_16_BIT}" if gap <= FARTHEST_16_BIT else ""
        advice = IN_FLOAT32 if self.few_bits else perhaps
        return Outcome(
            "FAIL",
            f"{gap:.1e} {unit} apart, at most {self.near:.0e} is equal: {start_of(pairs.completions[worst], 40)} "
            f"{expected[worst]:.6g} becomes {found[worst]:.6g} -> {hint}{advice}",
        )


def rms_or_stray(apart: np.ndarray) -> float:
    """The root mean square of differences; or a quarter of the largest one, if that is more.

    >>> rms_or_stray(np.full(64, 0.1)), rms_or_stray(np.eye(64)[0]), rms_or_stray(np.array([1.0]))
    (0.1, 0.25, 0.25)
    """
    rms = np.sqrt(np.square(apart).sum() / max(len(apart), STRAY**2))
    return float(max(rms, apart.max() / STRAY))


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
