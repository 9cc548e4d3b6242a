"""Offline training where something is wrong: settings, rollouts of others, runs that go too far, and damaged files."""

import json
from math import inf
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import PartialState
from offline_runs import fit, make_group
from rollout_runs import save_run
from safetensors import SafetensorError

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.cli.main import main
from calibrated_rewards.training import loop
from calibrated_rewards.training.offline import trained_weights
from calibrated_rewards.training.offline.group_batches import Group
from calibrated_rewards.training.offline.groups import ReferenceFile
from calibrated_rewards.training.offline.log_probabilities import GroupReader
from calibrated_rewards.training.offline.rollouts import check_source, iterate_rollouts
from calibrated_rewards.training.offline.train import OfflineSettings, check_groups, finish
from calibrated_rewards.training.offline.trained_weights import TrainedWeights, build_optimizer, find_factor
from calibrated_rewards.training.run_folder import RunFolder


def loud(seed: int = 0) -> Any:
    """A model of few layers whose distribution is far from uniform."""
    model = tiny.causal(seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"beta": 0.0}, "needs a beta above 0, got beta=0.0"),
        ({"momentum": 1.0}, "needs a momentum below 1, got momentum=1.0"),
        ({"max_grad_norm": 0.0}, "needs a max_grad_norm above 0, got max_grad_norm=0.0"),
        ({"max_grad_norm": -1.0}, "needs a max_grad_norm above 0, got max_grad_norm=-1.0"),
        ({"lora_layers": 2}, "need a lora_rank, got lora_layers=2 without"),
    ],
)
def test_settings_that_train_nothing_or_upwards_are_refused(changes: dict[str, Any], why: str) -> None:
    """A beta of 0 was the reward's, a negative length of the gradient went up the loss."""
    with pytest.raises(ValueError, match=why):
        OfflineSettings(**changes)


def test_losses_of_more_rollouts_than_there_are_are_refused_before_anything_is_computed() -> None:
    """More than a step takes of a prompt, more than the prompt with the fewest has; and rewards that are all equal."""
    groups = [make_group("a"), make_group("b", K=4)]
    check_groups(groups, OfflineSettings(loss="top-1:4"))
    with pytest.raises(ValueError, match="5 rollouts compete in loss=ipo:5, got prompts with 4, and completions=32"):
        check_groups(groups, OfflineSettings(loss="ipo:5"))
    with pytest.raises(ValueError, match="4 rollouts compete in loss=bonbon:4, got prompts with 4, and completions=3"):
        check_groups(groups, OfflineSettings(loss="bonbon:4", completions=3))
    check_groups([*groups, make_group("c", tied=True)], OfflineSettings())
    with pytest.raises(ValueError, match="got one reward for all of each prompt"):
        check_groups([make_group("c", tied=True)], OfflineSettings())


def test_the_command_refuses_them(run: Path, tmp_path: Path, capsys: Any) -> None:
    """In the words of the command line, and with nothing left behind."""
    words = [f"--{name}={run / name}" for name in ("policy", "reward")] + [f"--rollouts={run / 'run'}"]
    for options, why in (
        ("--loss ipo:5 --held-out 0", "5 rollouts compete in --loss ipo:5, got prompts with 4"),
        ("--beta 0", "needs a beta above 0, got --beta 0"),
    ):
        assert main(["train", "offline", *words, f"--out={tmp_path / 'out'}", *options.split()]) == 2
        assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rollouts_of_others_are_refused(tmp_path: Path) -> None:
    """Of another policy, drawn at another temperature; what is not said is not compared."""
    run = tmp_path / "run"
    save_run(run, [("p", ["a", "b"], [1.0, 2.0])])
    drawn = {"kind": "hf", "weights": "w", "decoding": {"temperature": 1.0, "max_tokens": 5}}
    scorer = {"kind": "named"}
    RunDirectory(run).write_settings({"seed": 0, "sampler": drawn, "scorers": {"reward": scorer}})

    def check(sampler: Any, by: Any = scorer, **options: Any) -> None:
        table = ReferenceTable.build([("p", [1.0, 2.0])], meta={"scorer": by, "sampler": sampler})
        check_source(run, CalibratedReward(None, table), **options)

    check(drawn)
    check({"kind": "vllm", "weights": "w"})
    check(None, None)
    check({**drawn, "weights": "v"}, any_policy=True)
    for change, why in (
        ({"weights": "v"}, "weights is 'w', and 'v' in the table"),
        ({"decoding": {"temperature": 0.7, "max_tokens": 5}}, "decoding.temperature is 1.0, and 0.7 in the table"),
    ):
        with pytest.raises(ValueError, match=why):
            check({**drawn, **change})
        check({**drawn, **change}, any_policy=True)


