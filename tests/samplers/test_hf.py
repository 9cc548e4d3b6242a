"""The Hugging Face sampler: the model's own distribution, whatever is written beside it, whatever the architecture."""

import json
import logging
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from architectures import DECODERS, HYBRIDS
from memory import Memory
from scipy import stats
from tiny import EOS, TEMPLATE, causal, classifier, tokenizer
from transformers import AutoModelForCausalLM, MambaConfig, T5Config, T5ForConditionalGeneration
from words import WORDS, ids_of, spread, words

from calibrated_rewards.models.parts import UnreadError
from calibrated_rewards.models.text import Text
from calibrated_rewards.samplers.drawing import processors
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.protocol import Decoding, Particular, Rendering, Rollout, Sampler, sample
from calibrated_rewards.scorers.protocol import Fingerprinted

# The first word ends a completion.
PROMPTS = ["w3 w7 w7 w1 w20 w5 w9 w11", "w8", "w2 w4", "w5 w6 " * 10]
SEEDS = [list(range(9)), list(range(4, 11)), [5, 3], [2**62]]
ALL = {**DECODERS, **HYBRIDS}


def writer(name: str, **options: Any) -> Any:
    """A small model of some architecture that writes words."""
    config = ALL[name].config(**{"vocab_size": WORDS, "eos_token_id": 0, "pad_token_id": 1, **options})
    torch.manual_seed(1)  # `spread` leaves weights of one dimension as they are
    return spread(AutoModelForCausalLM.from_config(config))


def sampler(model: Any, decoding: Decoding | None = None, **options: Any) -> HfSampler:
    options = {"tokenizer": words(), "decoding": decoding or Decoding(12), "show_progress": False, **options}
    return HfSampler(model, **options)


def texts(rollouts: list[list[Rollout]]) -> list[list[Any]]:
    return [[rollout[:3] for rollout in own] for own in rollouts]


def enumerated(model: Any, prompt: list[int], decoding: Decoding) -> dict[tuple[int, ...], float]:
    """The log-probability of every completion, by plain forwards of every beginning and transformers' processors."""
    bend = processors(decoding)
    found: dict[tuple[int, ...], float] = {}
    begun: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(decoding.max_tokens):
        ids = torch.tensor([[*prompt, *beginning] for beginning in begun])
        with torch.no_grad():
            scores = bend(ids, model(input_ids=ids).logits[:, -1]).double().log_softmax(1).tolist()
        begun = {
            (*beginning, token): before + logprob
            for (beginning, before), own in zip(begun.items(), scores, strict=True)
            for token, logprob in enumerate(own)
        }
        found |= {ids: logprob for ids, logprob in begun.items() if ids[-1] == 0}
        begun = {ids: logprob for ids, logprob in begun.items() if ids[-1] != 0}
    return found | begun


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(3),
        Decoding(3, temperature=0.6),
        Decoding(3, top_k=3),
        Decoding(3, top_p=0.8),
        Decoding(3, min_p=0.2, temperature=1.5),
        Decoding(3, repetition_penalty=1.8),
        Decoding(3, temperature=1.4, top_k=5, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    ],
)
def test_completions_have_the_probabilities_that_the_model_gives_them(decoding: Decoding) -> None:
    """Every completion of up to three of six tokens: chi-square over 3,000 draws, and each draw's log-probability."""
    model = spread(causal(vocab_size=6, eos_token_id=0), seed=3)
    rollouts = sampler(model, decoding, tokenizer=words(6))(["w2 w1"], [list(range(3000))])[0]
    expected = enumerated(model, [2, 1], decoding)
    ids = [ids_of(rollout, words(6)) for rollout in rollouts]

    assert [rollout.tokens for rollout in rollouts] == list(map(len, ids))
    assert np.allclose([rollout.logprob for rollout in rollouts], [expected[own] for own in ids], atol=1e-4)
    often = [own for own, logprob in expected.items() if 3000 * np.exp(logprob) >= 5]
    counts, wanted = [ids.count(own) for own in often], [3000 * np.exp(expected[own]) for own in often]
    if (rest := 3000 - sum(wanted)) > 1:
        counts, wanted = [*counts, 3000 - sum(counts)], [*wanted, rest]
    assert sum(counts) == 3000
    assert stats.chisquare(counts, np.array(wanted) * 3000 / sum(wanted)).pvalue > 1e-3


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2", "Bloom", "Qwen3Next"])
def test_a_rollout_is_the_same_whatever_is_written_beside_it(name: str) -> None:
    """Alone, unshared; with others of its prompt; with other prompts, padded: the same tokens, in float32."""
    model = writer(name)
    together = sampler(model)(PROMPTS, SEEDS)
    padded = sampler(model, prompts_at_once=4)
    unshared = sampler(model, share_prefill=False)
    alone = [[unshared([prompt], [[seed]])[0][0] for seed in own] for prompt, own in zip(PROMPTS, SEEDS, strict=True)]

    assert texts(together) == texts(padded(PROMPTS, SEEDS)) == texts(alone)
    assert padded._route.pads
    assert padded._route.shares
    assert padded._route.checked == {(True, True)}


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Qwen3_5"])
def test_log_probabilities_are_those_of_a_plain_forward(name: str) -> None:
    """Of each completion, read whole and alone; past a sliding window, and past others that ended and left."""
    model = writer(name)
    rollouts = sampler(model, Decoding(30), prompts_at_once=2)(PROMPTS, [list(range(12))] * 4)
    lengths = []
    for prompt, own in zip(PROMPTS, rollouts, strict=True):
        for rollout in own:
            read, drawn = words()(prompt)["input_ids"], ids_of(rollout, words())
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*read, *drawn]])).logits[0, len(read) - 1 : -1]
            chosen = logits.double().log_softmax(1)[range(len(drawn)), drawn]
            assert rollout.logprob == pytest.approx(float(chosen.sum()), abs=1e-4)
            lengths.append(len(drawn))
    assert min(lengths) < 20
    assert max(lengths) == 30


