# ruff: noqa: D102 (a fault has its name from its class)
"""check_scorer: passes what is sound, and fails each planted fault by the check that is meant for it.

The faults are those of real scorers: tiny models from transformers, batched the way people batch them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from scipy import stats
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BigBirdConfig,
    BigBirdForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from calibrated_rewards.models.text import Text
from calibrated_rewards.scorers.classifiers import SequenceClassifier
from calibrated_rewards.scorers.ensemble import Cost, Ensemble
from calibrated_rewards.testing.check_scorer import CHECKS, Check, Examination, check_scorer, run_check
from calibrated_rewards.testing.probes import QUESTIONS, everyday
from calibrated_rewards.testing.subject import Outcome
from calibrated_rewards.testing.suites import HashScorer, NumberScorer, check_picklable, check_transform

Scores = Callable[[Sequence[Any], Sequence[Any]], Any]
GOOD = {question.good for question in QUESTIONS}
BY_NAME = {check.name: check for check in CHECKS}
NUMBER, BOS, DISTINCT, LEFT, PROCESS, TWICE, ALONE, NEIGHBOURS, PERMUTED, REPEATED = [c.name for c in CHECKS[:10]]
COUNT, THREADS, AFTER, ERROR, PREFIX, ALIKE, TRAINING, SPECIAL, ODD, FINITE, EMPTY, NOTHING = [
    c.name for c in CHECKS[10:22]
]
CHAT, PROMPT, ENDS, TURNS, ROLES, TALK, SYSTEM, ANSWER, QUESTION, KINDS, LETTERS = [c.name for c in CHECKS[22:33]]
SIGN, LONG, SHORT, IDENTITY, PICKLE, AGAIN = [c.name for c in CHECKS[33:]]


def gpt2(seed: int = 0, **options: Any) -> Any:
    """A GPT-2 classifier: it learns its positions, so that left padding shifts them."""
    torch.manual_seed(seed)
    ids = {"pad_token_id": tiny.PAD, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS}
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 1024, "vocab_size": tiny.VOCABULARY}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=1, **ids, **{**still, **options})).eval()
    with torch.no_grad():
        model.score.weight.normal_(std=1.0)
        model.transformer.wpe.weight.normal_(std=0.3)
    return model


@dataclass(eq=False)
class Naive:
    """A reward model scored in one padded batch: each setting is a mistake to make."""

    model: Any = field(default_factory=gpt2)
    tokenizer: Any = field(default_factory=lambda: tiny.tokenizer(template=None))
    mask: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], /) -> Any:
        if not len(prompts):
            return []
        texts = [self.render(p, c) for p, c in zip(prompts, completions, strict=True)]
        batch = self.tokenizer(texts, padding=True, return_tensors="pt", **self.options)
        given = {"attention_mask": batch["attention_mask"]} if self.mask else {}
        with torch.no_grad():
            return self.pooled(batch, given)

    def pooled(self, batch: Any, given: dict[str, Any]) -> Any:
        return self.model(input_ids=batch["input_ids"], **given).logits[:, 0]

    def render(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, list):
            return self.tokenizer.apply_chat_template(
                [*prompt, {"role": "assistant", "content": completion}], tokenize=False
            )
        return prompt + completion


@dataclass(frozen=True)
class Opaque:
    """A scorer of which nothing is seen but its scores."""

    call: Scores

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], /) -> Any:
        return self.call(prompts, completions)


@dataclass(frozen=True)
class Oracle:
    """A scorer that knows the good answers, and has a fault where it is asked to."""

    fault: Callable[[list[Any], np.ndarray], Any] = lambda completions, scores: scores

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], /) -> Any:
        noise = HashScorer()(prompts, [text_of(c) for c in completions])
        return self.fault(
            list(completions), noise + 10 * np.array([text_of(c) in GOOD for c in completions], np.float32)
        )


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def failed(scorer: Any, *names: str, **options: Any) -> set[str]:
    """The checks that a scorer fails, of those named or of all.

    Nobody asks a random model for its sign, nor one of many for all it reads. A scorer that remembers its calls is
    asked for all: what a check finds depends on those before it.
    """
    examination = asked(scorer, options)
    if not names and not isinstance(scorer, MODELS):
        return {finding.name for finding in examination.inspect().failed}
    names = names or tuple(check.name for check in CHECKS if check.name not in READING)
    return {name for name in names if run_check(BY_NAME[name], examination.subject).status == "FAIL"}


def told(scorer: Any, name: str, **options: Any) -> str:
    """What a verdict says of one check."""
    return ": ".join(run_check(BY_NAME[name], asked(scorer, options).subject))


def asked(scorer: Any, options: dict[str, Any]) -> Examination:
    """An examination; of models with fewer pairs, of one that is scored in one long batch with shorter texts."""
    few = everyday(chat=False).at(range(16))
    fewer = {"prompts": few.prompts, "completions": few.completions} if isinstance(scorer, MODELS) else {}
    shorter = {"long_words": 100} if isinstance(scorer, Naive) else {}
    return Examination(scorer, **{"sign": False, "spare_seconds": 0.0, **fewer, **shorter, **options})


MODELS = (Naive, SequenceClassifier)
# Hundreds of texts for each: asked of our own models, in test_our_scorers_pass, and of what reads fast.
READING = (COUNT, THREADS, FINITE, ROLES, TALK, ANSWER, QUESTION, KINDS, LETTERS)


def llama(**options: Any) -> SequenceClassifier:
    return SequenceClassifier(tiny.classifier(), tiny.tokenizer(**options))


# What is sound passes.


@pytest.mark.parametrize(("model", "side"), [(tiny.classifier, "right"), (gpt2, "left")])
def test_our_scorers_pass(model, side):
    """Rotary positions, and learned ones with a tokenizer that pads left: all checks but the sign of a random head."""
    verdict = check_scorer(SequenceClassifier(model(), tiny.tokenizer(side=side)), sign=False, spare_seconds=0)

    assert [finding.name for finding in verdict.findings if finding.status == "-"] == [SIGN, PICKLE]


def test_a_naive_scorer_without_a_fault_passes():
    """The scorer that the faults below are planted in is sound: right padding, mask, one BOS, evaluation mode."""
    assert failed(Naive()) == set()


def test_a_scorer_that_knows_passes_with_its_sign():
    """A plain callable, with good answers above bad ones, passes all that can be asked of it."""
    verdict = check_scorer(Oracle())

    assert {finding.name for finding in verdict.findings if finding.status == "-"} == {BOS, TRAINING, PICKLE}
    assert "8 of 8" in told(Oracle(), SIGN, sign=True)


def test_scorers_of_numbers_pass():
    """The public fakes: one continuous, one of numbers that tie and that no text at the ends moves."""
    check_scorer(HashScorer(3), sign=False)
    check_scorer(NumberScorer(), sign=False, discrete=True)

    assert DISTINCT in failed(NumberScorer(), DISTINCT)


def test_a_function_of_trl_is_called_by_name():
    """A reward function without prompts by place is examined as it is called in training: no check fails for that."""

    def reward_function(completions, **_):
        return [float(len(completion)) for completion in completions]

    findings = Examination(reward_function, sign=False, reads_prompt=False, discrete=True).inspect().findings
    assert not [finding for finding in findings if "positional argument" in finding.detail]


# One fault a test.


def test_left_padding_without_positions():
    """GPT-2 padded on the left, with a mask but with no position ids: scores depend on the batch."""
    scorer = Naive(tokenizer=tiny.tokenizer(template=None, side="left"))

    assert {ALONE, NEIGHBOURS, PREFIX} <= failed(scorer, ALONE, NEIGHBOURS, PREFIX)


def test_left_padding_without_mask():
    """Llama padded on the left without attention mask: pads are read as text."""
    scorer = Naive(tiny.classifier(), tiny.tokenizer(template=None, side="left"), mask=False)

    assert {ALONE, NEIGHBOURS} <= failed(scorer, ALONE, NEIGHBOURS)


@dataclass(eq=False)
class LastPosition(Naive):
    """Pools the last position of the batch, pads included."""

    def pooled(self, batch: Any, given: dict[str, Any]) -> Any:
        hidden = self.model.transformer(input_ids=batch["input_ids"], **given).last_hidden_state
        return self.model.score(hidden[:, -1])[:, 0]


@dataclass(eq=False)
class MeanOverPads(LastPosition):
    """Takes the mean over all positions, pads included."""

    def pooled(self, batch: Any, given: dict[str, Any]) -> Any:
        hidden = self.model.transformer(input_ids=batch["input_ids"], **given).last_hidden_state
        return self.model.score(hidden.mean(1))[:, 0]


@pytest.mark.parametrize("scorer", [LastPosition, MeanOverPads])
def test_pads_that_count(scorer):
    """Pads are pooled, or counted in a mean: scores depend on the batch."""
    assert {ALONE, NEIGHBOURS} <= failed(scorer(), ALONE, NEIGHBOURS)


def test_a_tolerance_of_sixteen_bits():
    """Differences of 0.02 sd are no fault of a model that says bfloat16, but of float32: the farthest is shown."""
    shaken = Shaken(0.02)

    assert ALONE in failed(shaken, ALONE)
    assert failed(replace(shaken, dtype="bfloat16")) == failed(shaken, tolerance=0.1) == set()
    assert "tolerance=0.5" in told(shaken, ALONE)
    assert "bfloat16" in told(replace(shaken, dtype="bfloat16"), NUMBER)
    assert failed(Ensemble([replace(shaken, dtype="bfloat16")])) == set()


def test_sixteen_bits_are_judged_by_the_rms():
    """Of a bfloat16 model the noise of all pairs counts, of which one may stray, but not far; float32 tells which."""
    noisy, broken, stray = (Noisy(by, pairs) for by, pairs in [(0.12, 64), (0.4, 64), (1.5, 1)])

    assert failed(noisy) == set()
    assert ALONE in failed(broken, ALONE)
    assert ALONE in failed(stray, ALONE)
    assert failed(replace(noisy, by=0.6, pairs=1)) == set()
    assert ALONE in failed(noisy, ALONE, tolerance=0.05)
    assert ALONE in failed(replace(noisy, dtype="float32"), ALONE)
    assert "sd rms apart" in told(broken, ALONE)
    assert "--dtype float32" in told(broken, ALONE)


@dataclass(frozen=True)
class Noisy:
    """The first so many scores of the everyday pairs in one call are off, up and down; in other calls none is."""

    by: float
    pairs: int
    dtype: str = "bfloat16"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], /) -> Any:
        place = np.arange(len(prompts))
        off = self.by * (-1.0) ** place * (place < self.pairs) * (len(prompts) == 64)
        return HashScorer()(prompts, completions) + off.astype(np.float32)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "noisy", "dtype": self.dtype}


@dataclass(frozen=True)
class Shaken:
    """Scores that depend a little on the number of pairs in the call."""

    by: float
    dtype: str = "float32"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], /) -> Any:
        return HashScorer()(prompts, completions) * (1 + self.by * (len(prompts) % 2))

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "shaken", "dtype": self.dtype}


def test_results_in_another_order():
    """Sorted by length for the sake of padding, and not put back."""

    def by_length(prompts, completions):
        order = sorted(range(len(prompts)), key=lambda i: len(completions[i]))
        return HashScorer()([prompts[i] for i in order], [completions[i] for i in order])

    assert {ALONE, PERMUTED} <= failed(Opaque(by_length), ALONE, PERMUTED)


def test_scores_by_place():
    """A score that has to do with the place in the list."""

    def drifting(prompts, completions):
        return HashScorer()(prompts, completions) + 0.01 * np.arange(len(prompts), dtype=np.float32)

    assert {PERMUTED, REPEATED} <= failed(Opaque(drifting), PERMUTED, REPEATED)


def test_scores_by_completion():
    """Scores kept in a dict by completion: those of the same answer to another question are mixed up."""

    def by_completion(prompts, completions):
        kept = dict(zip(completions, HashScorer()(prompts, completions), strict=True))
        return [kept[completion] for completion in completions]

    assert ALONE in failed(Opaque(by_completion), ALONE)


def test_a_pair_is_scored_once():
    """A pair that occurs again gets no score, as if it were known already."""

    def first_alone(prompts, completions):
        seen = [
            (p, c) in list(zip(prompts, completions, strict=True))[:i]
            for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
        ]
        return HashScorer()(prompts, completions) * ~np.array(seen, bool)

    assert failed(Opaque(first_alone)) == {REPEATED, COUNT}


def test_dropout():
    """A model left in training mode: each call gives other scores."""
    model = gpt2(resid_pdrop=0.3).train()

    assert {TWICE, REPEATED, TRAINING} <= failed(Naive(model), TWICE, REPEATED, TRAINING)


def test_evaluation_mode_set_once():
    """A model put into evaluation mode when it was loaded, and never again: a trainer turns it back."""
    assert failed(Naive(gpt2(resid_pdrop=0.3))) == {TRAINING}


@dataclass(eq=False)
class Seeded(Naive):
    """Adds noise that has its seed from torch's: the same in each call, until somebody seeds torch again."""

    def pooled(self, batch: Any, given: dict[str, Any]) -> Any:
        noise = [torch.Generator().manual_seed(torch.initial_seed() + int(row.sum())) for row in batch["input_ids"]]
        return super().pooled(batch, given) + torch.stack([torch.rand((), generator=each) for each in noise])


