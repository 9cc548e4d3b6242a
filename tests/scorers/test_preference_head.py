"""Preference heads as scorers: equal to the head read by hand, free from the pass that writes, frozen on request."""

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, strategies as st
from peft import LoraConfig, get_peft_model
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from calibrated_rewards import BestOf, CalibratedReward
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.heads import HeadedModel
from calibrated_rewards.heads.preference_head import SETTINGS_FILE
from calibrated_rewards.models.adapters import ignore_peft_warning
from calibrated_rewards.models.checkpoints import PREFERENCE_HEAD
from calibrated_rewards.models.text import Text
from calibrated_rewards.samplers import Reranked, sample
from calibrated_rewards.samplers.generation import Reader
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers import score
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.scorers.preference_head import Memory, PreferenceHeadScorer, digest
from calibrated_rewards.testing.check_scorer import check_scorer

PROMPTS = [*tiny.texts(3, 1), [{"role": "user", "content": "Who are you?"}]]
# Without a space, and so of the first tokens alone: what is written with those is text, and is read back as it was.
SPACELESS = [*(text.replace(" ", "x") for text in tiny.texts(3, 1)), [{"role": "user", "content": "Who?"}]]
ASCII = len(tiny.SPECIALS) + 94
END = tiny.SPECIALS.index("<|end|>")
PAIRS = [p for p in PROMPTS for _ in range(4)], tiny.texts(16, 2)
BACKBONES = ["frozen", "lora", "full"]
LAYERS = [(-1,), (0, 1, -1)]


def base(**options: Any) -> Any:
    """A policy whose hidden states spread, and which ends some of its completions."""
    model = tiny.causal(3, **options)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
        model.lm_head.weight[tiny.EOS] += 0.4
    return model


def build(model: Any = None, **settings: Any) -> HeadedModel:
    """A head on a model; what it trains is no longer what it was at first."""
    headed = HeadedModel.build(base() if model is None else model, tiny.tokenizer(), **settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in headed.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn_like(weight))
    return headed.requires_grad_(False).eval()


def with_policy_adapter(model: Any) -> Any:
    """The model with a LoRA adapter that changes something, as a policy in training has."""
    torch.manual_seed(1)
    with ignore_peft_warning():
        settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        return get_peft_model(model, settings)


def by_hand(headed: HeadedModel) -> np.ndarray:
    """Each pair alone, by the headed model itself."""
    rows = headed.encode(*PAIRS)
    return torch.cat([headed.score_rows([row]) for row in rows])[:, 0].numpy()


def train(parameters: Any) -> None:
    """A step of training, as far as scores can tell."""
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in parameters:
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_equals_the_head_read_by_hand(backbone: str, layers: Any) -> None:
    """In batches with shared prefixes, and one by one by the model: the same scores."""
    headed = build(backbone=backbone, layers=layers, pooler="tanh")
    scores = score(PreferenceHeadScorer(headed), *PAIRS)
    assert scores.std() > 0.01
    np.testing.assert_allclose(scores, by_hand(headed), atol=1e-4 * scores.std())


def test_passes_check_scorer() -> None:
    """All checks of the library's own suite."""
    report = check_scorer(PreferenceHeadScorer(build(pooler="swiglu")), sign=False)
    assert report.passed, str(report)


def test_names_of_a_head() -> None:
    """Each has its own scores; without a name it has to be the only one."""
    headed = build(names=("helpful", "safe"))
    both = [score(PreferenceHeadScorer(headed, name), *PAIRS) for name in ("helpful", "safe")]
    assert abs(np.corrcoef(*both)[0, 1]) < 0.999
    np.testing.assert_array_equal(PreferenceHeadScorer(headed, "safe").logits(*PAIRS)[:, 1], both[1])
    with pytest.raises(ValueError, match="names helpful, safe: say which, name="):
        PreferenceHeadScorer(headed)
    with pytest.raises(ValueError, match="got name='kind'"):
        PreferenceHeadScorer(headed, "kind")