def test_more_rollouts_are_those_that_come_next() -> None:
    """16 and then 84 are the 100 that one call gives; small batches change nothing, nor does the order of prompts."""
    model = writer("Llama")
    every = sampler(model)(["w3 w4"], [list(range(100))])[0]
    first, then = sampler(model)(["w3 w4", "w3 w4"], [list(range(16)), list(range(16, 100))])
    small = sampler(model, batch_tokens=200, prompts_at_once=2)(["w9", "w3 w4"], [[7], list(range(100))])[1]

    assert texts([every]) == texts([first + then]) == texts([small])
    assert len({rollout.completion for rollout in every}) > 90


def test_the_other_prompts_do_not_change_a_bit() -> None:
    """With one prompt at a time, not even the last of a log-probability."""
    model = writer("Llama")
    own = sampler(model)(PROMPTS[:1], SEEDS[:1])[0]

    assert sampler(model)(PROMPTS[::-1], SEEDS[::-1])[-1] == own
    assert sampler(model, show_progress=True)(PROMPTS, SEEDS)[0] == own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype) -> None:
    """Heads that share keys read them together: the probabilities are still the model's, as far as 16 bits go."""
    model = writer("Llama").to(dtype)
    rollouts = sampler(model)(PROMPTS[:1], [list(range(20))])[0]
    read = words()(PROMPTS[0])["input_ids"]
    apart = []
    for rollout in rollouts:
        drawn = ids_of(rollout, words())
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*read, *drawn]])).logits[0, len(read) - 1 : -1]
        chosen = logits.double().log_softmax(1)[range(len(drawn)), drawn]
        apart.append(abs(float(chosen.sum()) - (rollout.logprob or 0)) / len(drawn))

    assert np.mean(apart) < 0.02


