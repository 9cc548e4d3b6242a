"""Every architecture: the scores are those of the model's own forward, one unpadded row at a time."""

import inspect
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from architectures import (
    ALL,
    DECODERS,
    DISTURBED_BY_PADDING,
    ENCODERS,
    HYBRIDS,
    POSITIONS,
    SEQUENCE_TO_SEQUENCE,
    WINDOW,
    Architecture,
    one_by_one,
)
from tiny import BOS, EOS, PAD, VOCABULARY, saved, texts, tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from calibrated_rewards.models.labels import Difference, Expected, Label
from calibrated_rewards.models.own_forward import OwnForward
from calibrated_rewards.models.parts import positions_of
from calibrated_rewards.models.shared_prefix import Decoder, Sharing
from calibrated_rewards.models.text import Text, TruncationWarning
from calibrated_rewards.scorers.classifiers import SequenceClassifier

# The issue's bar: parts of the scores' standard deviation, in float32.
NEAR = 1e-4

# Four completions each of three prompts, all longer than the sliding windows, and of many lengths.
PROMPTS = [prompt * 3 for prompt in texts(3, seed=1, longest=27) for _ in range(4)]
COMPLETIONS = texts(12, seed=2)
ORDER = np.random.default_rng(0).permutation(12)
PROMPTS, COMPLETIONS = [PROMPTS[i] for i in ORDER], [COMPLETIONS[i] for i in ORDER]

# Architectures that look a position up in a table: one more than they have is an error.
TABLES = ["GPT2", "OPT", "Bert", "Roberta", "XLMRoberta", "DistilBert", "Electra", "Bart", "FNet"]


def rows(prompts: list[str] = PROMPTS, completions: list[str] = COMPLETIONS, *, eos: bool = False) -> list[list[int]]:
    """The ids of the texts, by the tokenizer alone: it puts BOS first."""
    found = tokenizer()([p + c for p, c in zip(prompts, completions, strict=True)])["input_ids"]
    return [[*row, EOS] for row in found] if eos else found


def ends(name: str) -> bool:
    """Whether the model is read at EOS."""
    return name in SEQUENCE_TO_SEQUENCE


def scorer(model: Any, *, side: str = "right", text: Text | None = None, **options: Any) -> SequenceClassifier:
    text = text or Text(append_eos=model.config.is_encoder_decoder)
    return SequenceClassifier(model, tokenizer(side=side), text=text, show_progress=False, **options)


