"""The trainer: what it learns, by other routes; packed as padded; resumed as uninterrupted; its metrics."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import log_softmax
from transformers import TrainingArguments

from calibrated_rewards.heads import (
    HeadedModel,
    HeadLoss,
    JointLoss,
    Pair,
    PairCollator,
    PreferenceHeadTrainer,
    add_references,
    cache_states,
    encode_pairs,
    measure_pairs,
    order_pairs,
)
from calibrated_rewards.heads.pair_batches import EncodedPair, check_packing, move, pack
from calibrated_rewards.models.adapters import ignore_peft_warning

WORDS = tiny.texts(24, seed=2, longest=12)


def pairs_of(count: int = 12) -> list[Pair]:
    """Pairs of two tasks: the better completion ends in an exclamation mark."""
    return [
        Pair(WORDS[i] if i % 2 else [{"role": "user", "content": WORDS[i]}], f"{word}!", f"{word}?", "ab"[i % 2])
        for i, word in enumerate(WORDS[-count:])
    ]


def build(backbone: str = "frozen", seed: int = 0, model: Any = None, **settings: Any) -> HeadedModel:
    """A headed model with fresh weights of a seed."""
    model = model or tiny.causal()
    torch.manual_seed(seed)
    return HeadedModel.build(model, tiny.tokenizer(), backbone=backbone, rank=4, **settings)


def arguments(out: Path, **options: Any) -> TrainingArguments:
    """Arguments of a short run on the CPU."""
    usual = {
        "learning_rate": 1e-2, "max_steps": 6, "per_device_train_batch_size": 4, "lr_scheduler_type": "cosine",
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "bf16": False, "use_cpu": True,
        "disable_tqdm": True, "weight_decay": 0.0, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(str(out), **{**usual, **options})


def train(headed: HeadedModel, pairs: list[EncodedPair], out: Path, resume: Any = None, **options: Any) -> Any:
    """Train; the options that are the trainer's own go to it."""
    own = {"eval_pairs", "loss", "window", "head_lr", "prior_decay", "order", "head_decay"}
    args = arguments(out, **{name: value for name, value in options.items() if name not in own})
    mine = {name: value for name, value in options.items() if name in own}
    trainer = PreferenceHeadTrainer(headed, args, pairs, **mine)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trained_weights(headed: HeadedModel) -> dict[str, torch.Tensor]:
    """Copies of the weights that training may change, by name."""
    return {name: weight.detach().clone() for name, weight in headed.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("backbone", ["frozen", "lora", "full"])
def test_it_learns(backbone: str, tmp_path: Path) -> None:
    """After a few steps of any kind the pairs are told apart, and only what is trained has changed."""
    headed = build(backbone)
    before = {name: weight.detach().clone() for name, weight in headed.model.named_parameters()}
    pairs = encode_pairs(headed, pairs_of())
    if backbone == "frozen":
        pairs = cache_states(headed, pairs)
    order = order_pairs([pair.task for pair in pairs], 20, seed=1)
    trainer = train(headed, pairs, tmp_path, order=order, max_steps=40, eval_pairs=pairs)
    metrics = trainer.evaluate()

    assert metrics["eval_accuracy"] == 1.0
    assert metrics["eval_a/accuracy"] == metrics["eval_b/accuracy"] == 1.0
    assert {"eval_ece", "eval_brier", "eval_ties", "eval_margin", "eval_nll"} <= metrics.keys()
    changed = {name for name, weight in headed.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name, weight in headed.model.named_parameters() if weight.requires_grad}
    losses = [row["loss/head"] for row in trainer.state.log_history if "loss/head" in row]
    assert losses[-1] < losses[0] - 0.1


def test_cached_states_train_as_the_whole_model(tmp_path: Path) -> None:
    """A head on states that were read once becomes the head that a forward of the frozen model in each step makes."""
    runs = {}
    for cached in (True, False):
        headed = build(pooler="tanh", layers=(1, -1))
        pairs = encode_pairs(headed, pairs_of())
        train(headed, cache_states(headed, pairs) if cached else pairs, tmp_path / str(cached))
        runs[cached] = trained_weights(headed)
    assert runs[True].keys() == {"head.mix", "head.pooler_out.weight", "head.score.weight"}
    for name, weight in runs[True].items():
        torch.testing.assert_close(weight, runs[False][name], atol=2e-4, rtol=1e-3)


def test_states_are_cached_without_the_policys_adapter() -> None:
    """Those of the base, which a head on a frozen backbone reads."""
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    with ignore_peft_warning():
        adapted = build(model=get_peft_model(tiny.causal(), settings))
    pairs = encode_pairs(adapted, pairs_of(4))
    for cached, expected in zip(cache_states(adapted, pairs), cache_states(build(), pairs), strict=True):
        torch.testing.assert_close(cached.states, expected.states)


def test_a_head_ends_at_the_closed_form(tmp_path: Path) -> None:
    """Trained long enough on what it can tell apart, the separable head collapses to +-ln 9; by gradient descent."""
    headed = build(pooler="tanh")
    pairs = cache_states(headed, encode_pairs(headed, pairs_of(4)))
    options = {"max_steps": 400, "learning_rate": 0.02, "logging_steps": 100, "head_decay": 0.0}
    trainer = train(headed, pairs, tmp_path, order=np.arange(1600) % 4, **options)
    scores = trainer.predict(trainer.train_dataset).predictions[:4]
    np.testing.assert_allclose(scores, [[math.log(9), -math.log(9)]] * 4, atol=0.05)


@pytest.mark.parametrize("backbone", ["lora", "full"])
def test_packed_rows_give_the_padded_gradients(backbone: str) -> None:
    """Scores, log-probabilities and gradients of a batch are the same packed and padded, and each text's alone."""
    headed = build(backbone).eval()
    with torch.no_grad():
        for weight in headed.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    pairs = encode_pairs(headed, pairs_of(6))
    answers = {}
    for window in (0, 64, 200):
        headed.zero_grad()
        batch = PairCollator(window, targets=True)(pairs)
        assert window == 0 or batch["input_ids"].numel() < PairCollator()(pairs)["input_ids"].numel()
        scores, sums = headed(**move(batch, headed))
        loss = HeadLoss()(*scores[:, 0].unflatten(0, (2, -1))).mean() + sums.sum() / 100
        loss.backward()
        gradients = [weight.grad.clone() for weight in headed.parameters() if weight.grad is not None]
        answers[window] = (scores.detach(), sums.detach(), gradients)
    for window in (64, 200):
        for one, other in zip(answers[window][:2], answers[0][:2], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        for one, other in zip(answers[window][2], answers[0][2], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    texts = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
    with torch.no_grad(), headed.activate():
        for text, score, total in zip(texts, *answers[0][:2], strict=True):
            answer = headed.model(input_ids=torch.tensor([text]), output_hidden_states=True)
            torch.testing.assert_close(headed.head(answer.hidden_states[-1][0, -1]), score, atol=1e-5, rtol=1e-4)
            start = (pairs + pairs)[texts.index(text)]
            begin = start.chosen_start if text == start.chosen else start.rejected_start
            logprobs = log_softmax(answer.logits[0], -1)[range(begin - 1, len(text) - 1), text[begin:]]
            torch.testing.assert_close(logprobs.sum(), total, atol=1e-4, rtol=1e-4)


def test_targets_are_the_completions() -> None:
    """The tokens that log-probabilities are of decode to the completions, and their end-of-turn tokens."""
    headed = build()
    pairs = encode_pairs(headed, pairs_of())
    batch = PairCollator(64, targets=True)(pairs)
    tokens: dict[int, list[int]] = {}
    for text, row, position in batch["targets"].tolist():
        tokens.setdefault(text, []).append(int(batch["input_ids"][row, position]))
    completions = [*(pair.chosen for pair in pairs_of()), *(pair.rejected for pair in pairs_of())]
    assert [headed.tokenizer.decode(tokens[i]) for i in range(24)] == [f"{text}<|end|>" for text in completions]


def test_long_pairs_lose_their_beginning() -> None:
    """Truncated pairs keep their ends, and the place of their completions moves with them."""
    from calibrated_rewards.models import Text

    headed = build(text=Text(max_length=24))
    with pytest.warns(UserWarning, match="are longer than max_length=24"):
        (pair,) = encode_pairs(headed, [Pair("a" * 40, "yes", "n" * 60)])
    assert len(pair.chosen) == len(pair.rejected) == 24
    assert headed.tokenizer.decode(pair.chosen[pair.chosen_start :]) == "yes<|end|>"
    assert pair.rejected_start <= 1
    assert pair.chosen[0] == pair.rejected[0] == tiny.BOS


def test_packing_fills_windows() -> None:
    """No row holds more than the window, each text is in one row, and a text that no row holds is refused."""
    lengths = np.random.default_rng(0).integers(1, 60, 200).tolist()
    rows = pack(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 64
    assert len(rows) < sum(lengths) / 64 * 1.1 + 1
    with pytest.raises(ValueError, match="holds the longest text, of 59 tokens, got window=58"):
        pack([5, 59], 58)


def test_a_model_that_cannot_pack_is_refused() -> None:
    """Bloom counts no positions: in a packed row its texts would see each other."""
    from architectures import DECODERS
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(DECODERS["Bloom"].config()).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)
    headed = build(model=model)
    pairs = encode_pairs(headed, pairs_of())
    with pytest.raises(ValueError, match="train with window=0, which pads"):
        check_packing(headed, pairs, 100)
    check_packing(build(), encode_pairs(build(), pairs_of()), 100)


@pytest.mark.parametrize("backbone", ["frozen", "lora", "full"])
def test_resumed_as_uninterrupted(backbone: str, tmp_path: Path) -> None:
    """A run that goes on from a checkpoint ends with the weights of one that was not interrupted, bit for bit."""
    ends = {}
    loss = JointLoss(dpo_weight=float(backbone != "frozen"), sft_weight=0.1 * (backbone != "frozen"))
    prior = 0.0 if backbone == "frozen" else 0.3
    for resumed in (False, True):
        headed = build(backbone, dropout=0.1)
        pairs = encode_pairs(headed, pairs_of())
        pairs = cache_states(headed, pairs) if backbone == "frozen" else add_references(headed, pairs)
        order, place = order_pairs([pair.task for pair in pairs], 2, seed=3), None
        options = {"save_strategy": "steps", "save_steps": 3, "order": order, "loss": loss, "prior_decay": prior}
        if resumed:
            place = str(tmp_path / "False" / "checkpoint-3")
            with torch.no_grad():  # what the process begins with is not what it goes on with
                headed.head.score.weight.zero_()
        train(headed, pairs, tmp_path / str(resumed), resume=place, **options)
        ends[resumed] = trained_weights(headed)
        if backbone == "full":
            files = {path.name for path in (tmp_path / "False" / "checkpoint-3").iterdir()}
            assert {"preference_head.json", "model.safetensors"} <= files
    assert ends[True].keys() == ends[False].keys()
    for name, weight in ends[True].items():
        assert torch.equal(weight, ends[False][name]), name


def test_the_joint_step_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    """One step of SGD on head, cDPO and SFT is that of the losses written out on the model's own logits."""
    headed = build("full")
    twin = build("full")
    pairs = add_references(headed, encode_pairs(headed, pairs_of(4)))
    loss = JointLoss(dpo_weight=0.7, sft_weight=0.2)
    train(headed, pairs, tmp_path, loss=loss, max_steps=1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0)

    twin.model.lm_head.requires_grad_(True)
    head, dpo, chosen_tokens, nll = 0.0, 0.0, 0, 0.0
    for pair in pairs:
        sums, scores = [], []
        for text, start in ((pair.chosen, pair.chosen_start), (pair.rejected, pair.rejected_start)):
            answer = twin.model(input_ids=torch.tensor([text]), output_hidden_states=True)
            logprobs = log_softmax(answer.logits[0], -1)[range(start - 1, len(text) - 1), text[start:]]
            sums.append(logprobs.sum())
            scores.append(twin.head(answer.hidden_states[-1][0, -1])[0])
        head = head + HeadLoss()(*scores) / len(pairs)
        margin = 0.1 * ((sums[0] - pair.reference[0]) - (sums[1] - pair.reference[1]))
        good, bad = torch.sigmoid(margin), torch.sigmoid(-margin)
        dpo = dpo - (0.9 * good.log() + 0.1 * bad.log()) / len(pairs)
        nll, chosen_tokens = nll - sums[0], chosen_tokens + len(pair.chosen) - pair.chosen_start
    (head + 0.7 * dpo + 0.2 * nll / chosen_tokens).backward()
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            if weight.grad is not None:
                weight.sub_(1e-2 * (weight.grad + 0.1 * weight * name.startswith("head.")))
    for (name, weight), other in zip(headed.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight, other, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_references_are_read_without_dropout() -> None:
    """Before training, whatever mode the model is in, and which it is in again afterwards."""
    headed = build("lora", model=tiny.causal(attention_dropout=0.5))
    pairs = encode_pairs(headed, pairs_of())
    expected = [pair.reference for pair in add_references(headed.eval(), pairs)]
    assert [pair.reference for pair in add_references(headed.train(), pairs)] == expected
    assert headed.training


def test_rates_and_decays_by_group(tmp_path: Path) -> None:
    """The head has its own learning rate and decays to 0, the backbone to its start; both are in the optimiser."""
    headed = build("lora")
    pairs = encode_pairs(headed, pairs_of())
    trainer = train(headed, pairs, tmp_path, head_lr=0.05, prior_decay=0.4, lr_scheduler_type="constant")
    head, backbone = trainer.optimizer.param_groups
    assert (head["lr"], head["weight_decay"]) == (0.05, 0.1)
    assert (backbone["lr"], backbone["weight_decay"], backbone["prior_decay"]) == (0.01, 0.0, 0.4)
    start, distances = trained_weights(build("lora")), []
    for decay in (0.0, 50.0):
        options = {"max_steps": 30, "order": np.arange(120) % 12, "prior_decay": decay}
        weights = trained_weights(train(build("lora"), pairs, tmp_path / str(decay), **options).headed)
        distances.append(sum(float((weights[name] - start[name]).square().sum()) for name in start if "lora" in name))
    assert distances[1] < 0.2 * distances[0]


def test_named_heads_learn_from_their_pairs(tmp_path: Path) -> None:
    """Pairs that name a head move its weights alone; one that the head does not have is refused."""
    headed = build(names=("help", "harm"))
    both = [pair._replace(head="harm") for pair in pairs_of()]
    before = headed.head.score.weight.detach().clone()
    train(headed, cache_states(headed, encode_pairs(headed, both)), tmp_path, head_decay=0.0)
    assert torch.equal(headed.head.score.weight[0], before[0])
    assert not torch.equal(headed.head.score.weight[1], before[1])
    with pytest.raises(ValueError, match=r"scores help, harm, and pairs name truth: say names=\('truth',\)"):
        encode_pairs(headed, [both[0]._replace(head="truth")])


def test_what_a_frozen_backbone_cannot_learn(tmp_path: Path) -> None:
    """cDPO, SFT and decay to the start are refused where no weight of the model is trained."""
    headed = build()
    pairs = cache_states(headed, encode_pairs(headed, pairs_of()))
    for options, message in (
        ({"loss": JointLoss(dpo_weight=1.0)}, "dpo_weight=1.0"),
        ({"loss": JointLoss(sft_weight=0.5)}, "sft_weight=0.5"),
        ({"prior_decay": 0.1}, "prior_decay=0.1"),
    ):
        with pytest.raises(ValueError, match=f"a frozen backbone learns nothing, got {message}"):
            PreferenceHeadTrainer(headed, arguments(tmp_path), pairs, **options)
    with pytest.raises(ValueError, match="of a backbone that is not trained, got 'lora'"):
        cache_states(build("lora"), pairs)


def test_metrics_by_hand() -> None:
    """Accuracy with ties as halves, Brier score and calibration error by a loop over pairs and bins."""
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(500, 2)) + np.array([0.4, 0.0])
    scores[:20] = scores[:20, :1]
    metrics = measure_pairs(scores)
    right, brier, bins = 0.0, 0.0, {}
    for good, bad in scores.tolist():
        p = 1 / (1 + math.exp(bad - good))
        correct = 1.0 if p > 0.5 else 0.5 if p == 0.5 else 0.0
        right, brier = right + correct, brier + (1 - p) ** 2
        confidence = max(p, 1 - p)
        bins.setdefault(min(9, int((confidence - 0.5) * 20)), []).append((correct, confidence))
    error = sum(abs(sum(a - c for a, c in each)) for each in bins.values()) / 500
    assert metrics["accuracy"] == pytest.approx(right / 500)
    assert metrics["brier"] == pytest.approx(brier / 500)
    assert metrics["ece"] == pytest.approx(error)
    assert metrics["ties"] == 0.04
    assert metrics["nll"] == pytest.approx(np.mean([math.log1p(math.exp(b - g)) for g, b in scores.tolist()]))


def test_a_calibrated_model_has_a_small_error() -> None:
    """Where wins have the probability that the margin says, ECE is near 0; with sharper margins, it is not."""
    generator = np.random.default_rng(1)
    margin = generator.normal(size=20_000) * 2
    kept = generator.random(20_000) < 1 / (1 + np.exp(-margin))
    margin = np.where(kept, margin, -margin)
    scores = np.stack([margin, np.zeros_like(margin)], 1)
    assert measure_pairs(scores)["ece"] < 0.01
    assert measure_pairs(4 * scores)["ece"] > 0.1
    assert measure_pairs(scores)["accuracy"] == measure_pairs(4 * scores)["accuracy"]