def test_long_rotary_angles() -> None:
    """From a length on, all angles are others: each token has the probability that the model gives it at its length."""
    rope = {"rope_type": "longrope", "long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
    turn = {"original_max_position_embeddings": 12, "max_position_embeddings": 128}
    model = writer("Phi3", rope_parameters={**rope, "rope_theta": 10_000.0}, **turn)
    rollouts = sampler(model, Decoding(16), prompts_at_once=4)(PROMPTS, [list(range(4))] * 4)
    for prompt, own in zip(PROMPTS, rollouts, strict=True):
        read = list(words()(prompt)["input_ids"])
        for rollout in own:
            total = 0.0
            for token in ids_of(rollout, words()):
                with torch.no_grad():
                    total += float(model(input_ids=torch.tensor([read])).logits[0, -1].double().log_softmax(0)[token])
                read = [*read, token]
            assert rollout.logprob == pytest.approx(total, abs=1e-4)
            read = list(words()(prompt)["input_ids"])


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """How the library's own log lines end."""
    own = [record for record in caplog.records if record.name.startswith("calibrated_rewards")]
    return [record.getMessage().rpartition(": ")[2] for record in own]


class Forgetful:
    """A forward of a model that keeps something beside its cache: it goes wrong where the rows become others."""

    def __init__(self, forward: Any, *, always: bool = False) -> None:
        self.forward, self.always, self.rows = forward, always, 0

    def __call__(self, input_ids: torch.Tensor, past_key_values: Any = None, **options: Any) -> Any:
        """The answer, turned around where the rows are others (or always, behind a cache)."""
        answer = self.forward(input_ids=input_ids, past_key_values=past_key_values, **options)
        if past_key_values is None:
            self.rows = len(input_ids)
        elif self.always or len(input_ids) != self.rows:
            answer.logits = answer.logits.flip(-1)
        return answer


def test_a_model_that_cannot_share_does_not(caplog: pytest.LogCaptureFixture) -> None:
    """Some completions are read again; if they are not the model's, each is written with a prompt of its own."""
    model = writer("Llama")
    plain = sampler(model, share_prefill=False)(PROMPTS, SEEDS)
    model.forward = Forgetful(model.forward)
    found = sampler(model)
    with caplog.at_level(logging.WARNING):
        rollouts = found(PROMPTS, SEEDS)

    assert texts(rollouts) == texts(plain)
    assert not found._route.shares
    assert said(caplog) == ["not sharing"]


def test_a_model_that_is_another_behind_its_cache_is_read_without_it(caplog: pytest.LogCaptureFixture) -> None:
    """Each token takes a reading of the whole row: slow, said once, and what the model gives probability to."""
    model = writer("Llama")
    plain = sampler(model, share_prefill=False)(PROMPTS, SEEDS)
    model.forward = Forgetful(model.forward, always=True)
    with caplog.at_level(logging.WARNING):
        rollouts = sampler(model)(PROMPTS, SEEDS)

    assert texts(rollouts) == texts(plain)
    assert said(caplog) == ["not sharing", "reading whole rows for each token, which is slow"]


class Failing:
    """A forward of a model that raises behind a cache, or where a batch is padded, or whenever it is asked."""

    def __init__(self, forward: Any, where: str) -> None:
        self.forward, self.where = forward, where

    def __call__(self, input_ids: torch.Tensor, past_key_values: Any = None, **options: Any) -> Any:
        """The answer, or the error of a library."""
        mask = options.get("attention_mask")
        padded = mask is not None and not bool(mask.all())
        if {"always": True, "padded": padded, "cached": past_key_values is not None}[self.where]:
            raise RuntimeError("The size of tensor a (77) must match the size of tensor b (33)")
        return self.forward(input_ids=input_ids, past_key_values=past_key_values, **options)


@pytest.mark.parametrize(
    ("where", "lines"),
    [
        ("cached", ["not padding", "not sharing", "reading whole rows for each token, which is slow"]),
        ("padded", ["not padding"]),
    ],
)
def test_a_model_that_fails_where_it_is_padded_or_cached_is_not(
    where: str, lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """What can be given up is given up, one by one, and logged with the library's error."""
    model = writer("Llama")
    plain = sampler(model)(PROMPTS, SEEDS)
    model.forward = Failing(model.forward, where)
    with caplog.at_level(logging.WARNING):
        rollouts = sampler(model, prompts_at_once=4)(PROMPTS, SEEDS)

    assert texts(rollouts) == texts(plain)
    assert said(caplog) == lines
    assert "fails (The size of tensor a (77)" in caplog.text


def test_a_model_that_cannot_be_read_is_refused() -> None:
    """With the library's error, in a sentence that says what to do; before any prompt is read."""
    model = writer("Llama")
    model.forward = Failing(model.forward, "always")

    with pytest.raises(UnreadError, match=r"LlamaForCausalLM does not read an input of \d tokens: .*tensor a \(77\)"):
        sampler(model).try_out()


def test_a_model_that_padding_disturbs_is_not_padded(caplog: pytest.LogCaptureFixture) -> None:
    """Mamba in transformers reads what is masked, too."""
    small = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "eos_token_id": 0, "pad_token_id": 1}
    model = spread(AutoModelForCausalLM.from_config(MambaConfig(**small)))
    found = sampler(model, prompts_at_once=4)
    with caplog.at_level(logging.WARNING):
        rollouts = found(PROMPTS, SEEDS)

    assert texts(rollouts) == texts(sampler(model)(PROMPTS, SEEDS))
    assert (found._route.shares, found._route.pads) == (True, False)
    assert said(caplog) == ["not padding"]


@pytest.mark.parametrize("share", [True, False])
def test_padding_is_judged_by_rows_that_are_padded(share: bool, caplog: pytest.LogCaptureFixture) -> None:
    """All completions are as long, and those of the longest prompt, which is not padded, come first."""
    small = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "eos_token_id": 0, "pad_token_id": 1}
    model, tokenizer = spread(AutoModelForCausalLM.from_config(MambaConfig(**small))), words()
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    options, seeds = {"tokenizer": tokenizer, "share_prefill": share}, [range(5)] * len(PROMPTS)
    with caplog.at_level(logging.WARNING):
        rollouts = sampler(model, Decoding(3), prompts_at_once=4, **options)(PROMPTS, seeds)

    assert {rollout.finish for own in rollouts for rollout in own} == {"length"}
    assert texts(rollouts) == texts(sampler(model, Decoding(3), **options)(PROMPTS, seeds))
    assert said(caplog) == ["not padding"]