def test_noise_from_the_seed():
    """Scores that change with torch's seed."""
    assert failed(Seeded()) == {TRAINING}


def test_the_examination_leaves_the_model_as_it_was():
    """Training flags part by part, the hooks, and torch's random state."""
    model = gpt2()
    model.transformer.h[0].train()
    state, flags = torch.get_rng_state(), [part.training for part in model.modules()]
    failed(Naive(model))

    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.modules()] == flags
    assert not model.get_input_embeddings()._forward_pre_hooks


def test_a_running_mean():
    """Scores centred by the mean of all that was scored so far."""
    before: list[float] = []

    def centred(prompts, completions):
        scores = HashScorer()(prompts, completions)
        before.extend(scores.tolist())
        return scores - np.mean(before or [0])

    assert {TWICE, AFTER} <= failed(Opaque(centred))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_of_sixteen_bits(dtype):
    """Scores rounded to 16 bits: many tie, and few of them already show it."""
    rounded = Opaque(lambda p, c: torch.tensor(HashScorer()(p, c)).to(dtype))

    # Single letters tie by chance, and not beside another text: that all letters are read is not in doubt.
    assert failed(rounded) == {DISTINCT}
    assert str(dtype).removeprefix("torch.") in told(rounded, DISTINCT)
    assert failed(rounded, discrete=True) == set()


