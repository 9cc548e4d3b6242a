"""The scorer under examination: its built-in test pairs, its scores, and the rule by which two scores are equal."""

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from calibrated_rewards.testing.probes import (
    INSIDE,
    LETTERS,
    QUESTIONS,
    Pairs,
    as_prompt,
    long_prompt,
    make_answers,
    passage,
)

# The largest difference between equal scores, in standard deviations, over all pairs of a float32 model. 16-bit
# arithmetic rounds differently for each batch shape, so single pairs stray far: there the root mean square (rms)
# counts. Plain ways to run a Llama of 135M parameters in bfloat16, padded or not, were 0.09 to 0.17 sd rms apart.
TOLERANCE, TOLERANCE_16_BIT = 1e-4, 0.25
# In 16 bits no pair may stray farther than this many tolerances. A single pair decides the rms of fewer than STRAY**2
# pairs, so the rms is taken as if there were that many.
STRAY = 4
# The largest difference of a sound 16-bit model whose fingerprint does not name its dtype.
FARTHEST_16_BIT = 0.5
IN_FLOAT32 = "; 16 bits: run it in float32 (--dtype float32) to tell rounding from a fault"
# A change of the text that moves the score by less than this, in standard deviations, was not read.
UNREAD = 1e-6
# How scorers, transformers and servers report that an input was cut.
TOO_LONG = re.compile(r"truncat|too long|max_length|maximum (sequence|context|model)|longer than", re.IGNORECASE)
# The cause when a neighbour in the batch changes a score.
PADS = "padding is read: pad on the right, pass attention_mask (and position_ids), and pool the last token of each row"
# Words of the long prompts that are scored before any short one; the first that the scorer reads whole is taken.
# BigBird, which its first short input changes, reads sparsely from 704 tokens on.
LONG_FIRST = (1_000, 300, 60)
FEW_BITS = ("float16", "bfloat16", "float8", "int8", "int4", "uint8")
REFUSALS = (ValueError, TypeError, AttributeError, RuntimeError, LookupError)
# A longer repr is cut to the name of the class.
SHORT_REPR = 200


class Outcome(NamedTuple):
    """The result of a check: passed, failed or not applicable; and the numbers behind it."""

    status: Literal["ok", "FAIL", "-"]
    detail: str = ""


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a transformers tokenizer that the checks use."""

    chat_template: Any
    all_special_tokens: Any

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all tokens by their text."""


@runtime_checkable
class Model(Protocol):
    """The part of a transformers or PEFT model that the checks use."""

    def get_input_embeddings(self) -> Any:
        """Return the module that token ids go through first."""

    def modules(self) -> Any:
        """Iterate over the model and all its submodules."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training mode, or back."""