class Broken:
    """A forward of a model that gives nan: always, or where a batch is padded, or without a cache."""

    def __init__(self, forward: Any, where: str) -> None:
        self.forward, self.where = forward, where

    def __call__(self, attention_mask: torch.Tensor | None = None, **options: Any) -> Any:
        """The answer, or nan in its place."""
        answer = self.forward(attention_mask=attention_mask, **options)
        padded = attention_mask is not None and not bool(attention_mask.all())
        if {"always": True, "padded": padded, "plain": options.get("use_cache") is False}[self.where]:
            answer.logits = answer.logits * torch.nan
        return answer


@pytest.mark.parametrize("where", ["always", "plain"])
def test_a_model_that_gives_nan_is_refused(where: str) -> None:
    """By that name, with its dtype and a prompt; it is not the cache's fault."""
    model = writer("Llama")
    model.forward = Broken(model.forward, where)

    with pytest.raises(FloatingPointError, match=r"nan .*LlamaForCausalLM in torch.float32: .*--policy-dtype.*'w3 w7"):
        sampler(model)(PROMPTS, SEEDS)


def test_a_model_that_gives_nan_where_it_is_padded_is_not_padded(caplog: pytest.LogCaptureFixture) -> None:
    """What it gives alone is whole."""
    model = writer("Llama")
    plain = sampler(model)(PROMPTS, SEEDS)
    model.forward = Broken(model.forward, "padded")
    with caplog.at_level(logging.WARNING):
        rollouts = sampler(model, prompts_at_once=4)(PROMPTS, SEEDS)

    assert texts(rollouts) == texts(plain)
    assert said(caplog) == ["not padding"]


def test_each_prompt_needs_its_seeds() -> None:
    """Else those that have none would be left out, unsaid."""
    with pytest.raises(ValueError, match="got 3 prompts and seeds for 1"):
        sampler(writer("Llama"))(PROMPTS[:3], SEEDS[:1])