def count_tokens(model: Any) -> list[int]:
    """A list that grows by the tokens of each forward of the model's embeddings."""
    counts: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: counts.append(ids[0].numel()))
    return counts


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize(
    ("backbone", "prompts_at_once"), [("frozen", None), ("frozen", 4), ("lora", None), ("full", 2)], ids=str
)
def test_scores_from_the_pass_that_writes(backbone: str, layers: Any, prompts_at_once: int | None) -> None:
    """The same completions, those that were cut too; the same scores; and no forward to get them."""
    headed = build(base(vocab_size=ASCII), backbone=backbone, layers=layers, pooler="tanh")
    if backbone == "lora":
        headed.model.set_adapter("preference_head")
    scorer, apart = PreferenceHeadScorer(headed), PreferenceHeadScorer(headed)
    options = (headed.model, headed.tokenizer, Decoding(12))
    seeds = [range(8 * i, 8 * i + 8) for i in range(4)]
    plain = sample(HfSampler(*options, prompts_at_once=prompts_at_once), SPACELESS, seeds)
    written = sample(HfSampler(*options, prompts_at_once=prompts_at_once, scorer=scorer), SPACELESS, seeds)
    assert [[r.completion for r in each] for each in written] == [[r.completion for r in each] for each in plain]
    assert {rollout.finish for each in written for rollout in each} == {"stop", "length"}

    # Special tokens inside a completion are no text: only what is read back as it was drawn has its score.
    pairs = [
        (p, r)
        for p, each in zip(SPACELESS, written, strict=True)
        for r in each
        if r.tokens == len(r.completion) + (r.finish == "stop")
    ]
    prompts, completions = [p for p, _ in pairs], [r.completion for _, r in pairs]
    counts = count_tokens(headed.model)
    free = score(scorer, prompts, completions)
    assert (sum(counts), scorer.memory.used) == (0, len(pairs))
    assert len(pairs) > 10
    assert {r.finish for _, r in pairs} == {"stop", "length"}
    expected = score(apart, prompts, completions)
    assert sum(counts) > 0
    np.testing.assert_allclose(free, expected, atol=1e-4 * expected.std())


@pytest.mark.parametrize("ends", [[tiny.EOS], [END], [tiny.EOS, END, 5]], ids=str)
def test_whichever_token_ended_a_turn_the_head_reads_at_its_own(ends: list[int]) -> None:
    """A generation config may have several end tokens; text does not say which was drawn, and the score is the same."""
    model = base(vocab_size=ASCII)
    with torch.no_grad():
        model.lm_head.weight[END] = model.lm_head.weight[tiny.EOS]
    model.generation_config.eos_token_id = ends
    headed = build(model, pooler="tanh")
    assert headed.turn_end.id == END
    scorer, apart = PreferenceHeadScorer(headed), PreferenceHeadScorer(headed)
    sampler = HfSampler(headed.model, headed.tokenizer, Decoding(12), scorer=scorer)
    drawn = sample(sampler, SPACELESS, [range(8 * i, 8 * i + 8) for i in range(4)])
    whole = [  # without special tokens inside, which are no text
        (p, r.completion)
        for p, each in zip(SPACELESS, drawn, strict=True)
        for r in each
        if r.finish == "stop" and r.tokens == len(r.completion) + 1
    ]
    assert len(whole) > 5
    prompts, completions = [p for p, _ in whole], [c for _, c in whole]
    free = score(scorer, prompts, completions)
    assert scorer.memory.used == len(whole)
    expected = score(apart, prompts, completions)
    np.testing.assert_allclose(free, expected, atol=1e-4 * expected.std())
    rows = [[*headed.encode([p], [""])[0][:-1], *headed.tokenizer(c)["input_ids"][1:], END] for p, c in whole]
    np.testing.assert_allclose(free, headed.score_rows(rows)[:, 0], atol=1e-4 * expected.std())