@dataclass
class Spare:
    """Seconds that an examination may spend on more than the minimum of test texts."""

    seconds: float = 0.0

    @contextmanager
    def spend(self) -> Iterator[None]:
        """Subtract the time that the block takes."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds -= perf_counter() - start


@dataclass(frozen=True, eq=False)
class Subject:
    """A scorer, its test pairs, the settings of the examination, and a record of the calls made."""

    scorer: Scorer
    pairs: Pairs
    tolerance: float | None = None
    chat: bool = False
    sign: bool = False
    discrete: bool = False
    long_words: int = 0
    reads_prompt: bool = True
    may_ignore: Collection[str] = ()
    """Names of the differences in a text that the scorer is meant to ignore (`check_scorer.IGNORABLE`)."""
    spare: Spare = field(default_factory=Spare)
    before: Mapping[str, Any] = field(default_factory=dict)
    """The state of the process (`check_side_effects.process_state`) before the scorer's first call."""
    scored_pairs: list[int] = field(default_factory=list)
    """The number of pairs of each call."""

    def score(self, pairs: Pairs) -> Float32[np.ndarray, " n"]:
        """Score pairs in one call, without warnings."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._score(pairs)

    def score_and_listen(self, pairs: Pairs) -> tuple[Float32[np.ndarray, " n"], list[str]]:
        """Score pairs in one call; also return the warnings that an input was too long."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scores = self._score(pairs)
        return scores, [str(x.message) for x in caught if TOO_LONG.search(f"{x.category.__name__} {x.message}")]

    def _score(self, pairs: Pairs) -> Float32[np.ndarray, " n"]:
        copy = deepcopy(pairs)  # a scorer that changes its inputs spoils no other check
        self.scored_pairs.append(len(pairs))
        return score(self.scorer, copy.prompts, copy.completions).copy()

    def call_scorer(self, pairs: Pairs) -> Any:
        """Call the scorer itself on copies, without warnings; its answer is not checked and no lock is held."""
        copy = deepcopy(pairs)
        self.scored_pairs.append(len(pairs))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(self.scorer, copy.prompts, copy.completions)

    def refuses(self, pairs: Pairs) -> bool:
        """Return True if the scorer itself raises an error; a nan score is no refusal."""
        copy = deepcopy(pairs)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call(self.scorer, copy.prompts, copy.completions)
        except REFUSALS:
            return True
        return False

    def reads_whole(self, pairs: Pairs) -> bool:
        """Return False if the scorer refuses the pairs or warns that it cuts them; a nan score raises."""
        try:
            return not self.score_and_listen(pairs)[1]
        except REFUSALS:
            if not self.refuses(pairs):
                raise
            return False

    def score_one_by_one(self, pairs: Pairs) -> Float32[np.ndarray, " n"]:
        """Score each pair in a call of its own."""
        return np.array([self.score(pairs.at([i]))[0] for i in range(len(pairs))], np.float32)

    def tells_apart(self, ones: Pairs, others: Pairs) -> bool:
        """Return True once a pair scores otherwise than its other version, each in a call of its own."""
        gaps = (self.measure_gap(ones.at([i]), others.at([i])) for i in range(len(ones)))
        return any(in_units(gap, self.sd) > UNREAD for gap in gaps)

    def measure_gap(self, one: Pairs, other: Pairs) -> float:
        """Difference between the scores of two single pairs, each in a call of its own."""
        return abs(float(self.score(one)[0]) - float(self.score(other)[0]))

    def tokenizes_alike(self, one: str, other: str) -> bool:
        """Return True if the scorer shows its tokenizer, and that makes the same tokens of both texts."""
        if self.tokenizer is None:
            return False
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (one, other)]
        return bool(ids[0] == ids[1])

    def as_completions(self, texts: Sequence[str], question: int = 0) -> Pairs:
        """Pair texts, as completions, with the prompt of a question."""
        return Pairs([as_prompt(QUESTIONS[question].prompt, self.chat)] * len(texts), texts)

    def as_prompts(self, texts: Sequence[str], question: int = 0) -> Pairs:
        """Pair texts, as prompts with nothing appended, with the good answer of a question."""
        prompts = [as_prompt(text, True) if self.chat else text for text in texts]
        return Pairs(prompts, [QUESTIONS[question].good] * len(texts))

    @cached_property
    def reads_letters(self) -> bool:
        """True if another letter gives another score, for three letters in most places of a short completion.

        They do for a model and a hash; they do not for a count, a length or a search for words.
        """
        text = passage(60, "completion")
        variants = [sorted({text, *(f"{text[:i]}{letter}{text[i + 1 :]}" for letter in LETTERS)}) for i in INSIDE]
        distinct = [len(np.unique(self.score(self.as_completions(texts)))) == len(texts) for texts in variants]
        return sum(distinct) >= len(INSIDE) - 2

    @property
    def continuous(self) -> bool:
        """True if any change of a text should change its score: not for grades, not for a constant."""
        return not self.discrete and self.sd > 0

    @cached_property
    def first(self) -> tuple[Float32[np.ndarray, " n"], list[str]]:
        """The scores of the scorer's very first call, and the warnings that an input was too long."""
        return self.score_and_listen(self.pairs)

    @cached_property
    def mixed(self) -> Float32[np.ndarray, " n"]:
        """The scores of all pairs, in one call."""
        return self.score(self.pairs)

    @cached_property
    def long_first(self) -> tuple[Pairs, Float32[np.ndarray, " n"]] | None:
        """Long inputs and their scores, scored before any short one; None if the scorer reads none whole."""
        for words in LONG_FIRST:
            pairs = Pairs([long_prompt(words, self.chat)] * 2, make_answers(0)[:2])
            try:
                scores, cut = self.score_and_listen(pairs)
            except Exception:  # noqa: BLE001 (any code may be a scorer; other checks report its errors)
                continue
            if not cut:
                return pairs, scores
        return None

    @cached_property
    def sd(self) -> float:
        """Standard deviation of the scores of all pairs: the unit of every difference."""
        return float(self.mixed.std(dtype=np.float64))

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """The scorer's fingerprint, as it is at first."""
        return fingerprint(self.scorer)

    @cached_property
    def few_bits(self) -> list[str]:
        """The dtypes of 16 bits and fewer that the fingerprint names."""
        return sorted({kind for kind in map(str, find_values(self.fingerprint, "dtype")) if kind.startswith(FEW_BITS)})

    @property
    def limit(self) -> int | None:
        """The most tokens that the scorer reads, by its fingerprint; None if that does not say."""
        return max((n for n in find_values(self.fingerprint, "max_length") if isinstance(n, int)), default=None)

    @property
    def near(self) -> float:
        """The largest difference between equal scores, in standard deviations."""
        if self.tolerance is not None:
            return self.tolerance
        return TOLERANCE_16_BIT if self.few_bits else TOLERANCE

    @cached_property
    def inside(self) -> Any:
        """The scorer that reads the text, inside those that wrap it."""
        scorer: Any = self.scorer
        while hasattr(scorer, "scorer"):
            scorer = scorer.scorer
        return scorer

    @property
    def model(self) -> Model | None:
        """The scorer's torch model, if it shows one."""
        model = getattr(self.inside, "model", None)
        return model if isinstance(model, Model) else None

    @property
    def tokenizer(self) -> Any:
        """The scorer's transformers tokenizer, if it shows one."""
        tokenizer = getattr(self.inside, "tokenizer", None)
        return tokenizer if isinstance(tokenizer, Tokenizer) else None

    def compare(self, pairs: Pairs, scores: np.ndarray, expected: np.ndarray, hint: str) -> Outcome:
        """Fail, with the worst pair and a hint, unless two ways to score the same pairs agree."""
        apart = np.abs(np.asarray(scores, np.float64) - expected)
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
            f"{expected[worst]:.6g} becomes {scores[worst]:.6g} -> {hint}{advice}",
        )

    def compare_again(self, hint: str) -> Outcome:
        """Score all pairs in one call again, and compare."""
        return self.compare(self.pairs, self.score(self.pairs), self.mixed, hint)