def test_a_beta_that_makes_rewards_infinite_is_refused(tmp_path: Path) -> None:
    """Weights would be nan: they were written to data sets as such."""
    table = save_run(tmp_path / "run", [("p", ["a", "b"], [1.0, 2.0])])
    with pytest.raises(ValueError, match="a reward over beta is a finite number, got beta=1e-320"):
        next(iterate_rollouts(tmp_path / "run", CalibratedReward(None, table), beta=1e-320))


@pytest.mark.parametrize("rows", [1, 8])
def test_a_prompt_whose_completions_are_all_empty_has_no_gradient(rows: int) -> None:
    """Without a token there is nothing that weights could change."""
    model = tiny.causal()
    ((loss, values),) = GroupReader(model, rows=rows).accumulate_gradients(
        [Group([1, 9], [[], []])], [lambda x: x.sum() + 2]
    )

    assert (loss, values.tolist()) == (2, [0, 0])
    assert all(weight.grad is None for weight in model.parameters())


def test_a_run_that_went_too_far_is_brought_back(tmp_path: Path, capsys: Any) -> None:
    """Log-ratios of a thousand nats cannot be weights: with a KL to end at, a factor on the difference is found."""
    model = loud()
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    _, outcome = fit(model, tmp_path, kl=0.2, lr=1e6, momentum=0.0, max_grad_norm=1.0)

    assert "the policy is too far from the reference" in capsys.readouterr().err
    assert 0 < outcome["alpha"] < 0.1
    assert outcome["held_out"]["held_out/kl"] == pytest.approx(0.2, rel=0.5)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    assert any(not torch.equal(weight, start[name]) for name, weight in model.named_parameters())


def test_a_run_without_a_kl_ends_without_a_check_where_it_went_too_far(tmp_path: Path, capsys: Any) -> None:
    """What was trained is kept; the last row of the log has no numbers of a check."""
    _, outcome = fit(loud(), tmp_path, lr=1e6, momentum=0.0, max_grad_norm=1.0, steps=1)

    assert "the policy is too far from the reference" in capsys.readouterr().err
    assert "held_out" not in outcome
    assert "held_out/kl" not in RunFolder(tmp_path).read_log()[-1]


def test_weights_that_are_no_numbers_are_not_saved() -> None:
    """After the last step nobody looks at them but this."""
    model = tiny.causal()
    weights = TrainedWeights.of(model)
    with torch.no_grad():
        model.lm_head.weight[3, 4] = torch.nan

    with pytest.raises(FloatingPointError, match="trained weights are finite numbers"):
        finish(weights, None, None, OfflineSettings())


def test_a_factor_is_found_below_a_kl_that_cannot_be_measured() -> None:
    """Infinite KLs halve the factor, until one can be measured."""
    factor, kl = find_factor(lambda factor: 0.3 * (factor / 0.05) ** 2 if factor < 0.1 else inf, 0.3, inf)

    assert factor == pytest.approx(0.05, rel=0.02)
    assert kl == pytest.approx(0.3, rel=0.02)