def test_one_more_step_is_all_that_it_takes() -> None:
    """Of a batch of which all are cut two steps more, and never a second reading of what was written."""
    headed = build(base(vocab_size=ASCII))
    headed.model.generation_config.eos_token_id = None
    decoding = Decoding(10)
    sampler = HfSampler(headed.model, headed.tokenizer, decoding)
    first = sampler(SPACELESS[:1], [range(40)])[0]
    as_drawn = [seed for seed, rollout in enumerate(first) if len(rollout.completion) == rollout.tokens]
    assert len(as_drawn) > 5
    seeds = [as_drawn]
    counts = count_tokens(headed.model)
    with_head = HfSampler(headed.model, headed.tokenizer, decoding, scorer=PreferenceHeadScorer(headed))
    for each in (sampler, with_head):  # each compares what it does with plain forwards, the first time
        each(SPACELESS[:1], seeds)
    counts.clear()
    sampler(SPACELESS[:1], seeds)
    steps, tokens = len(counts), sum(counts)
    counts.clear()
    with_head(SPACELESS[:1], seeds)
    assert (len(counts), sum(counts)) == (steps + 1, tokens + 2 * len(as_drawn))


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("prompts_at_once", [None, 4])
@pytest.mark.parametrize("stop", [(), ("a", "e", "\x10")], ids=["", "stop texts"])
def test_texts_of_other_tokens_than_were_drawn(stop: tuple[str, ...], prompts_at_once: int | None, layers: Any) -> None:
    """What differs is read again in the pass, from the first other token on: no forward is left to run for scores."""
    headed = build(layers=layers, pooler="tanh")
    scorer, apart = PreferenceHeadScorer(headed), PreferenceHeadScorer(headed)
    options = (headed.model, headed.tokenizer, Decoding(12, stop=stop))
    seeds = [range(8 * i, 8 * i + 8) for i in range(4)]
    plain = HfSampler(*options, prompts_at_once=prompts_at_once)(PROMPTS, seeds)
    drawn = HfSampler(*options, prompts_at_once=prompts_at_once, scorer=scorer)(PROMPTS, seeds)
    assert [[r.completion for r in each] for each in drawn] == [[r.completion for r in each] for each in plain]

    prompts = [p for p, each in zip(PROMPTS, drawn, strict=True) for _ in each]
    rollouts = [r for each in drawn for r in each]
    lengths = [len(headed.tokenizer(r.completion)["input_ids"]) - 1 for r in rollouts]
    others = sum(n + (r.finish == "stop") != r.tokens for n, r in zip(lengths, rollouts, strict=True))
    assert others > 8
    counts = count_tokens(headed.model)
    free = score(scorer, prompts, [r.completion for r in rollouts])
    assert (sum(counts), scorer.memory.used) == (0, len(rollouts))
    expected = score(apart, prompts, [r.completion for r in rollouts])
    np.testing.assert_allclose(free, expected, atol=1e-4 * expected.std())


@given(
    st.lists(
        st.tuples(st.sampled_from(PROMPTS[:2] + SPACELESS[:2] + ["", "x"]), st.integers(0, 3)), min_size=1, max_size=4
    ),
    st.integers(1, 6),
    st.sampled_from([(), ("a",), ("a", "e", " ")]),
    st.sampled_from([None, 4]),
    st.sampled_from([tiny.EOS, END, None]),
)
def test_every_completion_has_its_score_from_the_pass(
    asked: list[tuple[str, int]], tokens: int, stop: tuple[str, ...], at_once: int | None, end: int | None
) -> None:
    """None or one or many of a prompt, repeated prompts, of one token and more, however they end: scores as apart."""
    headed = build(pooler="tanh")
    headed.model.generation_config.eos_token_id = end
    scorer, apart = PreferenceHeadScorer(headed), PreferenceHeadScorer(headed)
    prompts, seeds = [prompt for prompt, _ in asked], [range(k) for _, k in asked]
    options = (headed.model, headed.tokenizer, Decoding(tokens, stop=stop))
    drawn = HfSampler(*options, prompts_at_once=at_once, scorer=scorer)(prompts, seeds)
    assert drawn == HfSampler(*options, prompts_at_once=at_once)(prompts, seeds)
    pairs = [p for p, each in zip(prompts, drawn, strict=True) for _ in each], [r.completion for e in drawn for r in e]
    free = score(scorer, *pairs)
    assert scorer.memory.used == len(pairs[0])
    np.testing.assert_allclose(free, score(apart, *pairs), atol=1e-4)


