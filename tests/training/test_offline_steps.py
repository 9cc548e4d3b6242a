"""A step of offline training by itself: its numbers, its learning rate, its optimizer, what is drawn by a seed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from offline_runs import BETA, fit, make_group

from calibrated_rewards.models.adapters import ignore_peft_warning
from calibrated_rewards.training.offline import groups as offline_groups, trained_weights
from calibrated_rewards.training.offline.group_batches import Group
from calibrated_rewards.training.offline.groups import RecordedStates, ReferenceFile, hold_rollouts
from calibrated_rewards.training.offline.log_probabilities import GroupReader
from calibrated_rewards.training.offline.losses import parse_loss
from calibrated_rewards.training.offline.train import OfflineSettings, set_learning_rate, take_step, train
from calibrated_rewards.training.offline.trained_weights import TrainedWeights, build_optimizer
from calibrated_rewards.training.run_folder import RunFolder


def log_probability(model: Any, group: Group, number: int) -> torch.Tensor:
    """A completion's by the model's own forward, at temperature 1."""
    own = group.completions[number]
    logits = model(input_ids=torch.tensor([group.prompt + own])).logits[0, len(group.prompt) - 1 : -1]
    chosen: torch.Tensor = logits.log_softmax(-1).gather(1, torch.tensor(own)[:, None]).sum()
    return chosen


def test_a_step_is_the_mean_of_its_prompts() -> None:
    """Loss, KL, correlation, effective sample size and gradient, by plain forward passes of one completion each."""
    model = tiny.causal()
    groups = [(make_group(name), torch.linspace(-17, -15, 8)) for name in ("a", "bb", "ccc")]
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    losses, expected = [], []
    for group, reference in groups:
        d = torch.stack([log_probability(model, group.tokens, i) for i in range(8)]) - reference
        omega = torch.tensor(np.exp(group.rewards / BETA - group.log_z))
        losses.append((d - omega.log()).square().mean() / 2)
        kl, w = (d.exp() * d - d.exp() + 1).mean(), d.detach().exp()
        corr = np.corrcoef(d.detach(), group.rewards)[0, 1]
        expected.append([losses[-1].item(), kl.item(), corr, (w.sum() ** 2 / (w**2).sum()).item()])
    gradients = torch.autograd.grad(sum(losses) / 3, list(model.parameters()))
    weights = TrainedWeights.of(model)
    settings = OfflineSettings(loss="regression", beta=BETA, max_grad_norm=1e9)

    metrics = take_step(
        GroupReader(model),
        groups,
        parse_loss("regression"),
        weights,
        build_optimizer(weights, "sgd", 0.01, 0.8),
        settings,
    )

    assert [metrics[name] for name in ("loss", "kl", "corr", "ess")] == pytest.approx(np.mean(expected, 0), rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(float(torch.cat([g.flatten() for g in gradients]).norm()), rel=1e-4)
    for (name, weight), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(weight.detach(), before[name] - 0.01 * gradient, rtol=1e-4, atol=1e-6)


def test_the_rate_rises_and_falls() -> None:
    """In three steps of the warm-up to the line that falls from the highest rate to a tenth of it."""
    settings = OfflineSettings(lr=2.0, warmup=3, steps=10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

    rates = [set_learning_rate(optimizer, settings, step) for step in range(10)]

    line = 2.0 * (1 - 0.9 * np.arange(10) / 10)
    assert rates == pytest.approx(line * np.minimum(1, np.arange(1, 11) / 4))
    assert optimizer.param_groups[0]["lr"] == rates[-1]


def test_the_optimizers_are_those_of_the_settings() -> None:
    """SGD goes on with its momentum; AdamW has no decay."""
    weights = TrainedWeights.of(tiny.causal())
    sgd, adamw = (build_optimizer(weights, kind, 0.5, 0.7) for kind in ("sgd", "adamw"))
    assert isinstance(sgd, torch.optim.SGD)
    assert isinstance(adamw, torch.optim.AdamW)
    assert (sgd.param_groups[0]["lr"], sgd.param_groups[0]["momentum"]) == (0.5, 0.7)
    assert (adamw.param_groups[0]["lr"], adamw.param_groups[0]["weight_decay"]) == (0.5, 0)


def test_adapters_begin_by_the_seed(tmp_path: Path) -> None:
    """A run that is killed before its first checkpoint begins again with the same ones; another seed has others."""
    options: dict[str, Any] = {"lora_rank": 2, "optimizer": "adamw", "lr": 1e-3, "steps": 1}
    models = []
    for at, (noise, seed) in enumerate(((0, 0), (1, 0), (2, 1))):
        base = tiny.causal()
        torch.manual_seed(100 + noise)
        with ignore_peft_warning():
            model, _ = fit(base, tmp_path / str(at), seed=seed, **options)
        models.append({name: weight.detach() for name, weight in model.named_parameters() if "lora_A" in name})
    assert all(torch.equal(weight, models[1][name]) for name, weight in models[0].items())
    assert not any(torch.equal(weight, models[2][name]) for name, weight in models[0].items())


def test_a_check_reads_the_first_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many prompts and rollouts; each against its own reference, so that the reference has a KL of 0."""
    monkeypatch.setattr(offline_groups, "PROMPTS", 2)
    monkeypatch.setattr(offline_groups, "ROLLOUTS", 3)
    reader, groups = GroupReader(tiny.causal()), [make_group(name) for name in ("a", "bb", "ccc")]
    held_out = hold_rollouts(reader, groups, {group.key: reader(group.tokens) for group in groups})

    assert held_out is not None
    assert len(held_out.groups) == 2
    for tokens, targets, group in zip(held_out.groups, held_out.targets, groups, strict=False):
        assert tokens.completions == group.tokens.completions[:3]
        np.testing.assert_allclose(targets, group.rewards[:3] / group.beta - group.log_z)
    check = held_out.check()
    assert (check.prompts, check.rollouts) == (2, 6)
    assert check.kl.value == pytest.approx(0, abs=1e-9)