def test_a_constant():
    """One score for all is a fault, of grades too."""
    assert DISTINCT in failed(Opaque(lambda p, c: [0.5] * len(p)), DISTINCT, discrete=True)


def test_a_shared_prefix_read_at_wrong_positions():
    """Completions of a long prompt are read behind its cache, and their positions begin anew."""
    assert failed(Restarting()) == {PREFIX}
    assert failed(Restarting(offset=1)) == set()


@dataclass(eq=False)
class Restarting(Naive):
    """Shares the cache of a prompt when several completions of one are scored, and the prompt is long."""

    offset: int = 0

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], /) -> Any:
        if len(prompts) < 2 or len({str(p) for p in prompts}) > 1 or len(prompts[0]) < 100:
            return [Naive.__call__(self, [p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
        prefix = self.tokenizer(prompts[0], return_tensors="pt")["input_ids"]
        return [self.behind(prefix, completion) for completion in completions]

    @torch.no_grad()
    def behind(self, prefix: Any, completion: str) -> Any:
        cache = self.model.transformer(input_ids=prefix, use_cache=True).past_key_values
        ids = self.tokenizer(completion, return_tensors="pt", add_special_tokens=False)["input_ids"]
        positions = torch.arange(ids.shape[1])[None] + self.offset * prefix.shape[1]
        hidden = self.model.transformer(input_ids=ids, past_key_values=cache, position_ids=positions).last_hidden_state
        return self.model.score(hidden[:, -1])[0, 0]


def test_double_bos():
    """The template writes BOS, and the tokenizer adds one."""
    doubled = Naive(tokenizer=tiny.tokenizer())

    assert BOS in failed(doubled, BOS)
    assert "add_special_tokens=False" in told(doubled, BOS)
    assert BOS not in failed(replace(doubled, options={"add_special_tokens": False}), BOS)


def test_another_models_tokenizer():
    """Ids that the model has no embedding for; on a GPU one of them would end the process."""
    assert "260 embeddings" in told(Naive(gpt2_of(260)), BOS)


def gpt2_of(size: int) -> Any:
    model = gpt2()
    model.resize_token_embeddings(size)
    return model


@dataclass(eq=False)
class UntilPad(Naive):
    """Reads up to the first pad, as transformers did of old: also one that the text holds."""

    def pooled(self, batch: Any, given: dict[str, Any]) -> Any:
        ids = batch["input_ids"]
        ends = (ids == tiny.PAD).int().argmax(1) - 1
        hidden = self.model.transformer(input_ids=ids, **given).last_hidden_state
        return self.model.score(hidden[torch.arange(len(ids)), ends])[:, 0]


def test_text_that_holds_a_pad():
    """What stands behind a pad in the text is not read."""
    assert failed(UntilPad()) == {SPECIAL}
    assert "<pad>" in told(UntilPad(), SPECIAL)
    assert failed(UntilPad(), discrete=True) == set()


def test_text_that_holds_eos():
    """BART wants as many EOS in each row of a batch: text that holds one cannot be scored beside others."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    ids = {
        "pad_token_id": tiny.PAD,
        "bos_token_id": tiny.BOS,
        "eos_token_id": tiny.EOS,
        "decoder_start_token_id": tiny.EOS,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": tiny.VOCABULARY, "num_labels": 1}
    model = BartForSequenceClassification(BartConfig(**sizes, **ids, **heads, max_position_embeddings=1024)).eval()
    scorer = Naive(model, EndedByEos(tiny.tokenizer(template=None)))

    assert "same number of <eos>" in told(scorer, SPECIAL)


@dataclass(eq=False)
class EndedByEos:
    """A tokenizer that ends each text with EOS."""

    inner: Any

    def __call__(self, texts: list[str], **options: Any) -> Any:
        return self.inner([f"{text}</s>" for text in texts], **options)


@pytest.mark.parametrize(
    ("text", "check"), [("👍", ODD), (" ", EMPTY), ("", EMPTY), ("Hello</s>", SPECIAL), (QUESTIONS[0].good, NUMBER)]
)
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_score_that_is_none(text, check, broken):
    """nan or infinite, for a text of one kind; the verdict shows which."""

    def fault(completions, scores):
        return np.where([c == text for c in completions], broken, scores)

    verdict = Examination(Oracle(fault)).inspect()

    assert check in {finding.name for finding in verdict.failed}
    assert repr(text)[:40] in str(verdict)


def test_text_that_cannot_be_encoded():
    """A scorer that knows Latin letters alone."""
    latin = Opaque(lambda p, c: HashScorer()(p, [text_of(x).encode("latin-1").decode("latin-1") for x in c]))

    assert failed(latin) == {ODD, LETTERS, FINITE}


def test_an_empty_completion_may_be_refused():
    """A clear error is no fault; an index out of range is one."""

    def refusing(error):
        def fault(completions, scores):
            if "" in completions:
                raise error
            return scores

        return Oracle(fault)

    assert "'' refused: no text" in told(refusing(ValueError("no text")), EMPTY)
    assert failed(refusing(IndexError("-1"))) == {EMPTY}


def test_nothing_to_score():
    """An error for an empty list, as torch and tokenizers raise it."""
    stacking = Opaque(lambda p, c: torch.stack([torch.tensor(x) for x in HashScorer()(p, c)]))

    assert failed(stacking) == {NOTHING}
    assert failed(Opaque(lambda p, c: HashScorer()(p, c) if p else [0.0])) == {NOTHING}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda p, c: HashScorer()(p, c)[:-1],
        lambda p, c: HashScorer()(p, c)[:, None],
        lambda p, c: 1.0,
        lambda p, c: ["good"] * len(c),
        lambda p, c: None,
    ],
)
def test_not_one_number_for_each(wrong):
    """Another length, another shape, no numbers: the first check says so, and nothing is compared."""
    verdict = Examination(Opaque(wrong), sign=False).inspect()

    assert {finding.name for finding in verdict.failed} <= {NUMBER, NOTHING}
    assert verdict.findings[0].status == "FAIL"
    assert "no scores to compare" in str(verdict)


def test_a_sign_that_is_turned():
    """Costs are taken for rewards; `Cost` puts that right, and who means it may say so."""
    upside_down = Oracle(lambda completions, scores: -scores)

    assert failed(upside_down, sign=True) == {SIGN}
    assert "8 of 8" in told(upside_down, SIGN, sign=True)
    assert failed(Cost(upside_down), sign=True) == failed(upside_down) == set()


@pytest.mark.parametrize(("side", "end"), [("right", "last"), ("left", "first")])
def test_silent_truncation(side, end):
    """A tokenizer that cuts without a word, at either end: found by texts that differ there alone."""
    options = {"truncation": True, "max_length": 700}
    cut = Naive(gpt2(), tiny.tokenizer(template=None, truncation_side=side), options=options)

    assert failed(cut, long_words=600) == {LONG}
    assert f"({end}, amid the prompt, amid the completion)" in told(cut, LONG, long_words=600)


def test_a_limit_that_is_not_kept_to():
    """A scorer that names its limit in its fingerprint, and says nothing when it cuts."""
    assert failed(Quiet(llama())) == {LONG, ANSWER, QUESTION}


@dataclass(eq=False)
class Quiet:
    """Cuts the text itself, so that nothing is reported."""

    of: SequenceClassifier

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], /) -> Any:
        return self.of([""] * len(prompts), [(p + c)[-400:] for p, c in zip(prompts, completions, strict=True)])

    def fingerprint(self) -> dict[str, Any]:
        return {**self.of.fingerprint(), "text": {"max_length": 400}}


def test_what_is_said_of_long_inputs():
    """Reported, refused, unlimited, or not tried because the limit is far: none of it is a fault, and each is told."""
    raising = replace(llama(), text=Text(on_long="raise"))
    unlimited = SequenceClassifier(tiny.classifier(max_position_embeddings=2**30), tiny.tokenizer())

    assert "reported: 1 of 1 inputs" in told(llama(), LONG)
    assert "refused: 1 of 1 inputs" in told(raising, LONG)
    assert "no limit" in told(unlimited, LONG)
    assert "reads 512 tokens" in told(llama(), LONG, long_words=500)
    assert "reported" in told(Ensemble([llama()]), LONG)
    assert failed(raising) == failed(Ensemble([llama()])) == set()


def test_chats_that_are_not_taken():
    """Without a chat template our scorer says so; a tokenizer's scorer that stumbles fails; a function may."""
    assert "refused" in told(llama(template=None), CHAT)
    assert failed(llama(template=None)) == set()
    assert CHAT in failed(Stumbling())
    assert "not taken, TypeError" in told(
        Opaque(lambda p, c: HashScorer()([a + b for a, b in zip(p, c, strict=True)], c)), CHAT
    )


@dataclass(eq=False)
class Stumbling(Naive):
    """Joins prompt and completion whatever they are."""

    def render(self, prompt: Any, completion: Any) -> str:
        return prompt + completion


def test_a_message_is_its_text():
    """A completion that is a message has the score of its text."""
    assert failed(Opaque(lambda p, c: HashScorer()(p, [str(x) for x in c]))) == {CHAT}


# What is not read.


def hashed(see: Callable[[Any, Any], tuple[Any, Any]]) -> Opaque:
    """A scorer that reads of prompt and completion what `see` leaves of them; a score knows no more."""

    def call(prompts, completions):
        seen = [see(p, c) for p, c in zip(prompts, map(text_of, completions), strict=True)]
        return HashScorer()([p for p, _ in seen], [c for _, c in seen])

    return Opaque(call)


def on_chats(see: Callable[[list[Any]], Any]) -> Opaque:
    """A scorer that does something to prompts that are messages."""
    return hashed(lambda p, c: (see(p) if isinstance(p, list) else p, c))


def amid(text: str) -> str:
    """512 words at most, from both ends."""
    words = text.split()
    return text if len(words) <= 512 else " ".join([*words[:256], *words[-256:]])


@pytest.mark.parametrize(
    ("scorer", "checks"),
    [
        (hashed(lambda p, c: ("", c)), {PROMPT, TURNS}),
        (on_chats(lambda p: p[-1:]), {TURNS}),
        (on_chats(lambda p: p[:1]), {TURNS}),
        (on_chats(lambda p: [m for m in p if m["role"] == "user"]), {TURNS}),
        (hashed(lambda p, c: (p, c.partition(" ")[2] or c)), {ENDS}),
        (hashed(lambda p, c: (p, c.rpartition(" ")[0] or c)), {ENDS}),
        (hashed(lambda p, c: (p if isinstance(p, list) else amid(p), amid(c))), {LONG}),
        (hashed(lambda p, c: ("", amid(f"{p} {c}"))), {LONG}),
    ],
)
def test_a_part_that_is_not_read(scorer, checks):
    """The prompt; turns of a conversation; a word at an end of the completion; the middle of a long text."""
    assert checks <= failed(scorer) <= checks | {DISTINCT, ANSWER, QUESTION, KINDS, ROLES, TALK}


def test_scores_kept_by_completion():
    """A cache that lasts, and forgets what was asked."""
    kept: dict[str, float] = {}

    def cached(prompts, completions):
        for p, c in zip(prompts, completions, strict=True):
            kept.setdefault(text_of(c), HashScorer()([p], [c])[0])
        return [kept[text_of(c)] for c in completions]

    assert {PROMPT, TURNS} <= failed(Opaque(cached))


@pytest.mark.parametrize(
    ("scorer", "check", "unread"),
    [
        (on_chats(lambda p: [m for m in p if m["role"] != "system"]), SYSTEM, "system"),
        (hashed(lambda p, c: (p, c.lower())), LETTERS, "case"),
        (hashed(lambda p, c: (p, c.encode("ascii", "replace").decode())), LETTERS, "accents"),
        (hashed(lambda p, c: (p, c.encode("latin-1", "ignore").decode("latin-1"))), LETTERS, "other alphabets"),
    ],
)
def test_what_a_sound_scorer_may_leave_out(scorer, check, unread):
    """System messages, case, accents, alphabets: no fault, and told."""
    assert check not in failed(scorer)
    assert told(scorer, check).startswith("-: not read")
    assert unread in told(scorer, check)
    assert told(HashScorer(), check) == "ok: "


def test_scorers_that_need_not_read_all():
    """A length, a count of words, one of the completion alone by the user's word, grades, a constant."""
    length = Opaque(lambda p, c: [len(text_of(x)) + 1e-3 * len(str(y)) for x, y in zip(c, p, strict=True)])
    lexicon = Opaque(lambda p, c: [text_of(x).count("e") / (1 + len(text_of(x))) for x in c])
    constant = Opaque(lambda p, c: [0.5] * len(p))
    whole_input = {PROMPT, ENDS, TURNS, SPECIAL}

    assert not whole_input & failed(length)
    assert whole_input & failed(lexicon) == {PROMPT, TURNS}
    assert "reads_prompt=False" in told(lexicon, PROMPT)
    assert not whole_input & failed(lexicon, reads_prompt=False)
    assert not whole_input & (failed(constant) | failed(NumberScorer(), discrete=True))


def test_special_tokens_are_no_fault_where_no_text_moves_the_score():
    """A scorer of the prompt, or of the first word, does not read on behind a special token, nor without one."""
    first = hashed(lambda p, c: (p, c[:5]))

    assert told(first, SPECIAL) == "-: what stands behind them does not move the score without them either"
    assert told(hashed(lambda p, c: (p, c.partition("</s>")[0])), SPECIAL).startswith("FAIL: what stands behind </s>")


# What a call leaves behind.


def grows(prompts, completions):
    """The completion is appended to the messages, and stays there."""
    for p, c in zip(prompts, completions, strict=True):
        if isinstance(p, list):
            p.append({"role": "assistant", "content": text_of(c)})
    return HashScorer()([str(p) for p in prompts], completions)


def sorts(prompts, completions):
    """The list of completions is another one behind the call."""
    scores = HashScorer()(prompts, completions)
    completions.reverse()
    return scores


@pytest.mark.parametrize(("call", "what"), [(grows, "the prompts given"), (sorts, "the completions given")])
def test_inputs_that_are_changed(call, what):
    """Lists and messages are the caller's; no check of other calls is misled by the change."""
    assert failed(Opaque(call), chat=True) & {LEFT, TWICE, ALONE, PERMUTED, AFTER} == {LEFT}
    assert what in told(Opaque(call), LEFT, chat=False)


def test_an_array_that_is_used_again():
    """The scores of one call are overwritten by the next."""
    buffer = np.zeros(4096, np.float32)

    def reusing(prompts, completions):
        buffer[: len(prompts)] = HashScorer()(prompts, completions)
        return buffer[: len(prompts)]

    assert failed(Opaque(reusing)) == {LEFT, THREADS}
    assert "used again" in told(Opaque(reusing), LEFT)


def test_ties_are_named():
    """Two completions that tie are shown; a head of 16 bits is blamed where the scores are of 16 bits alone."""
    by_prompt = Opaque(lambda p, c: HashScorer()(p, [""] * len(p)))

    assert "both get" in told(by_prompt, DISTINCT)
    assert "completion not read" in told(by_prompt, DISTINCT)
    assert "float32" not in told(by_prompt, DISTINCT)
    assert "float32" in told(Opaque(lambda p, c: HashScorer()(p, c).astype(np.float16)), DISTINCT)


# The verdict.


def test_a_table_is_not_printed():
    """A verdict, and a complaint, about a thing with a long repr name its class."""
    assert str(check_picklable(Opaque)) == "Opaque: 1 checks passed"
    assert str(check_picklable(list(range(999)))) == "list(...): 1 checks passed"
    with pytest.raises(AssertionError, match=r"^Falling\(...\) does not rise"):
        check_transform(Falling([0.0] * 999))


@dataclass(frozen=True)
class Falling:
    """A transform that falls, with a table."""

    table: list[float]

    def __call__(self, u: Any, /) -> Any:
        return -np.asarray(u)


def test_all_checks_run_and_are_told():
    """AssertionError with a line for each check, those behind a failed one too."""
    with pytest.raises(AssertionError) as caught:
        check_scorer(Oracle(lambda completions, scores: -scores))
    verdict = str(caught.value)

    lines = [line for line in verdict.splitlines()[1:] if not line.startswith("        -> ")]

    assert len(lines) == len(CHECKS)
    assert all(line.startswith(("  ok    ", "  FAIL  ", "  -     ")) for line in lines)
    assert all(check.name in verdict for check in CHECKS)
    assert "\n        -> is this a cost model? Cost(scorer)" in verdict


def test_a_verdict_names_the_scorer():
    """By its repr; a function by its name; one with a whole model in its repr by its class."""
    assert str(check_scorer(HashScorer(7), sign=False)).startswith("HashScorer(seed=7)\n")
    assert Examination(llama()).title == "SequenceClassifier(...)"
    assert Examination(text_of).title == "text_of"


def test_pairs_of_ones_own():
    """They take the place of the built-in ones, spread evenly where there are many; they must be pairs."""
    seen: list[str] = []

    def recording(prompts, completions):
        seen.extend(completions if len(completions) == 64 else [])
        return HashScorer()(prompts, completions)

    check_scorer(Opaque(recording), ["Hi"] * 190, [f"a{i}" for i in range(190)], sign=False)
    assert seen[:64] == [f"a{3 * i}" for i in range(64)]
    with pytest.raises(ValueError, match="got only one"):
        Examination(HashScorer(), prompts=["a", "b"])
    with pytest.raises(ValueError, match="got 2 prompts and 1 completions"):
        Examination(HashScorer(), ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="tolerance=-1"):
        Examination(HashScorer(), tolerance=-1)


def test_pairs_of_ones_own_that_are_too_long():
    """The first line says how many of them the model does not read whole."""
    pairs = ["Hi", "Hi"], ["word " * 200, "short"]

    assert "1 of 2 inputs" in told(llama(), NUMBER, prompts=pairs[0], completions=pairs[1])


def test_chats_are_asked_where_there_is_a_template():
    """Models with a chat template are asked in messages, others in text; and as the user says."""
    assert isinstance(Examination(llama()).subject.pairs.prompts[0], list)
    assert isinstance(Examination(Cost(llama())).subject.pairs.prompts[0], list)
    assert isinstance(Examination(llama(template=None)).subject.pairs.prompts[0], str)
    assert isinstance(Examination(llama(), chat=False).subject.pairs.prompts[0], str)
    assert isinstance(Examination(HashScorer(), chat=True).subject.pairs.prompts[0], list)


def test_an_error_in_a_check_is_a_finding():
    """Whatever a scorer raises fails the check that met it, by name."""

    def broken(_: Any) -> Outcome:
        raise ZeroDivisionError("of mine")

    assert run_check(Check("mine", broken), Examination(HashScorer()).subject) == ("FAIL", "ZeroDivisionError: of mine")


def test_the_probes():
    """64 pairs, 56 different completions, eight of them twice; bad answers are as often the longer ones."""
    pairs = everyday(chat=False)
    longer = [len(question.bad) > len(question.good) for question in QUESTIONS]

    assert (len(pairs), len(set(pairs.completions))) == (64, 56)
    assert sum(longer) == 4
    assert max(len(p) + len(c) for p, c in zip(pairs.prompts, pairs.completions, strict=True)) < 300


# The public fakes.


def test_hash_scores_are_draws_of_a_normal_distribution():
    """Kolmogorov-Smirnov for completions of one prompt; prompts and seeds are independent; the same in each call."""
    completions = [f"answer {i}" for i in range(2000)]
    scores = np.stack(
        [HashScorer(seed)([prompt] * 2000, completions) for seed, prompt in [(0, "a"), (0, "b"), (1, "a")]]
    )

    assert min(stats.kstest(row, "norm").pvalue for row in scores) > 1e-3
    assert np.abs(np.corrcoef(scores) - np.eye(3)).max() < 0.1
    assert np.array_equal(HashScorer(1)(["a"], [completions[7]]), scores[2, 7:8])
    assert HashScorer(0).fingerprint() != HashScorer(1).fingerprint()


@pytest.mark.parametrize("scorer", [HashScorer(2), NumberScorer(-1.0)])
def test_the_fakes_pickle_and_read_messages(scorer):
    """By value; a completion that is a message has the score of its text; nothing gives nothing."""
    check_picklable(scorer)
    chat = [{"role": "user", "content": "2+2="}]

    assert scorer([chat], ["so 4"]) == scorer([chat], [[{"role": "assistant", "content": "so 4"}]])
    assert scorer([], []).shape == (0,)
    with pytest.raises(ValueError, match="argument 2"):
        scorer(["a", "b"], ["c"])


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        ("4", 4),
        ("-4", -4),
        ("10-4", 4),
        ("x = 1.5.", 1.5),
        ("2e3 ", 2000),
        ("+7 or 8 apples", 8),
        ("none", -1),
        ("", -1),
    ],
)
def test_the_number_in_a_text(completion, number):
    """The last one, with its sign, decimals and exponent; or the default."""
    assert NumberScorer(-1.0)(["?"], [completion]).tolist() == [number]


@dataclass(eq=False)
class SwitchesItself(Naive):
    """BigBird, of which the first short input makes another model, for good."""

    def render(self, prompt: Any, completion: Any) -> str:
        return prompt + completion


def sparse_big_bird() -> Any:
    """Sparse attention above 128 tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 1}
    ids = {"pad_token_id": tiny.PAD, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS, "vocab_size": tiny.VOCABULARY}
    blocks = {"attention_type": "block_sparse", "block_size": 16, "num_random_blocks": 1}
    config = BigBirdConfig(**sizes, **ids, **blocks, max_position_embeddings=8192, num_labels=1)
    model = BigBirdForSequenceClassification(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.5 / weight.shape[-1] ** 0.5)
    return model


def test_a_model_that_changes_itself():
    """BigBird scored as people do is found out by texts that the check brings itself; ours puts it back."""
    assert told(SwitchesItself(sparse_big_bird()), SHORT).startswith("FAIL: ")
    ours = SequenceClassifier(sparse_big_bird(), tiny.tokenizer(template=None), text=Text(max_length=1024))
    assert told(ours, SHORT).startswith("ok")


def test_a_scorer_that_counts_short_texts():
    """A state that the first short text changes for good, of any scorer: the long ones are asked before all checks."""
    short = []

    def changed(prompts, completions):
        short.extend(completion for completion in completions if len(completion) < 10)
        return HashScorer()(prompts, completions) + 10 * np.array([bool(short) and len(p) > 900 for p in prompts])

    assert SHORT in failed(Opaque(changed))
