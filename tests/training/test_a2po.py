"""A2PO with known optimal values: TRL's own first stage, the enumerated optimum, and what the recipe refuses."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import enumerable
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.cli.main import main
from calibrated_rewards.reward.calibrators import Uncalibrated
from calibrated_rewards.samplers.loading import load_sampler
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers import load_scorer
from calibrated_rewards.scorers.protocol import fingerprint
from calibrated_rewards.testing.suites import HashScorer, NumberScorer
from calibrated_rewards.theory.transforms import Exponential
from calibrated_rewards.training.check_settings import a2po_settings, check_settings
from calibrated_rewards.training.online import TRLSettings, a2po, train_a2po
from calibrated_rewards.training.online.reference_values import compute_reference_values
from calibrated_rewards.training.run_folder import RunFolder

LENGTH = 2
CHATS = [[{"role": "user", "content": text}] for text in tiny.texts(3)]
SMALL: dict[str, Any] = {"prompts_a_step": 2, "completions": 1, "lr": 1e-3, "rows": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The enumerable model and its tokenizer, saved."""
    at = tmp_path_factory.mktemp("world")
    enumerable.Tabular(LENGTH).save_pretrained(at)
    enumerable.tokenizer().save_pretrained(at)
    return Path(at)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a reward model, chats and a calibrated reward of temperature 1, all saved."""
    root = Path(tmp_path_factory.mktemp("chats"))
    tiny.saved(tiny.causal(), root / "policy", tiny.tokenizer())
    tiny.saved(tiny.classifier(), root / "rm", tiny.tokenizer())
    (root / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": chat}) for chat in CHATS))
    draw, scorer = load_sampler(root / "policy", Decoding(5), dtype="float32"), load_scorer(root / "rm")
    table = calibrate(root / "prompts.jsonl", draw, scorer, k=4, out=root / "run")
    CalibratedReward(scorer, table, beta=0.3).save_pretrained(root / "reward")
    return root


def problem(phi: str) -> tuple[enumerable.Problem, CalibratedReward]:
    """What is known of the enumerable model, and the reward of its references."""
    it = enumerable.Problem.of(enumerable.Tabular(LENGTH), LENGTH, phi)
    return it, CalibratedReward(enumerable.TiedScorer(), it.table(), it.transform)


@dataclass(frozen=True)
class Dying:
    """A reward model that is interrupted at one of its calls."""

    scorer: Any
    dies_at: int
    calls: list[int] = field(default_factory=list)

    def __call__(self, prompts: Any, completions: Any) -> Any:
        """Scores, or Ctrl-C."""
        self.calls.append(len(prompts))
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        return self.scorer(prompts, completions)

    def fingerprint(self) -> dict[str, Any]:
        """That of the one that does not die."""
        return dict(fingerprint(self.scorer))


def load(at: Path) -> Any:
    """The model that was saved."""
    return AutoModelForCausalLM.from_pretrained(at, dtype="float32")


def read_log(out: Path) -> list[dict[str, Any]]:
    """The rows of a log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# TRL asks models by a name that transformers is about to drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_trls_own_first_stage_comes_to_the_known_values(world: Path) -> None:
    """With 20,000 completions a prompt in place of 8: within four standard errors of what the recipe fills in.

    Both agree with beta log Z by enumeration.
    """
    n, (it, reward) = 20_000, problem("exp:10")
    beta = it.beta()
    settings, asked = TRLSettings(beta=beta, steps=1, prompts_a_step=4, completions=1), enumerable.PROMPTS
    args = train_a2po.configure(settings, Decoding(LENGTH), RunFolder(world / "out"))
    parts = (args, world, reward, [Asked(prompt) for prompt in asked], Decoding(LENGTH), settings, None, "float32")
    trainer = train_a2po.build_trainer(*parts)
    known = np.array([trainer._optimal_values[prompt] for prompt in enumerable.PROMPTS])
    trainer.args.num_value_samples = trainer.value_generation_config.num_return_sequences = n

    torch.manual_seed(0)
    trainer._estimate_optimal_values()

    weight = np.exp(enumerable.PHI["exp:10"][1](it.quantiles()) / beta)
    z = (it.laws * weight).sum(1)
    error = beta * np.sqrt((it.laws * (weight / z[:, None] - 1) ** 2).sum(1) / n)
    estimated = np.array([trainer._optimal_values[prompt] for prompt in enumerable.PROMPTS])
    np.testing.assert_allclose(known, beta * np.log(z), atol=1e-3)
    assert (np.abs(estimated - known) < 4 * error + 1e-3).all()
    assert np.ptp(known) > 15 * error.max()  # prompts differ