def sd_apart(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, in standard deviations."""
    assert found.shape == expected.shape
    return float((np.abs(found - expected) / expected.std(0)).max())


def test_the_prompts_are_longer_than_the_windows() -> None:
    """What these texts have to be for the tests to mean something."""
    assert min(map(len, PROMPTS)) > WINDOW
    assert max(map(len, rows(eos=True))) <= POSITIONS
    assert len(set(map(len, rows()))) >= 8


@pytest.mark.parametrize("name", ALL)
def test_a_mixed_batch_is_the_models_own_forward(name: str) -> None:
    """Rows of many lengths in one batch, prompts shared or not, either padding side: as alone and unpadded."""
    model = ALL[name].classifier()
    expected = one_by_one(model, rows(eos=ends(name)))

    for side in ("left", "right"):
        found = scorer(model, side=side).logits(PROMPTS, COMPLETIONS)
        assert sd_apart(found, expected) < NEAR
    plain = scorer(model, share_prefixes=False).logits(PROMPTS, COMPLETIONS)
    assert sd_apart(plain, expected) < NEAR


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_share_prefixes(name: str) -> None:
    """They are read through their body, and the first group's check lets prefixes be shared."""
    made = scorer(DECODERS[name].classifier())
    made(PROMPTS, COMPLETIONS)

    assert isinstance(made._reader, Decoder)
    assert made._reader.sharing == Sharing(allowed=True, checked=True)


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_read_each_row_whole(name: str) -> None:
    """A recurrent state cannot be viewed as many: not shared, without being told so, and without a warning."""
    made = scorer(HYBRIDS[name].classifier())
    made(PROMPTS, COMPLETIONS)

    assert isinstance(made._reader, Decoder)
    assert made._reader.sharing == Sharing(allowed=False, checked=True)


@pytest.mark.parametrize("name", [*ENCODERS, *SEQUENCE_TO_SEQUENCE])
def test_encoders_run_their_own_forward(name: str) -> None:
    """In padded batches."""
    made = scorer(ALL[name].classifier())
    made(PROMPTS, COMPLETIONS)

    assert isinstance(made._reader, OwnForward)
    assert made._reader.padding.allowed
    assert len(made._reader.padding.lengths) > 0


@pytest.mark.parametrize("name", DISTURBED_BY_PADDING)
def test_padding_that_disturbs_is_found(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The model's own padded batch gives other scores than its rows alone; that is noticed, said, and not done."""
    model = ALL[name].classifier()
    ids = rows()
    longest = max(map(len, ids))
    padded = torch.tensor([row + [PAD] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    with torch.no_grad():
        own = model(input_ids=padded, attention_mask=mask).logits.numpy()
    made = scorer(model)
    made(PROMPTS, COMPLETIONS)

    assert sd_apart(own, one_by_one(model, ids)) > 100 * NEAR
    assert isinstance(made._reader, OwnForward)
    assert not made._reader.padding.allowed
    assert "not padding" in caplog.text


@pytest.mark.parametrize("name", ALL)
def test_the_longest_input_runs(name: str) -> None:
    """The default limit is what the model has positions for; an input of exactly that many tokens gives its score."""
    model = ALL[name].classifier()
    pad = model.config.pad_token_id
    expected = {"Roberta": POSITIONS - pad - 1, "XLMRoberta": POSITIONS - pad - 1}
    without = {"T5", "XLNet", "Funnel"}
    assert positions_of(model) == (None if name in without else expected.get(name, POSITIONS))

    length = positions_of(model) or POSITIONS
    made = scorer(model, text=Text(append_eos=ends(name), max_length=length if name in without else None))
    body = "abcdefgh" * 40
    whole = rows([body], [""], eos=ends(name))[0]
    kept = [BOS, *whole[len(whole) - length + 1 :]]
    with pytest.warns(TruncationWarning, match=f"max_length={length} "):
        found = made.logits([body, "short"], ["", ""])
    assert len(kept) == length
    np.testing.assert_allclose(found[:1], one_by_one(model, [kept]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TABLES)
def test_the_limit_is_not_too_low(name: str) -> None:
    """One token more than that is an error of the model's."""
    model = ALL[name].classifier()
    length = positions_of(model)
    assert length is not None

    assert np.isfinite(one_by_one(model, [[5] * (length - 1) + [EOS]])).all()
    with pytest.raises((IndexError, RuntimeError)):
        one_by_one(model, [[5] * length + [EOS]])


@pytest.mark.parametrize("name", ["Llama", "GPT2", "OPT", "Bert", "T5"])
def test_several_labels(name: str) -> None:
    """Each label's number is the model's own, on either route; `labels` makes one score of them."""
    model = ALL[name].classifier(num_labels=3)
    expected = one_by_one(model, rows(eos=ends(name)))

    found = scorer(model, labels=Label(2))
    assert sd_apart(found.logits(PROMPTS, COMPLETIONS), expected) < NEAR
    assert sd_apart(found(PROMPTS, COMPLETIONS), expected[:, 2]) < NEAR
    weights = torch.tensor(expected).softmax(-1)
    mean = scorer(model, labels=Expected((1, 2, 3)))(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(mean, weights @ torch.tensor([1.0, 2.0, 3.0]), rtol=1e-4)


def test_the_labels_that_need_no_word() -> None:
    """One label is the score; of two, the second's log-odds; of more, the user has to say."""
    two = ALL["Llama"].classifier(num_labels=2)
    expected = torch.tensor(one_by_one(two, rows())).log_softmax(-1)

    assert scorer(ALL["Llama"].classifier())._labels == Label(0)
    assert scorer(two)._labels == Difference(good=1, bad=0)
    found = scorer(two)(PROMPTS, COMPLETIONS)
    assert sd_apart(found, (expected[:, 1] - expected[:, 0]).numpy()) < NEAR
    with pytest.raises(ValueError, match=r"the model has 3 labels, .* say how they make one score"):
        scorer(ALL["Llama"].classifier(num_labels=3))(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize("batch_tokens", [1, 100, 300, 10_000])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen3Next", "Bert", "T5", "XLNet"])
def test_the_batches_do_not_matter(name: str, batch_tokens: int) -> None:
    """A row to a batch, or all rows in one."""
    model = ALL[name].classifier()

    found = scorer(model, batch_tokens=batch_tokens)(PROMPTS, COMPLETIONS)
    assert sd_apart(found, one_by_one(model, rows(eos=ends(name)))[:, 0]) < NEAR


def test_order_repetition_and_company() -> None:
    """A pair's score depends on the pair alone: permuted, repeated, called one by one, or in a call of none."""
    made = scorer(ALL["Llama"].classifier())
    scores = made(PROMPTS, COMPLETIONS)

    backwards = made(PROMPTS[::-1], COMPLETIONS[::-1])[::-1]
    twice = made(PROMPTS * 2, COMPLETIONS * 2)
    alone = np.concatenate([made([p], [c]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    assert max(sd_apart(x, scores) for x in (backwards, twice[:12], twice[12:], alone)) < NEAR
    empty = made([], [])
    assert (empty.shape, empty.dtype) == ((0,), np.float32)


PADDING_IDS = {"none": None, "eos": EOS, "a letter": 100, "minus one": -1, "one too many": VOCABULARY, "more": 50_257}


@pytest.mark.parametrize("pad", PADDING_IDS.values(), ids=PADDING_IDS)
@pytest.mark.parametrize("name", ["Llama", "GPT2", "OPT", "Bloom"])
def test_any_padding_id(name: str, pad: int | None) -> None:
    """A decoder is read where its own forward reads a row that is alone, whatever its padding id, in it or not."""
    model = DECODERS[name].classifier()
    model.config.pad_token_id = pad
    completions = [c + "</s>" if i % 3 == 0 else c for i, c in enumerate(COMPLETIONS)]
    made = scorer(model)

    assert sd_apart(made.logits(PROMPTS, completions), one_by_one(model, rows(PROMPTS, completions))) < NEAR
    assert isinstance(made._reader, Decoder)


@pytest.mark.parametrize("name", ["Bert", "T5", "FNet"])
def test_no_padding_id_elsewhere(name: str) -> None:
    """Without one, or with one of another model, encoders still give what they give alone."""
    for pad in (None, -1, VOCABULARY):
        model = ALL[name].classifier()
        model.config.pad_token_id = pad if name != "T5" else pad or VOCABULARY  # T5's own forward asks for one
        found = scorer(model)(PROMPTS, COMPLETIONS)
        assert sd_apart(found, one_by_one(model, rows(eos=ends(name)))[:, 0]) < NEAR


def test_where_a_decoder_is_read() -> None:
    """With a padding id that is EOS, the model's forward looks at the token before EOS; `pool="last"` at EOS itself."""
    model = ALL["Llama"].classifier()
    model.config.pad_token_id = EOS
    ended = rows(eos=True)
    completions = [c + "</s>" for c in COMPLETIONS]
    model_pools = scorer(model)(PROMPTS, completions)
    last = scorer(model, pool="last")(PROMPTS, completions)

    # Causal: what is read at the token before does not see EOS.
    assert sd_apart(model_pools, one_by_one(model, rows())[:, 0]) < NEAR
    with torch.no_grad():
        states = [model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in ended]
        assert sd_apart(last, torch.stack([model.score(state)[0] for state in states]).numpy()) < NEAR
    assert np.abs(last - model_pools).min() > 0.01


def test_pools_that_there_are_not() -> None:
    """Another word is refused, and so is a position for a model that is not read at one."""
    made = scorer(ALL["Llama"].classifier())
    object.__setattr__(made, "pool", "mean")
    with pytest.raises(ValueError, match="needs pool to be 'model' or 'last', got pool='mean'"):
        made.__post_init__()
    with pytest.raises(
        ValueError, match="pool='last' needs a decoder with one head, got BertForSequenceClassification"
    ):
        scorer(ALL["Bert"].classifier(), pool="last")(["a"], ["b"])


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_as_many_ends_as_a_text_has(name: str) -> None:
    """Encoder-decoders refuse batches whose rows have EOS unequally often: those come apart; none is an error."""
    model = ALL[name].classifier()
    completions = [c + "</s>" * (i % 3) + "ab" * (i % 2) for i, c in enumerate(COMPLETIONS)]
    ids = [row if row[-1] == EOS else [*row, EOS] for row in rows(PROMPTS, completions)]
    assert len({row.count(EOS) for row in ids}) > 1

    assert sd_apart(scorer(model).logits(PROMPTS, completions), one_by_one(model, ids)) < NEAR
    with pytest.raises(
        ValueError, match=r"is read at its EOS token, got an input without id 2; Text\(append_eos=True\)"
    ):
        scorer(model, text=Text())(["a"], ["b"])


def test_two_sets_of_angles() -> None:
    """LongRoPE turns a whole batch as its longest row: rows on both sides of the threshold do not meet."""
    threshold = 76
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    model = Architecture(
        "Phi3",
        {
            **DECODERS["Phi3"].options,
            "rope_parameters": {**rope, "original_max_position_embeddings": threshold},
            "original_max_position_embeddings": threshold,
        },
    ).classifier()
    lengths = list(map(len, rows()))
    groups = [{n > threshold for n, p in zip(lengths, PROMPTS, strict=True) if p == prompt} for prompt in set(PROMPTS)]
    assert {True, False} in groups

    made = scorer(model)
    expected = one_by_one(model, rows())
    assert sd_apart(made.logits(PROMPTS, COMPLETIONS), expected) < NEAR
    assert made._reader.sharing == Sharing(allowed=True, checked=True)
    longest = max(range(12), key=lengths.__getitem__)
    beside = torch.tensor([row + [PAD] * (lengths[longest] - len(row)) for row in rows()])
    with torch.no_grad():
        assert sd_apart(model(beside, attention_mask=(beside != PAD).long()).logits.numpy(), expected) > 1000 * NEAR


@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_a_training_loop_around_it(name: str) -> None:
    """Dropout, autocast and gradients of the caller do not reach the scores, and are as before afterwards."""
    dropout = {"attention_dropout": 0.5} if name == "Llama" else {"hidden_dropout_prob": 0.5}
    model = ALL[name].classifier(**dropout)
    made = scorer(model)
    expected = one_by_one(model, rows())[:, 0]
    model.train()
    still = next(part for part in model.modules() if not list(part.children()))
    still.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = made(PROMPTS, COMPLETIONS)
        with torch.no_grad():
            assert model(torch.tensor([[5, 6]])).logits.dtype == torch.bfloat16

    assert sd_apart(found, expected) < NEAR
    assert [part for part in model.modules() if not part.training] == [still]
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.startswith("score"))


def test_training_mode_after_an_error() -> None:
    """What raises in the middle leaves the model as it was."""
    model = ALL["Llama"].classifier().train()
    with pytest.raises(ValueError, match="the model reads at most 128 tokens"):
        scorer(model, text=Text(max_length=1000))(["a"], ["b"])
    model.model.layers[0].register_forward_pre_hook(refuse)
    with pytest.raises(ZeroDivisionError):
        scorer(model)(["a"], ["b"])

    assert all(part.training for part in model.modules())


def refuse(*_: Any) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_threads(name: str) -> None:
    """Four threads at once, two scorers of one model in training mode: each gets its own scores, no dropout."""
    dropout = {"attention_dropout": 0.5} if name == "Llama" else {"hidden_dropout_prob": 0.5}
    model = ALL[name].classifier(**dropout)
    expected = one_by_one(model, rows())[:, 0]
    model.train()
    both = [scorer(model), scorer(model)]
    parts = [slice(i, i + 6) for i in range(0, 7, 2)]
    gate = threading.Barrier(4)

    def work(i: int) -> np.ndarray:
        gate.wait()
        return np.stack([both[(i + k) % 2](PROMPTS[parts[i]], COMPLETIONS[parts[i]]) for k in range(3)])

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    for part, scores in zip(parts, found, strict=True):
        assert np.abs(scores - expected[part]).max() < NEAR * expected.std()
    assert all(part.training for part in model.modules())


def test_a_head_in_float32_has_no_ties() -> None:
    """A bfloat16 model's own logits take few values; ours are its hidden states through a float32 head, distinct."""
    model = ALL["Llama"].classifier().to(torch.bfloat16)
    prompts, completions = ["abc"] * 200, texts(200, seed=3)
    ids = rows(prompts, completions)
    with torch.no_grad():
        own = [float(model(torch.tensor([row])).logits) for row in ids]
        states = torch.stack([model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in ids])
        by_hand = (states.float() @ model.score.weight.float().T)[:, 0].numpy()
    found = scorer(model, batch_tokens=1, share_prefixes=False)(prompts, completions)

    assert len(set(own)) < 0.95 * len(set(map(tuple, ids)))
    assert len(set(found)) == len(set(map(tuple, states.tolist())))
    np.testing.assert_allclose(found, by_hand, rtol=0, atol=1e-5 * by_hand.std())
    batched = scorer(model)(prompts, completions)
    assert np.corrcoef(batched, found)[0, 1] > 0.999
    assert model.score.weight.dtype == torch.bfloat16


def test_a_float32_head_on_a_bfloat16_body() -> None:
    """What the model's own forward cannot run (float32 head, bfloat16 body) is read all the same."""
    model = ALL["Llama"].classifier().to(torch.bfloat16)
    expected = scorer(model, batch_tokens=1)(PROMPTS, COMPLETIONS)
    model.score.float()
    encoder = ALL["Bert"].classifier().to(torch.bfloat16)
    of_encoder = scorer(encoder, batch_tokens=1)(PROMPTS, COMPLETIONS)
    encoder.classifier.float()

    np.testing.assert_array_equal(scorer(model, batch_tokens=1)(PROMPTS, COMPLETIONS), expected)
    np.testing.assert_array_equal(scorer(encoder, batch_tokens=1)(PROMPTS, COMPLETIONS), of_encoder)


def test_ids_beyond_the_vocabulary() -> None:
    """The tokenizer of another model is an error that says so, not an index out of range."""
    short = ALL["Llama"].classifier(vocab_size=200)
    with pytest.raises(ValueError, match=r"the tokenizer gives id 2\d\d, the reward model has 200 embeddings"):
        scorer(short)(["a"], ["\n~é"])
    wide = ALL["Bert"].classifier(vocab_size=200)
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        scorer(wide)(["a"], ["\n~é"])


@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_out_of_memory(name: str) -> None:
    """Batches that do not fit are halved until they do; the budget stays small, the scores are the same."""
    model = ALL[name].classifier()
    expected = one_by_one(model, rows())[:, 0]
    sizes: list[int] = []
    made = scorer(model, share_prefixes=False, batch_tokens=12 * max(map(len, rows())))
    assert isinstance(made._reader, Decoder | OwnForward)  # it reads its probes before the memory is gone
    model.get_input_embeddings().register_forward_pre_hook(Memory(400, sizes))
    found = made(PROMPTS, COMPLETIONS)

    assert max(sizes) > 800
    assert sd_apart(found, expected) < NEAR
    assert 200 <= made._reader.budget.tokens <= 400
    del sizes[:]
    made(PROMPTS, COMPLETIONS)
    assert max(sizes) <= 400


def test_one_row_that_does_not_fit() -> None:
    """There is nothing to halve: the error is the caller's."""
    model = ALL["Llama"].classifier()
    made = scorer(model)
    assert isinstance(made._reader, Decoder)
    model.get_input_embeddings().register_forward_pre_hook(Memory(20, []))

    with pytest.raises(torch.OutOfMemoryError):
        made(["abcdefgh" * 5], ["abc"])
    assert np.isfinite(made(["abc"], ["abc"])).all()


class Memory:
    """An embedding layer's hook: so many tokens fit, padding included."""

    def __init__(self, fits: int, sizes: list[int]) -> None:
        self.fits, self.sizes = fits, sizes

    def __call__(self, _: Any, args: tuple[torch.Tensor, ...]) -> None:
        """Fail if there are more."""
        self.sizes.append(args[0].numel())
        if args[0].numel() > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")


def test_chats_are_rendered_once() -> None:
    """Messages, a string completion and a message completion go through the template; its BOS is the only one."""
    model = ALL["Llama"].classifier()
    chat = [{"role": "user", "content": "abc"}]
    text = "<s><|user|>abc<|end|><|assistant|>de<|end|>"
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert ids.count(BOS) == 1

    made = scorer(model)
    found = made([chat, chat], ["de", [{"role": "assistant", "content": "de"}]])
    np.testing.assert_allclose(found, one_by_one(model, [ids, ids])[:, 0], atol=1e-5)
    doubled = scorer(model, text=Text(special_tokens=True))([chat], ["de"])
    np.testing.assert_allclose(doubled, found[:1], atol=1e-5)


def test_the_fingerprint_says_what_scores_depend_on(tmp_path: Any) -> None:
    """A saved and loaded model has the same; another weight, config, label, pool, text or tokenizer has not."""
    model = ALL["Llama"].classifier()
    made = scorer(model, labels=Label(0))
    loaded = AutoModelForSequenceClassification.from_pretrained(saved(model, tmp_path, made.tokenizer))
    again = SequenceClassifier(loaded, AutoTokenizer.from_pretrained(tmp_path), labels=Label(0))
    assert json.loads(json.dumps(made.fingerprint())) == json.loads(json.dumps(again.fingerprint()))
    loaded.config.use_cache = False
    loaded.train()
    assert again.fingerprint() == made.fingerprint()

    other = [
        scorer(ALL["Llama"].classifier(seed=1), labels=Label(0)),
        scorer(ALL["Llama"].classifier(rms_norm_eps=1e-3), labels=Label(0)),
        scorer(ALL["Llama"].classifier(rope_parameters={"rope_type": "default", "rope_theta": 500.0}), labels=Label(0)),
        scorer(ALL["Llama"].classifier(pad_token_id=EOS), labels=Label(0)),
        scorer(model, labels=Label(-1)),
        scorer(model, labels=Label(0), pool="last"),
        scorer(model, labels=Label(0), text=Text(append_eos=True)),
        scorer(model, labels=Label(0), text=Text(max_length=100)),
        SequenceClassifier(model, tokenizer(bos=False), labels=Label(0)),
        SequenceClassifier(model, tokenizer(template="{{ messages }}"), labels=Label(0)),
        scorer(ALL["Llama"].classifier().to(torch.bfloat16), labels=Label(0)),
    ]
    said = {json.dumps(each.fingerprint(), sort_keys=True) for each in [made, *other]}
    assert len(said) == len(other) + 1


@pytest.mark.parametrize("name", [*ENCODERS, *SEQUENCE_TO_SEQUENCE, *HYBRIDS, "Llama", "Gemma3", "OPT", "Qwen2Moe"])
def test_sixteen_bits(name: str) -> None:
    """A bfloat16 model is near its own forward, whose 16-bit head and other batch shapes round otherwise."""
    model = ALL[name].classifier().to(torch.bfloat16)
    own = one_by_one(model, rows(eos=ends(name)))[:, 0]
    found = scorer(model)(PROMPTS, COMPLETIONS)

    assert sd_apart(found, own) < 0.2
    assert (found != torch.tensor(found).bfloat16().float().numpy()).any()


@pytest.mark.parametrize("pad", [None, -1, PAD])
def test_a_decoder_with_two_heads(pad: int | None) -> None:
    """It runs its own forward; row by row, where that finds the end by a padding id that it has not."""
    model = ALL["Llama"].classifier()
    model.config.pad_token_id = pad
    model.gate = torch.nn.Linear(32, 1)
    made = scorer(model)

    assert sd_apart(made.logits(PROMPTS, COMPLETIONS), one_by_one(model, rows())) < NEAR
    assert isinstance(made._reader, OwnForward)
    assert made._reader.one_by_one == (pad != PAD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_change_after_the_first_call(dtype: torch.dtype) -> None:
    """The head is read as it is now: trained, edited or replaced."""
    model = tiny.classifier().to(dtype)
    scorer, fresh = (SequenceClassifier(model, tiny.tokenizer(), show_progress=False) for _ in range(2))
    before = scorer(["ab"] * 3, ["c", "de", "f"])
    model.score.weight.data.mul_(-3)
    after = scorer(["ab"] * 3, ["c", "de", "f"])
    model.score = torch.nn.Linear(32, 1, bias=False, dtype=dtype)
    replaced = scorer(["ab"] * 3, ["c", "de", "f"])

    assert np.allclose(after, -3 * before, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert np.array_equal(replaced, fresh(["ab"] * 3, ["c", "de", "f"]))


def test_what_a_call_refuses() -> None:
    """Texts for lists, lists of two lengths; and nan weights, with the pair that it came to light in."""
    model = tiny.classifier()
    scorer = SequenceClassifier(model, tiny.tokenizer(), show_progress=False)
    with pytest.raises(TypeError, match="prompts are a list"):
        inspect.unwrap(SequenceClassifier.__call__)(scorer, "ab", "cd")
    with pytest.raises(ValueError, match="each completion needs its prompt, got 1 prompts and 2 completions"):
        scorer(["ab"], ["c", "d"])
    model.score.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"gave nan for completion 'c' of prompt 'ab'.*nan among the weights"):
        scorer(["ab"], ["c"])


def test_keywords() -> None:
    """Prompts and completions can be named, as TRL's trainers do."""
    scorer = SequenceClassifier(tiny.classifier(), tiny.tokenizer(), show_progress=False)

    assert np.array_equal(scorer(prompts=["ab"], completions=["c"]), scorer(["ab"], ["c"]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_a_model_in_a_wrapper() -> None:
    """The model inside torch.compile's or a data-parallel wrapper is read: same scores, same fingerprint."""
    model = tiny.classifier()
    bare = SequenceClassifier(model, tiny.tokenizer(), show_progress=False)
    for wrapper in (torch.compile(model), torch.nn.DataParallel(model)):
        wrapped = SequenceClassifier(wrapper, tiny.tokenizer(), show_progress=False)
        assert np.array_equal(wrapped(["ab"] * 2, ["c", "de"]), bare(["ab"] * 2, ["c", "de"]))
        assert wrapped.fingerprint() == bare.fingerprint()