def rms_or_stray(apart: np.ndarray) -> float:
    """Root mean square of differences; or a quarter of the largest one, if that is more.

    >>> rms_or_stray(np.full(64, 0.1)), rms_or_stray(np.eye(64)[0]), rms_or_stray(np.array([1.0]))
    (0.1, 0.25, 0.25)
    """
    rms = np.sqrt(np.square(apart).sum() / max(len(apart), STRAY**2))
    return float(max(rms, apart.max() / STRAY))


def in_units(difference: float, sd: float) -> float:
    """Express a difference in standard deviations; without any spread, only equal scores are near."""
    if difference == 0:
        return 0.0
    return difference / sd if sd > 0 else float("inf")


def find_values(data: Any, name: str) -> Iterator[Any]:
    """Find all values that a fingerprint has under a name, at any depth.

    >>> list(find_values({"kind": "ensemble", "of": [{"dtype": "bfloat16"}, {"dtype": "float32"}]}, "dtype"))
    ['bfloat16', 'float32']
    """
    if isinstance(data, Mapping):
        yield from (value for key, value in data.items() if key == name)
    if isinstance(data, Mapping | list | tuple):
        for part in data.values() if isinstance(data, Mapping) else data:
            yield from find_values(part, name)


def describe(thing: object) -> str:
    """Name a thing by its name or repr, unless that contains a whole model or table.

    >>> describe(describe), describe(slice(2)), describe(b"x" * 999)
    ('describe', 'slice(None, 2, None)', 'bytes(...)')
    """
    text = getattr(thing, "__qualname__", None) or repr(thing)
    return text if len(text) <= SHORT_REPR and "\n" not in text else f"{type(thing).__name__}(...)"