def test_where_memory_does_not_suffice_batches_are_halved(caplog: pytest.LogCaptureFixture) -> None:
    """The completions are the same, and the next batches are small from the start."""
    model, sizes, seeds = writer("Llama"), list[int](), list(range(40))
    expected = sampler(model)(["w8", "w9"], [seeds] * 2)
    model.get_input_embeddings().register_forward_pre_hook(Memory(12, sizes))
    rollouts = sampler(model)(["w8", "w9"], [seeds] * 2)

    assert texts(rollouts) == texts(expected)
    # The second prompt's batches are of ten from the start.
    assert re.findall(r"with (\d+) inputs", caplog.text) == ["40", "20", "20"]
    assert sum(size > 12 for size in sizes) == 3


def test_completions_that_begin_alike_are_read_once() -> None:
    """Each step reads as many rows as there are different beginnings, until all completions have parted."""
    model, sizes = writer("Llama"), list[int]()
    write = sampler(model, Decoding(5))
    whole = [each.finish == "length" for each in write(["w8"], [list(range(60))])[0]]
    seeds = [seed for seed in range(60) if whole[seed]]
    model.get_input_embeddings().register_forward_pre_hook(Memory(10**9, sizes))
    rollouts = write(["w8"], [seeds])[0]
    rows = [rollout.completion.split() for rollout in rollouts]
    assert {len(row) for row in rows} == {5}
    beginnings = [len({tuple(row[:length]) for row in rows}) for length in range(5)]
    assert sizes == beginnings
    assert beginnings[1] < len(rows)  # some do begin alike


def test_rows_that_ended_leave_the_batch() -> None:
    """What is read gets less while completions end."""
    model, sizes = writer("Llama"), list[int]()
    model.get_input_embeddings().register_forward_pre_hook(Memory(10**9, sizes))
    rollouts = sampler(model, Decoding(40))(["w8"], [list(range(30))])[0]
    drawn = sum(rollout.tokens or 0 for rollout in rollouts)

    assert sum(rollout.finish == "stop" for rollout in rollouts) > 15
    # The prompt, one row; what is compared afterwards; and not much more than what was drawn.
    assert drawn - 30 <= sum(sizes) < 1.2 * drawn + 200


@pytest.mark.parametrize("stop", [("w5",), ("w5 w5", "w11")])
def test_stop_texts(stop: tuple[str, ...]) -> None:
    """The completion without them is how the one begins that nothing stops."""
    model = writer("Llama")
    free = sampler(model, Decoding(25))(["w8"], [list(range(20))])[0]
    stopped = sampler(model, Decoding(25, stop=stop))(["w8"], [list(range(20))])[0]

    cut = 0
    for a, b in zip(free, stopped, strict=True):
        at = min((i for i in (str(a.completion).find(text) for text in stop) if i >= 0), default=None)
        assert b.completion == (a.completion if at is None else str(a.completion)[:at])
        assert b.finish == (a.finish if at is None else "stop")
        cut += at is not None
    assert cut > 0


def test_end_tokens_are_the_trainers() -> None:
    """The generation config's, the tokenizer's and those asked for; a completion goes up to the first of them."""
    model = writer("Llama")
    model.generation_config.eos_token_id = [4, 0]
    rollouts = sampler(model, Decoding(25, stop_token_ids=(6,)))(["w8"], [list(range(40))])[0]
    plain = sampler(writer("Llama"), Decoding(25), tokenizer=words())(["w8"], [list(range(40))])[0]

    for a, b in zip(rollouts, plain, strict=True):
        whole = ids_of(b, words())
        first = next((i for i, token in enumerate(whole) if token in (0, 4, 6)), len(whole))
        assert words()(a.completion)["input_ids"] == list(whole[:first])
        assert a.finish == ("stop" if first < len(whole) else "length")