def test_behind_a_window_of_attention_nothing_is_read_again() -> None:
    """What was before the window is gone: those texts are scored by a forward of their own, to the same scores."""
    torch.manual_seed(0)
    options = tiny.config(vocab_size=ASCII).to_diff_dict() | {"sliding_window": 8}
    headed = build(MistralForCausalLM(MistralConfig(**options)).eval())
    scorer, apart = PreferenceHeadScorer(headed), PreferenceHeadScorer(headed)
    drawn = HfSampler(headed.model, headed.tokenizer, Decoding(12), scorer=scorer)(SPACELESS, [range(8)] * 4)
    prompts = [p for p in SPACELESS for _ in range(8)]
    completions = [r.completion for each in drawn for r in each]
    free = score(scorer, prompts, completions)
    assert 0 < scorer.memory.used < len(completions)
    expected = score(apart, prompts, completions)
    np.testing.assert_allclose(free, expected, atol=1e-4 * expected.std())


def test_behind_recurrent_states_tokens_are_read_one_by_one() -> None:
    """A completion that is cut takes two more tokens, and Mamba in transformers reads one behind its states."""
    torch.manual_seed(0)
    small = {"vocab_size": ASCII, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": tiny.PAD}
    model = MambaForCausalLM(MambaConfig(**small, bos_token_id=tiny.BOS, eos_token_id=tiny.EOS)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0 if weight.ndim > 1 else 1.0)
    headed = build(model, pooler="tanh")
    scorer, apart = PreferenceHeadScorer(headed), PreferenceHeadScorer(headed)
    drawn = HfSampler(headed.model, headed.tokenizer, Decoding(1), scorer=scorer)(SPACELESS, [range(8)] * 4)
    pairs = [p for p in SPACELESS for _ in range(8)], [rollout.completion for each in drawn for rollout in each]
    free = score(scorer, *pairs)
    assert scorer.memory.used > 8
    expected = score(apart, *pairs)
    np.testing.assert_allclose(free, expected, atol=1e-4 * expected.std())


def test_a_row_that_fills_the_positions() -> None:
    """There is no position for the end of a turn behind it: it is written all the same."""
    headed = build(base())
    limit = headed.model.config.max_position_embeddings
    scorer = PreferenceHeadScorer(headed)
    sampler = HfSampler(headed.model, headed.tokenizer, Decoding(4), scorer=scorer)
    drawn = sampler(["x" * (limit - 5)], [range(4)])[0]
    assert drawn == HfSampler(headed.model, headed.tokenizer, Decoding(4))(["x" * (limit - 5)], [range(4)])[0]


def test_another_policy_is_not_scored_for_free(caplog: Any) -> None:
    """An adapter of the policy's is active, which the head does not read: a warning, and the right scores."""
    model = with_policy_adapter(base())
    headed = HeadedModel(model, tiny.tokenizer(), build().head)
    scorer = PreferenceHeadScorer(headed)
    with caplog.at_level(logging.WARNING):
        drawn = sample(HfSampler(model, tiny.tokenizer(), Decoding(6), scorer=scorer), PROMPTS[:1], [range(4)])[0]
    assert "other weights or adapters than the head reads" in caplog.text
    assert not scorer.memory.scores
    completions = [rollout.completion for rollout in drawn]
    alone = PreferenceHeadScorer(HeadedModel(base(), tiny.tokenizer(), headed.head))
    np.testing.assert_allclose(
        score(scorer, PROMPTS[:1] * 4, completions), score(alone, PROMPTS[:1] * 4, completions), atol=1e-5
    )


def test_a_merged_adapter_is_not_read() -> None:
    """The head's own adapter, merged into the base, is no base and no adapter to read by."""
    headed = build(backbone="lora")
    scorer = PreferenceHeadScorer(headed)
    headed.model.set_adapter(headed.adapter)
    assert scorer.reads(headed.model)
    headed.model.merge_adapter()
    assert not scorer.reads(headed.model)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        score(scorer, *PAIRS)


def test_the_fingerprint_is_of_the_heads_weights_and_name() -> None:
    """Scores under another name, or of a head that was trained on, are others."""
    headed = build(names=("help", "harm"))
    one, other = (PreferenceHeadScorer(headed, name=name).fingerprint() for name in headed.head.names)
    assert one != other
    train(headed.head.requires_grad_(True).parameters())
    assert PreferenceHeadScorer(headed, name="help").fingerprint() != one


def test_a_wrong_state_would_be_noticed(caplog: Any) -> None:
    """States of another layer: the first batch is read again, and nothing is kept."""
    headed = build()
    scorer = _OtherLayer(headed)
    with caplog.at_level(logging.WARNING):
        sample(HfSampler(headed.model, headed.tokenizer, Decoding(6), scorer=scorer), PROMPTS[:1], [range(4)])
    assert "completions are read again" in caplog.text
    assert not scorer.memory.scores


def test_wrong_states_of_other_tokens_would_be_noticed(caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read again in the pass is compared too: were it wrong, all would be read by a forward."""
    right = Reader.read_others
    monkeypatch.setattr(Reader, "read_others", lambda *given: right(*given) + 1.0)
    headed = build(pooler="tanh")
    scorer = PreferenceHeadScorer(headed)
    with caplog.at_level(logging.WARNING):
        drawn = HfSampler(headed.model, headed.tokenizer, Decoding(6), scorer=scorer)(PROMPTS[:1], [range(4)])[0]
    assert "completions are read again" in caplog.text
    assert not scorer.memory.scores
    pairs = PROMPTS[:1] * 4, [rollout.completion for rollout in drawn]
    np.testing.assert_array_equal(score(scorer, *pairs), score(PreferenceHeadScorer(headed), *pairs))


class _OtherLayer(PreferenceHeadScorer):
    @property
    def layers(self) -> tuple[int, ...]:
        """The first layer, where the head reads the last."""
        return (0,)


def test_other_weights_other_scores() -> None:
    """What was kept is forgotten with the weights that gave it, of the model or of the head."""
    headed = build(backbone="full")
    scorer = PreferenceHeadScorer(headed)
    sampler = HfSampler(headed.model, headed.tokenizer, Decoding(6), scorer=scorer)
    for part in (headed.model, headed.head):
        sample(sampler, PROMPTS[:1], [range(4)])
        assert scorer.memory.scores
        train(part.requires_grad_(True).parameters())
        part.requires_grad_(False)
        np.testing.assert_allclose(score(scorer, *PAIRS), by_hand(headed), atol=1e-4)
        assert not scorer.memory.scores


def test_scores_do_not_depend_on_earlier_calls() -> None:
    """Each call of the sampler begins anew: a run that goes on scores what one that was not stopped does."""
    headed = build(base(vocab_size=ASCII))
    scorer = PreferenceHeadScorer(headed)
    sampler = HfSampler(headed.model, headed.tokenizer, Decoding(6), scorer=scorer)
    sample(sampler, SPACELESS[:1], [range(4)])
    first = {*scorer.memory.scores}
    sample(sampler, SPACELESS[1:2], [range(4)])
    assert first
    assert scorer.memory.scores
    assert not first & {*scorer.memory.scores}


def test_memory_is_bounded() -> None:
    """Beyond the most that are kept, the scores that were kept first are dropped first."""
    memory = Memory(2)
    memory.add([[1], [2], [3]], np.arange(3, dtype=np.float32)[:, None], version=0)
    assert [each if each is None else float(each[0]) for each in memory.find([[1], [2], [3]], 0)] == [None, 1.0, 2.0]
    assert memory.find([[2]], version=1) == [None]
    assert digest([258]) != digest([1, 2])


def test_best_of_n_with_one_model() -> None:
    """Reranked by its own head: no forward but those that write."""
    headed = build(base(vocab_size=ASCII))
    scorer = PreferenceHeadScorer(headed)
    sampler = HfSampler(headed.model, headed.tokenizer, Decoding(6), scorer=scorer)
    choice = Reranked(sampler, scorer, BestOf(6)).choose(SPACELESS[:1], [[3]])[0][0]
    again = score(PreferenceHeadScorer(headed), SPACELESS[:1] * 6, [each.completion for each in choice.candidates])
    np.testing.assert_allclose(choice.scores, again, atol=1e-4)
    assert scorer.memory.used > 0
    assert choice.index == int(again.argmax())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_snapshot_stays(backbone: str) -> None:
    """The policy is trained: by its adapter, by the head's own, or whole. The snapshot's scores are those of before."""
    model = base() if backbone == "full" else with_policy_adapter(base())
    headed = (
        build(model, backbone=backbone) if backbone != "frozen" else HeadedModel(model, tiny.tokenizer(), build().head)
    )
    model = headed.model
    scorer = PreferenceHeadScorer(headed)
    if backbone != "frozen":
        for name, weight in model.named_parameters():
            weight.requires_grad_(backbone == "full" or ".preference_head." in name)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    before, mode = score(scorer, *PAIRS), [part.training for part in model.modules()]
    frozen = scorer.snapshot()
    own = {each.data_ptr() for each in frozen.model.parameters()}
    shared = sum(each.numel() for each in base().parameters())
    new = sum(
        each.numel()
        for each in frozen.model.parameters()
        if each.data_ptr() not in {w.data_ptr() for w in model.parameters()}
    )
    assert len(own) > 3
    assert (new >= shared) if backbone == "full" else new == 0
    assert [part.training for part in model.modules()][: len(mode)] == mode or backbone == "lora"
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == trained
    np.testing.assert_allclose(score(frozen, *PAIRS), before, atol=1e-5)
    assert frozen.fingerprint() == scorer.fingerprint()

    train(model.parameters())
    train(headed.head.requires_grad_(True).parameters())
    np.testing.assert_allclose(score(frozen, *PAIRS), before, atol=1e-5)
    assert abs(score(scorer, *PAIRS) - before).max() > 0.05


def test_a_snapshot_needs_a_frozen_base() -> None:
    """A base that is trained under adapters cannot be shared."""
    model = with_policy_adapter(base())
    scorer = PreferenceHeadScorer(HeadedModel(model, tiny.tokenizer(), build().head))
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"a base that is not trained, got .*embed_tokens"):
        scorer.snapshot()


def test_drift_is_noticed() -> None:
    """`verify` scores the table's probes again: those of a policy that was trained since are others."""
    headed = build(backbone="full")
    scorer = PreferenceHeadScorer(headed)
    table = calibrate(PROMPTS, HfSampler(headed.model, headed.tokenizer, Decoding(8), scorer=scorer), scorer, k=6)
    frozen = scorer.snapshot()
    assert CalibratedReward(scorer, table).verify().worst < 1e-3
    train(headed.model.requires_grad_(True).parameters())
    assert CalibratedReward(frozen, table).verify().worst < 1e-3
    with pytest.raises(ValueError, match="probes"):
        CalibratedReward(scorer, table).verify()


def test_the_file_has_one_name() -> None:
    """Where a checkpoint is looked at, and where a head is written."""
    assert PREFERENCE_HEAD == SETTINGS_FILE


@pytest.mark.parametrize("backbone", BACKBONES)
def test_load_scorer_recognises_it(backbone: str, tmp_path: Path) -> None:
    """By its file: a head alone, one with an adapter, one beside its model; it pickles as how it is loaded."""
    place = tiny.saved(base(), tmp_path / "policy", tiny.tokenizer())
    model = type(base()).from_pretrained(place)
    headed = build(model, backbone=backbone)
    headed.save_pretrained(tmp_path / "head")
    scorer = load_scorer(tmp_path / "head")
    expected = by_hand(headed)
    np.testing.assert_allclose(score(scorer, *PAIRS), expected, atol=1e-4)
    np.testing.assert_allclose(score(pickle.loads(pickle.dumps(scorer)), *PAIRS), expected, atol=1e-4)
    assert scorer.fingerprint() == PreferenceHeadScorer(headed).fingerprint()
    with pytest.raises(TypeError, match="takes no pool="):
        load_scorer(tmp_path / "head", pool="last")
    other = tiny.saved(tiny.causal(9), tmp_path / "other", tiny.tokenizer())
    if backbone != "full":
        with pytest.raises(ValueError, match="trained on other weights"):
            load_scorer(tmp_path / "head", base=other)
        assert abs(score(load_scorer(tmp_path / "head", base=other, any_base=True), *PAIRS) - expected).max() > 1e-3


def test_a_head_without_a_base(tmp_path: Path) -> None:
    """A saved head alone asks for base=, the model that it is on."""
    headed = build()
    headed.head.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="on which model its head is: say base="):
        load_scorer(tmp_path)


def test_the_text_is_the_heads() -> None:
    """Its settings come with the head; a longer input loses its first tokens."""
    headed = build(text=Text(max_length=40))
    scorer = PreferenceHeadScorer(headed)
    assert scorer.fingerprint()["text"]["max_length"] == 40
    with pytest.warns(UserWarning, match="longer than max_length=40"):
        rows = scorer.encode(["x" * 100], ["y"])
    assert len(rows[0]) == 40
    assert rows[0][-1] == scorer.turn_end.id