def test_a_checkpoint_of_16_bits_is_read_into_the_model(tmp_path: Path) -> None:
    """The weights in float32 and, rounded, the model; and what the optimizer remembers."""
    model, folder = tiny.causal().to(torch.bfloat16), RunFolder(tmp_path)
    weights = TrainedWeights.of(model)
    optimizer = build_optimizer(weights, "adamw", 0.1, 0.0)
    for master in weights.masters.values():
        master.grad = torch.ones_like(master)
    optimizer.step()
    trained_weights.save_checkpoint(folder, 3, weights, optimizer)
    other = tiny.causal(1).to(torch.bfloat16)
    found = TrainedWeights.of(other)
    restored = build_optimizer(found, "adamw", 0.1, 0.0)

    assert trained_weights.load_checkpoint(str(folder.find_checkpoint()), found, restored) == 3

    for name, weight in other.named_parameters():
        assert torch.equal(found.masters[name], weights.masters[name])
        assert torch.equal(weight, weights.masters[name].bfloat16())
        one, two = optimizer.state[weights.masters[name]], restored.state[found.masters[name]]
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_states_are_recorded_once_for_all_runs(tmp_path: Path) -> None:
    """A second run reads no group again, nor one with a file of them; all train as runs that record for themselves."""
    groups = [make_group(name) for name in ("a", "bb", "ccc", "dddd")]
    settings = OfflineSettings(steps=2, prompts_a_step=2, completions=8, layers=1, cache_states=True, beta=0.3)

    def fit(folder: str, recorded: RecordedStates | None) -> tuple[Any, int]:
        model, forwards = tiny.causal(), 0

        def count(*_: Any) -> None:
            nonlocal forwards
            forwards += 1

        model.model.layers[0].register_forward_pre_hook(count)
        path = tmp_path / folder
        path.mkdir()
        train(
            GroupReader(model),
            groups[:2],
            groups[2:],
            settings,
            RunFolder(path),
            ReferenceFile(path / "reference.safetensors", "a"),
            recorded=recorded,
        )
        return model.state_dict(), forwards

    recorded = RecordedStates()
    first, read = fit("1", recorded)
    known = dict(recorded.by_tokens)
    second, less = fit("2", recorded)
    alone, as_many = fit("3", None)
    recorded.save(tmp_path / "states.safetensors")
    loaded = RecordedStates.load(tmp_path / "states.safetensors")
    third, as_few = fit("4", loaded)

    assert len(known) == 4
    assert all(recorded.by_tokens[key] is value for key, value in known.items())
    assert less == as_few < read == as_many
    for name, weight in alone.items():
        assert torch.equal(weight, first[name])
        assert torch.equal(weight, second[name])
        assert torch.equal(weight, third[name])
    loaded.open("")
    assert loaded.by_tokens.keys() == known.keys()
    recorded.open("other weights")
    assert not recorded.by_tokens