def test_it_converges_to_the_optimum(world: Path, tmp_path: Path) -> None:
    """pi_ref(y) e^{Phi(C)/beta} / Z, by enumeration: total variation below 0.05 for each prompt, from above 0.5."""
    it, reward = problem("exp:10")
    beta, asked = it.beta(), [Asked(prompt) for prompt in enumerable.PROMPTS]
    size = {"prompts_a_step": 4, "completions": 32, "rows": 128, "save_steps": 10**6}
    settings = TRLSettings(beta=beta, steps=120, lr=0.1, **size)

    model = train_a2po(world, reward, asked, Decoding(LENGTH), settings, tmp_path, show_progress=False)

    trained = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    assert it.distances(enumerable.Tabular(LENGTH), beta).max() > 0.5
    assert it.distances(trained, beta).max() < 0.05
    rows = read_log(tmp_path)
    laws = np.array([enumerable.law(trained, prompt, LENGTH) for prompt in enumerable.PROMPTS])
    assert [row["step"] for row in rows] == [*range(120)]
    assert np.mean([row["kl"] for row in rows[-20:]]) == pytest.approx(it.mean_kl(laws), abs=0.1)
    assert np.mean([row["objective"] for row in rows[-20:]]) == pytest.approx(
        compute_reference_values(reward, asked, beta).optimal.mean(), abs=0.01
    )
    assert all(1 <= row["tokens"] <= LENGTH for row in rows)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_command_goes_on_where_it_was_interrupted(rank: int, chats: Path, tmp_path: Path) -> None:
    """Chats, one completion of each: the weights and the log of a run without the Ctrl-C in its third step."""
    words = [word for name in ("policy", "reward") for word in (f"--{name}", str(chats / name))]
    words += ["--prompts", str(chats / "prompts.jsonl"), "--completions", "1", "--prompts-a-step", "2", "--steps", "4"]
    words += ["--lr", "0.001", "--save-steps", "1", "--lora-rank", str(rank)]

    assert main(["train", "a2po", *words, "--out", str(tmp_path / "whole")]) == 0

    reward = replace(CalibratedReward.from_pretrained(chats / "reward"), name="named")
    settings = TRLSettings(beta=0.3, steps=4, save_steps=1, lora_rank=rank, **SMALL | {"rows": 8})
    given = [Asked(chat) for chat in CHATS], Decoding(5), settings, tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        train_a2po(chats / "policy", replace(reward, scorer=Dying(reward.scorer, 3)), *given, show_progress=False)
    assert [row["step"] for row in read_log(tmp_path / "parts")] == [0, 1]
    train_a2po(chats / "policy", reward, *given, show_progress=False)

    whole, parts = (dict(load(tmp_path / name / "model").named_parameters()) for name in ("whole", "parts"))
    start = dict(load(chats / "policy").named_parameters())
    assert {n: (parts[n] - v).abs().max().item() for n, v in whole.items() if not torch.equal(parts[n], v)} == {}
    bare = {name: name.replace(".base_layer", "") for name in whole}
    moved = [name for name, value in whole.items() if not torch.equal(value, start.get(bare[name], torch.tensor(0)))]
    assert moved
    assert all(("lora" in name) == bool(rank) for name in moved)
    rows, resumed = read_log(tmp_path / "whole"), read_log(tmp_path / "parts")
    for name in ("step", "lr", "reward", "u", "raw", "kl", "objective", "tokens"):
        assert [row[name] for row in resumed] == [row[name] for row in rows], name
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert any(abs(row["kl"]) > 1e-4 for row in rows)
    assert all(row["seconds_lookup"] < row["seconds_scoring"] < row["seconds"] for row in rows)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_checkpoints_own_decoding_is_not_used(chats: Path, tmp_path: Path) -> None:
    """A generation config with the likeliest token alone: completions differ all the same, up to any end token."""
    model = load(chats / "policy")
    model.generation_config.update(top_k=1, top_p=0.1, repetition_penalty=9.0, min_p=0.9, eos_token_id=[9, 10])
    settings = TRLSettings(beta=0.3, steps=1, **SMALL)
    reward = CalibratedReward.from_pretrained(chats / "reward")
    args = train_a2po.configure(settings, Decoding(5), RunFolder(tmp_path))
    asked = [Asked(chat) for chat in CHATS]
    trainer = train_a2po.build_trainer(args, model, reward, asked, Decoding(5), settings, tiny.tokenizer(), "float32")
    config = trainer.generation_config
    whole = (config.top_k, config.top_p, config.min_p, config.repetition_penalty, config.temperature)
    assert whole == (0, 1.0, 0.0, 1.0, 1.0)
    assert {*config.eos_token_id} == {9, 10, tiny.EOS}
    torch.manual_seed(0)
    batch = trainer._prepare_inputs([trainer.train_dataset[0]] * 8)
    drawn = batch["input_ids"][:, -batch["logits_to_keep"] :]
    assert len({tuple(row) for row in drawn.tolist()}) > 4


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"decoding": Decoding(5, temperature=0.9)}, "at temperature 1, got temperature=0.9"),
        ({"decoding": Decoding(5, min_p=0.1)}, "got min_p=0.1"),
        ({"reward": lambda prompts, **_: [0.0] * len(prompts)}, "a2po needs a CalibratedReward"),
        ({"prompts": [Asked("text")]}, "leaves out '<s>', which the tokenizer adds"),
    ],
)
def test_what_a2po_cannot_do_is_refused(changes: dict[str, Any], why: str, chats: Path, tmp_path: Path) -> None:
    """Before anything is trained, with what to do instead."""
    table = ReferenceTable.build([("text", [0.0, 1.0])])
    given = {"prompts": [Asked(CHATS[0])], "decoding": Decoding(5), "reward": CalibratedReward(HashScorer(), table)}
    settings = TRLSettings(steps=1, **SMALL)
    with pytest.raises((ValueError, TypeError), match=why):
        train_a2po(chats / "policy", settings=settings, out=tmp_path, **given | changes)
    assert not (tmp_path / "settings.json").exists()