def test_damaged_files_are_named_or_made_again(tmp_path: Path) -> None:
    """A log and a reference that were cut short; a checkpoint, which says what to do, before any weight is changed."""
    model = tiny.causal()
    weights = TrainedWeights.of(model)
    folder = RunFolder(tmp_path)
    trained_weights.save_checkpoint(folder, 3, weights, build_optimizer(weights, "sgd", 0.1, 0.0))
    place = folder.checkpoints / "checkpoint-3"
    assert trained_weights.load_checkpoint(str(place), weights, build_optimizer(weights, "sgd", 0.1, 0.0)) == 3
    with torch.no_grad():
        model.lm_head.weight.fill_(7)
    (place / "optimizer.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"checkpoint-3 cannot be read \(.*\): remove it"):
        trained_weights.load_checkpoint(str(place), weights, build_optimizer(weights, "sgd", 0.1, 0.0))
    assert (model.lm_head.weight == 7).all()

    reference = ReferenceFile(tmp_path / "reference.safetensors", "a")
    reference.save({b"a": torch.ones(2)})
    known = reference.load()
    assert known is not None
    assert known[b"a"].tolist() == [1, 1]
    reference.path.write_bytes(reference.path.read_bytes()[:20])
    assert reference.load() is None

    folder.log.write_text(json.dumps({"step": 0}) + "\n" + '{"step": 1, "lo')
    assert folder.read_log() == [{"step": 0}]
    folder.log.write_text('{"st\n' + json.dumps({"step": 0}) + "\n")
    with pytest.raises(ValueError, match="Unterminated"):
        folder.read_log()


def test_a_checkpoint_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is no error of safetensors to a user; the checkpoint before it stays."""
    weights, folder = TrainedWeights.of(tiny.causal()), RunFolder(tmp_path)
    trained_weights.save_checkpoint(folder, 3, weights, build_optimizer(weights, "sgd", 0.1, 0.0))

    def fill_disk(*_: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(trained_weights, "save_file", fill_disk)
    with pytest.raises(OSError, match="checkpoint-4 cannot be written: No space left"):
        trained_weights.save_checkpoint(folder, 4, weights, build_optimizer(weights, "sgd", 0.1, 0.0))
    assert str(folder.find_checkpoint()).endswith("checkpoint-3")


def test_what_a_kill_left_of_a_file_is_removed(tmp_path: Path) -> None:
    """Of a reference, say, as large as itself; a user's own files stay."""
    left = [f".{name}.{'0f' * 16}" for name in ("settings.json", "log.jsonl", "reference.safetensors")]
    for name in (*left, ".notes.json.old", "log.jsonl"):
        (tmp_path / name).touch()
    RunFolder(tmp_path).begin({})
    assert {each.name for each in tmp_path.iterdir()} == {".notes.json.old", "log.jsonl", "settings.json"}


def test_weights_without_a_gradient_take_part_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert may be idle in one process and not in another, and each mean is of all processes."""
    counted = []

    def count(gradient: Any, how: str) -> Any:
        counted.append((gradient.tolist(), how))
        return gradient / 2

    class Two:
        num_processes = 2

    monkeypatch.setattr(loop, "find_processes", Two)
    monkeypatch.setattr(loop, "reduce", count)
    busy, idle = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    busy.grad = torch.tensor([4.0, 2.0])

    loop.average_gradients(torch.optim.SGD([busy, idle], lr=1.0))

    assert counted == [([4.0, 2.0], "mean"), ([0.0, 0.0], "mean")]
    assert busy.grad.tolist() == [2, 1]
    assert PartialState().num_processes == 1


def test_a_device_that_is_not_here_is_named() -> None:
    """Of a kind that torch does not know; a processor is always there."""
    assert loop.choose_device("cpu") == torch.device("cpu")
    assert loop.choose_device(None) == loop.find_processes().device
    for name in ("cudda", "cuda:99"):
        with pytest.raises(ValueError, match=f"a device is here and known to torch, got device={name}"):
            loop.choose_device(name)