def test_prompts_are_read_as_a_trainer_reads_them() -> None:
    """Messages through the chat template, ready for the answer; text with the tokenizer's special tokens."""
    found, chat = sampler(causal(), tokenizer=tokenizer()), [{"role": "user", "content": "Hi"}]
    templated = tokenizer().apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    own = HfSampler(causal(), tokenizer(), Decoding(5), Text(chat=True, append_eos=True))

    assert found._policy.ids([chat, "Hi"]) == [templated["input_ids"], tokenizer()("Hi")["input_ids"]]
    assert found.rendered(chat) == tokenizer().apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert found.rendered("Hi") == "Hi"
    assert own._policy.ids(["Hi"]) == [templated["input_ids"]]


def test_prompts_that_cannot_be_completed_are_refused_before() -> None:
    """By check, and by a call: without tokens, too long, of another tokenizer, or not for the template."""
    model = causal(max_position_embeddings=30)
    found = sampler(model, Decoding(20), tokenizer=tokenizer(bos=False, template=None))

    found.check(["ten tokens"])
    with pytest.raises(ValueError, match="needs at least one token, got none for ''"):
        found.check(["fine", ""])
    with pytest.raises(
        ValueError, match=r"at most 30 tokens, got 11 and max_tokens=20 for 'eleven more': leave it out"
    ):
        found.check(["fine", "eleven more"])
    with pytest.raises(ValueError, match="at most 30 tokens"):
        found(["eleven more"], [[1]])
    with pytest.raises(ValueError, match="no chat template"):
        found.check([[{"role": "user", "content": "Hi"}]])
    with pytest.raises(ValueError, match="at least one message"):
        sampler(causal(), tokenizer=tokenizer()).check([[]])
    with pytest.raises(ValueError, match="another model's tokenizer"):
        sampler(causal(vocab_size=20), tokenizer=tokenizer()).check(["Hi"])


def test_models_that_cannot_write_are_refused() -> None:
    """A reward model, and an encoder-decoder."""
    t5 = T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)

    with pytest.raises(TypeError, match="LlamaForSequenceClassification, which has no output layer"):
        sampler(classifier())
    with pytest.raises(TypeError, match="T5ForConditionalGeneration, which is an encoder-decoder"):
        sampler(T5ForConditionalGeneration(t5))
    with pytest.raises(ValueError, match="prompts_at_once >= 1, got prompts_at_once=0"):
        sampler(causal(), prompts_at_once=0)
    with pytest.raises(ValueError, match="batch_tokens >= 1, got batch_tokens=0"):
        sampler(causal(), batch_tokens=0)


def test_the_fingerprint_is_of_all_that_matters() -> None:
    """Model, tokenizer, how text is read, how tokens are drawn, what ends; not of batches."""
    model = causal()
    found = sampler(model, tokenizer=tokenizer()).fingerprint()
    ends = causal()
    ends.generation_config.eos_token_id = [EOS, 5]
    others = [
        sampler(causal(seed=1), tokenizer=tokenizer()),
        sampler(model, tokenizer=tokenizer(bos=False)),
        sampler(model, tokenizer=tokenizer(template=TEMPLATE + " ")),
        sampler(model, tokenizer=tokenizer(), text=Text(chat=True)),
        sampler(model, Decoding(12, temperature=0.9), tokenizer=tokenizer()),
        sampler(ends, tokenizer=tokenizer()),
    ]

    assert json.loads(json.dumps(found)) == found
    assert found == sampler(causal(), tokenizer=tokenizer(), batch_tokens=99, prompts_at_once=3).fingerprint()
    assert all(other.fingerprint() != found for other in others)


def test_it_is_a_sampler() -> None:
    """It has what the protocols ask for, is not pickled with its weights, and leaves the model as it was."""
    model = writer("Llama").train()
    found = sampler(model)
    rollouts = sample(found, ["w8", "w9"], [[1, 2], []])

    assert [len(own) for own in rollouts] == [2, 0]
    assert found([], []) == []
    assert all(isinstance(found, each) for each in (Sampler, Particular, Rendering, Fingerprinted))
    assert model.training
    assert not model.lm_head._forward_pre_hooks
    with pytest.raises(TypeError, match="load_sampler"):
        pickle.dumps(found)