def test_the_version_of_trl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.5 has no A2PO, and 1.14's ends completions by one token alone."""
    for version in ("1.5.1", "1.14.2"):
        monkeypatch.setattr(a2po, "trl_version", version)
        with pytest.raises(ImportError, match=f"1.15 or later, got trl {version}: train rloo"):
            a2po.import_a2po()
    monkeypatch.setattr(a2po, "trl_version", "1.15.0")
    assert a2po.import_a2po().A2POConfig


@pytest.mark.parametrize("estimator", ["empirical", "posterior"])
def test_values_without_ties_are_those_of_fresh_completions(estimator: Any) -> None:
    """Tables of K = 6 uniform draws, and rewards of new draws: averages over both, within four standard errors."""
    rng, beta, many = np.random.default_rng(0), 0.3, 4000
    names = [f"p{i}" for i in range(many)]
    table = ReferenceTable.build(zip(names, rng.random((many, 6)), strict=True))
    reward = CalibratedReward(NumberScorer(), table, Exponential(3.0), estimator=estimator)
    fresh = reward.from_scores(names, rng.random((many, 20)))

    values = compute_reference_values(reward, [Asked(name) for name in names[:2]], beta)

    for known, each in ((values.mean, fresh.mean(1)), (np.exp(values.optimal / beta), np.exp(fresh / beta).mean(1))):
        np.testing.assert_allclose(known, each.mean(), atol=4 * each.std() / np.sqrt(many))


def test_values_with_ties_are_the_prompts_own() -> None:
    """Two rewards of 0.25 and two of 0.75; and raw scores, of which there is no other average."""
    table = ReferenceTable.build([("p", [0.0, 0.0, 1.0, 1.0])])
    reward = CalibratedReward(NumberScorer(), table)
    values = compute_reference_values(reward, [Asked("p")], 0.5)
    assert values.mean == pytest.approx(0.5)
    assert values.optimal == pytest.approx(0.5 * np.log((np.exp(0.5) + np.exp(1.5)) / 2))
    raw = compute_reference_values(replace(reward, calibration=Uncalibrated()), [Asked("p")], 2.0)
    assert (raw.mean, raw.optimal) == (pytest.approx(0.5), pytest.approx(2 * np.log((1 + np.exp(0.5)) / 2)))
    with pytest.raises(ValueError, match=r"need the prompt's references, got none for '\?'"):
        compute_reference_values(replace(reward, on_missing="neutral"), [Asked("?")], 0.5)


def test_settings_of_a2po() -> None:
    """What TRL has by default is found, and what `a2po_settings` writes has nothing to change."""
    settings = {finding.setting for finding in check_settings({}, framework="trl-a2po", beta=0.001).problems}
    assert settings == {"beta1=0.5", "top_k=None", "filter_all_incorrect=True"}
    report = check_settings(a2po_settings(0.05), framework="trl-a2po", beta=0.05)
    assert (report.problems, report.beta) == ((), 0.05)
