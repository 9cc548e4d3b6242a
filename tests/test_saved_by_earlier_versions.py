"""What version 0.1 has left on disk is read, and means what it meant: tests/data/make_saved_by_0_1.py wrote it.

The files are never written again. The numbers beside them are from formulas that use nothing of the package, and what
a file says is compared with what it is read as by class name and field, wherever classes stand by now.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_weights, save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaForTokenClassification

# All that is taken from inside the package, for who moves it.
from calibrated_rewards import BestOf, CalibratedReward, ReferenceTable, Standard
from calibrated_rewards.calibration import Asked, calibrate
from calibrated_rewards.calibration.prediction import Amortised
from calibrated_rewards.evaluation.frontier_results import FrontierEstimate
from calibrated_rewards.evaluation.policies import evaluate
from calibrated_rewards.evaluation.report import report
from calibrated_rewards.evaluation.results import Evaluation
from calibrated_rewards.samplers import Decoding
from calibrated_rewards.scorers.implicit import ImplicitReward
from calibrated_rewards.scorers.judge import ExpectedRating, Judge, RatedJudge
from calibrated_rewards.scorers.process import ProcessReward
from calibrated_rewards.testing import HashScorer, NumberSampler, NumberScorer
from calibrated_rewards.training.online import TRLSettings, train_rloo

DATA = Path(__file__).parent / "data"
SAVED = DATA / "saved_by_0_1"
TABLE = json.loads((SAVED / "table.expected.json").read_text())
PROMPTS = [row["prompt"] for row in TABLE["rows"]]
REWARDS = json.loads((SAVED / "rewards.expected.json").read_text())
KINDS = sorted(path.stem for path in (SAVED / "rewards").glob("*.json"))
SCORERS = sorted(path.stem for path in (SAVED / "scorers").glob("*.json"))
# Every class that a reward.json of that version names, by its name alone.
NAMES = """
Affine BestOf BothOrders Calibrated Chain Cost Difference EmpiricalCDF Ensemble Expected Exponential FromCheckpoint
Function HashScorer Identity Label Loaded Log LogSigmoidAtQuantile LowerBound Mean MeanWin MedianCentered Min Native
NormalQuantile NumberScorer OpenRlhf Optimal Ordinal PairClassifier Placement Power Remote SmoothedCDF Standard
Tabulated Text Vllm VllmScore Weighted WorstOf ZScore
"""
# What was calibrated, evaluated and trained on.
CHAT = [{"role": "user", "content": "Hi"}]
RECORDS = [
    {"prompt": prompt, "row": f"row-{at}"}
    for at, prompt in enumerate(["2+2=", CHAT, "Hello", "Why?", "One more", "The last"])
]
JUDGES = {"reward": NumberScorer(), "judge": HashScorer(5)}
CALIBRATION: dict[str, Any] = {"k": 6, "seed": 3, "prompts_per_shard": 2, "id_column": "row", "show_progress": False}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions that the files name can be imported, and the server that one of them names has an address."""
    monkeypatch.syspath_prepend(str(DATA))
    monkeypatch.setenv("REWARD_SERVER", "http://rewards:8000")


@dataclass(frozen=True)
class Unasked:
    """A sampler that was, and must not be asked again."""

    says: tuple[tuple[str, Any], ...] = (("kind", "number"), ("spread", 1.0))

    def __call__(self, prompts: Any, seeds: Any, /) -> Any:
        """Nothing is left to draw."""
        raise AssertionError(f"asked for {prompts}")

    def fingerprint(self) -> dict[str, Any]:
        """As it was when it drew."""
        return dict(self.says)


@dataclass(frozen=True)
class Unmeasured:
    """A KL that was measured, and must not be again."""

    def __call__(self, prompts: Any, rollouts: Any) -> Any:
        """Nothing is left to measure."""
        raise AssertionError(f"measured for {prompts}")

    def fingerprint(self) -> dict[str, Any]:
        """As it was."""
        return {"kind": "shift", "by": 1.0}


@dataclass(frozen=True)
class Length:
    """The features that the predictor was fitted on."""

    def __call__(self, prompts: Any, /) -> np.ndarray:
        """A row each."""
        return np.array([[len(prompt)] for prompt in prompts], np.float32)

    def fingerprint(self) -> dict[str, Any]:
        """What it is."""
        return {"kind": "length"}


def copied(what: str, to: Path) -> Path:
    """A fixture to work in."""
    return Path(shutil.copytree(SAVED / what, to))


def put_together(folder: str, kind: str, at: Path, checkpoints: str = "/checkpoints") -> Path:
    """The directory that a reward.json was of: the table is the same for all."""
    copied("table", at / "table")
    text = (SAVED / folder / f"{kind}.json").read_text()
    (at / "reward.json").write_text(text.replace("/checkpoints", checkpoints))
    return at


def check_read(said: Any, made: Any) -> None:
    """That something is what a file says: a class by its bare name, each of its fields, a function by its place."""
    if isinstance(said, Mapping) and "is" in said:
        assert type(made).__name__ == said["is"].rpartition(".")[2]
        for name in said.keys() - {"is"}:
            check_read(said[name], getattr(made, name))
    elif isinstance(said, Mapping) and "function" in said:
        assert f"{made.__module__}:{made.__qualname__}" == said["function"]
    elif isinstance(said, Mapping):
        assert said.keys() == made.keys()
        for name in said:
            check_read(said[name], made[name])
    elif isinstance(said, list):
        assert len(said) == len(made)
        for each, own in zip(said, made, strict=True):
            check_read(each, own)
    else:
        assert type(made) is type(said)
        assert made == said


def check_all_read(folder: str, kind: str, reward: CalibratedReward) -> dict[str, Any]:
    """That each setting is what its file says; and what that is."""
    said: dict[str, Any] = json.loads((SAVED / folder / f"{kind}.json").read_text())
    settings = {name: value for name, value in said.items() if name not in ("format", "version", "table")}
    assert settings.keys() == {each.name for each in fields(CalibratedReward)} - {"table", "originals"}
    for name, value in settings.items():
        check_read(value, getattr(reward, name))
    return settings


def names_in(said: Any) -> Iterator[str]:
    """The classes that a file names, by the last part."""
    if isinstance(said, Mapping) and "is" in said:
        yield said["is"].rpartition(".")[2]
    inside = said.values() if isinstance(said, Mapping) else said if isinstance(said, list) else []
    for each in inside:
        yield from names_in(each)


def test_the_files_name_every_class() -> None:
    """None of the kinds went missing from the fixtures, and none of the classes from the list."""
    files = [*(SAVED / "rewards").glob("*.json"), *(SAVED / "scorers").glob("*.json")]
    found = {name for file in files for name in names_in(json.loads(file.read_text()))}
    assert found == set(NAMES.split())
    assert sorted(REWARDS["rewards"]) == KINDS


def test_a_table() -> None:
    """Rows with ties and of different lengths, by prompt, by chat, by id and by another name; probes and meta."""
    table = ReferenceTable.load(SAVED / "table", verify=True)
    assert len(table) == len(PROMPTS)
    assert table.meta == TABLE["meta"]
    for row in TABLE["rows"]:
        (at,) = table.rows([row["prompt"]]).tolist()
        assert table.scores(at).tolist() == sorted(row["scores"])
        assert table.counts([at]).tolist() == [len(row["scores"])]
        assert table.rows(row["aliases"]).tolist() == [at] * len(row["aliases"])
        assert table.rows(["?"] * len(row["ids"]), row["ids"]).tolist() == [at] * len(row["ids"])
    assert table.find(["unknown"]).tolist() == [-1]


@pytest.mark.parametrize("kind", KINDS)
def test_rewards(kind: str, tmp_path: Path) -> None:
    """Each transform, estimator, scale and calibration: the settings of the file, and the values of the formula."""
    reward = CalibratedReward.from_pretrained(put_together("rewards", kind, tmp_path / "old"), trust_remote_code=True)
    said = check_all_read("rewards", kind, reward)
    asked, raw = [PROMPTS[at] for at, _ in REWARDS["asked"]], [score for _, score in REWARDS["asked"]]
    expected = REWARDS["rewards"][kind]
    np.testing.assert_allclose(reward.from_scores(asked, raw), expected, rtol=1e-8, atol=1e-8)
    by_id = {} if reward.id_column is None else {reward.id_column: [7 if p == "by id" else None for p in asked]}
    found = reward(asked, [str(score) for score in raw], **by_id)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)
    if said["on_missing"] != "raise":
        unknown = {name: [None] for name in by_id}
        assert reward(["unknown"], ["1"], **unknown) == [{"neutral": 0.5, "skip": None}[said["on_missing"]]]
    reward.save_pretrained(tmp_path / "new")
    again = CalibratedReward.from_pretrained(tmp_path / "new", trust_remote_code=True)
    check_all_read("rewards", kind, again)
    np.testing.assert_array_equal(again.from_scores(asked, raw), reward.from_scores(asked, raw))


@pytest.mark.parametrize("kind", SCORERS)
def test_scorers(kind: str, tmp_path: Path) -> None:
    """Each kind of scorer is read as the file says, none of them loaded or asked, and is saved again."""
    reward = CalibratedReward.from_pretrained(put_together("scorers", kind, tmp_path / "old"), trust_remote_code=True)
    check_all_read("scorers", kind, reward)
    reward.save_pretrained(tmp_path / "new")
    again = CalibratedReward.from_pretrained(tmp_path / "new", trust_remote_code=True)
    check_all_read("scorers", kind, again)


ASKED, ANSWERED = ["2+2=", "2+2=", "alone"], ["It is 4!!", "no", "-1.5 it is!"]
NUMBER, LENGTH = np.array([4.0, 0.0, -1.5]), np.array([9.0, 2.0, 11.0])
BOTH = np.stack([NUMBER, LENGTH])
WITHOUT_MODEL = {
    "number": [4.0, -1.0, -1.5],
    "function-by-name": LENGTH,
    "function": [2.0, 0.0, 1.0],
    "cost": -NUMBER,
    "ensemble-mean": ((NUMBER - 1) / 2 + LENGTH) / 2,
    "ensemble-min": BOTH.min(0),
    "ensemble-lower-bound": BOTH.mean(0) - 0.5 * np.abs(NUMBER - LENGTH) / 2,
    "ensemble-own": np.median([NUMBER, LENGTH, -NUMBER], axis=0),
    # Against "12" and "1234".
    "mean-win": [1.0, 0.25, 1.0],
    "mean-win-both-orders": [1.0, 0.25, 1.0],
}


@pytest.mark.parametrize("kind", WITHOUT_MODEL)
def test_scorers_without_a_model(kind: str, tmp_path: Path) -> None:
    """They score as they did."""
    reward = CalibratedReward.from_pretrained(put_together("scorers", kind, tmp_path), trust_remote_code=True)
    np.testing.assert_allclose(reward.raw(ASKED, ANSWERED), np.float32(WITHOUT_MODEL[kind]), rtol=1e-6)


@pytest.mark.parametrize("kind", ["function", "function-by-name", "remote-native", "remote-vllm", "checkpoint-placed"])
def test_what_needs_trust_still_does(kind: str, tmp_path: Path) -> None:
    """A function, a server and options for loading a checkpoint are not taken from a file on its own word."""
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        CalibratedReward.from_pretrained(put_together("scorers", kind, tmp_path))


TEXTS = tiny.texts(4, 0), tiny.texts(4, 1)


def rows_of(joined: bool = True) -> list[Any]:
    """The tokens of each text, or pair of texts, by the tokenizer alone."""
    pairs = zip(*TEXTS, strict=True)
    return [tiny.tokenizer()(*([p + c] if joined else [p, c]), return_tensors="pt") for p, c in pairs]


def logits_of(model: Any, rows: list[Any]) -> torch.Tensor:
    """The model's own, a row at a time."""
    with torch.inference_mode():
        return torch.stack([model(**row).logits[0].float() for row in rows])


# Outputs of a classifier of each kind, and how they make one score.
CLASSIFIERS: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "plain": (1, lambda logits: logits[:, 0]),
    "first-rules": (2, lambda logits: logits[:, 1] - logits[:, 0]),
    "ordinal-cost": (3, lambda logits: -logits.sigmoid().sum(1)),
    "sequence-classifier": (3, lambda logits: logits.softmax(1) @ torch.tensor([1.0, 2.0, 3.0])),
}
WRITERS: dict[str, Callable[..., Any]] = {
    "judge": partial(Judge, good="a", bad="b"),
    "expected-rating": partial(ExpectedRating, high=3),
    "rated-judge": partial(RatedJudge, unparsed=0.5, max_new_tokens=2),
}


def classifier(kind: str, at: Path) -> torch.Tensor:
    """A checkpoint that classifies a text, and the scores that its own forward gives."""
    outputs, score = CLASSIFIERS[kind]
    # By today's rules these names would turn the score round.
    names = {"id2label": {0: "win", 1: "lose"}} if kind == "first-rules" else {}
    model = tiny.classifier(num_labels=outputs, **names)
    tiny.saved(model, at, tiny.tokenizer())
    rows = rows_of()
    if kind == "sequence-classifier":  # max_length=24: the first token, and the last 23
        rows = [{n: torch.cat([t[:, :1], t[:, 1:][:, -23:]], 1) for n, t in row.items()} for row in rows]
    return score(logits_of(model, rows))


def pair_reader(at: Path) -> torch.Tensor:
    """A checkpoint that classifies a pair of texts."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=128, num_labels=1, **small)
    model = BertForSequenceClassification(config).eval()
    tiny.saved(model, at, tiny.tokenizer())
    return logits_of(model, rows_of(joined=False))[:, 0]


def steps_reader(at: Path) -> Any:
    """A checkpoint that classifies tokens."""
    torch.manual_seed(0)
    model = LlamaForTokenClassification(tiny.config(num_labels=2)).eval()
    tiny.saved(model, at, tiny.tokenizer())
    return ProcessReward(model, tiny.tokenizer(), mark="<|end|>", label=1, reduce="min")(*TEXTS)


def writer(kind: str, at: Path) -> Any:
    """A checkpoint that writes, and what it gives."""
    model, words = tiny.causal(), tiny.tokenizer()
    tiny.saved(model, at, words)
    if kind == "implicit":
        reference = tiny.causal(1)
        tiny.saved(reference, at.parent / "reference", words)
        return ImplicitReward(model, words, reference, beta=0.5)(*TEXTS)
    if kind == "token-logit":
        with torch.inference_mode():
            return [model(**row).logits[0, -1, 0] for row in rows_of()]
    return WRITERS[kind](model, words)(*TEXTS)


CUSTOM = """
import torch
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.utils import ModelOutput


class TwoScores(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.help = torch.nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return ModelOutput(score=self.help(states[torch.arange(len(states)), attention_mask.sum(1) - 1]))
"""


def with_head(kind: str, at: Path) -> torch.Tensor:
    """A checkpoint with a head beside its body, which reads the last state: one value, or two of code of its own."""
    model = tiny.causal()
    tiny.saved(model.model, at, tiny.tokenizer())
    custom = kind == "multi-attribute"
    torch.manual_seed(1)
    head, bias = torch.randn(1 + custom, 32), torch.randn(1 + custom)
    name = "help" if custom else "v_head.summary"
    body = {f"model.{key}": weight for key, weight in load_weights(at / "model.safetensors").items()}
    save_file({**body, f"{name}.weight": head, f"{name}.bias": bias}, at / "model.safetensors", {"format": "pt"})
    config = json.loads((at / "config.json").read_text())
    if custom:
        (at / "two_scores.py").write_text(CUSTOM)
        config |= {"architectures": ["TwoScores"], "auto_map": {"AutoModel": "two_scores.TwoScores"}}
    else:
        config["architectures"] = ["LlamaForCausalLM"]
    (at / "config.json").write_text(json.dumps(config))
    with torch.inference_mode():
        last = torch.stack([model(**row, output_hidden_states=True).hidden_states[-1][0, -1] for row in rows_of()])
        values = last @ head.T + bias
    return values @ torch.tensor([1.0, -0.5]) if custom else values[:, 0]


CHECKPOINTS: dict[str, Callable[[Path], Any]] = {
    **{kind: partial(classifier, kind) for kind in CLASSIFIERS},
    "cross-encoder": pair_reader,
    "process": steps_reader,
    **{kind: partial(writer, kind) for kind in (*WRITERS, "token-logit", "implicit")},
    **{kind: partial(with_head, kind) for kind in ("value-head", "multi-attribute")},
}
# A file is named for what is special about it, a checkpoint for what it is.
FOLDERS = {"plain": "classifier", "ordinal-cost": "ordinal"}


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Custom code is copied to a folder of the test's, and forgotten afterwards."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.filterwarnings("ignore:.*longer than max_length=24:UserWarning")
@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints(kind: str, tmp_path: Path) -> None:
    """A file that names a checkpoint loads it, as its kind and with its options."""
    expected = np.asarray(CHECKPOINTS[kind](tmp_path / "checkpoints" / FOLDERS.get(kind, kind)))
    at = put_together("scorers", f"checkpoint-{kind}", tmp_path / "reward", str(tmp_path / "checkpoints"))
    reward = CalibratedReward.from_pretrained(at, trust_remote_code=kind == "multi-attribute")
    assert reward.scorer is not None
    np.testing.assert_allclose(reward.scorer(*TEXTS), expected, rtol=1e-4, atol=1e-4)
    assert np.ptp(expected) > 0 or kind == "rated-judge"  # which writes no number


def test_a_whole_reward() -> None:
    """A directory with a table and prompts of its own: it is verified, and reads a prompt in another form."""
    reward = CalibratedReward.from_pretrained(SAVED / "experiment" / "reward")
    assert reward.verify().probes == 12
    assert reward.beta == 0.4
    drawn = rollouts_of(SAVED / "experiment" / "table")
    for prompt, rows in drawn.items():
        references = [np.float32(row["completion"]) for row in rows]
        u = np.mean([np.heaviside(0.5 - float(each), 0.5) for each in references])
        asked = json.loads(prompt) if prompt.startswith("[") else prompt
        np.testing.assert_allclose(reward([asked], ["0.5"]), np.expm1(5 * u) / np.expm1(5), rtol=1e-12)
    assert reward.originals is not None
    assert reward.originals(reward.table.rows([record["prompt"] for record in RECORDS])) == [
        record["prompt"] for record in RECORDS
    ]


def rollouts_of(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of a run's shards by prompt, read without the package; prompts of a chat are JSON."""
    prompts = {
        row["key"]: row["prompt"] for file in sorted(run.glob("prompts/*")) for row in pq.read_table(file).to_pylist()
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(run.glob("rollouts/*")):
        for row in pq.read_table(file).to_pylist():
            found.setdefault(prompts[row["key"]], []).append(row)
    return found


def check_same_run(at: Path, complete: Path) -> None:
    """Tables and settings to the byte, shards to the row and to the state in their schemas."""
    files = {path.relative_to(complete) for path in complete.rglob("*") if path.is_file()}
    assert {path.relative_to(at) for path in at.rglob("*") if path.is_file() and path.name != ".lock"} == files
    for file in files:
        if file.suffix == ".parquet":  # the library that wrote it signs it
            assert pq.read_table(at / file).equals(pq.read_table(complete / file), check_metadata=True), file
        elif file.name != ".made_of":
            assert (at / file).read_bytes() == (complete / file).read_bytes(), file


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    """To what the uninterrupted one has, and what an uninterrupted one of now has, to the byte."""
    at = copied("interrupted", tmp_path / "resumed")
    assert len([*at.glob("rollouts/*.parquet")]) == 1
    first = (at / "rollouts" / "00000.parquet").read_bytes()
    calibrate(RECORDS, NumberSampler(), JUDGES, at, **CALIBRATION)
    assert (at / "rollouts" / "00000.parquet").read_bytes() == first
    check_same_run(at, SAVED / "experiment" / "table")
    calibrate(RECORDS, NumberSampler(), JUDGES, tmp_path / "new", **CALIBRATION)
    check_same_run(tmp_path / "new", SAVED / "experiment" / "table")


def test_a_complete_run_is_asked_for_nothing(tmp_path: Path) -> None:
    """Its prompts, ids and rollouts are taken as they are; a larger K adds to them."""
    at = copied("experiment/table", tmp_path / "run")
    tables = calibrate(None, Unasked(), JUDGES, at, k=6, seed=3, show_progress=False)
    drawn = rollouts_of(at)
    assert len(drawn) == len(RECORDS)
    for name in JUDGES:
        for at_row, record in enumerate(RECORDS):
            prompt = record["prompt"]
            kept = [row[f"score:{name}"] for row in drawn[prompt if isinstance(prompt, str) else json.dumps(prompt)]]
            assert tables[name].rows([prompt]) == tables[name].rows(["?"], [f"row-{at_row}"])
            assert tables[name].scores(int(tables[name].rows([prompt])[0])).tolist() == sorted(kept)
    check_same_run(at, SAVED / "experiment" / "table")
    more = calibrate(None, NumberSampler(), {"reward": NumberScorer()}, at, k=8, seed=3, show_progress=False)
    for prompt, rows in rollouts_of(at).items():
        assert [row["completion"] for row in rows][:6] == [row["completion"] for row in drawn[prompt]]
        assert len(rows) == 8
    assert more["reward"].counts(np.arange(6)).tolist() == [8] * 6


def test_a_reward_model_is_added_to_a_run(tmp_path: Path) -> None:
    """Its rollouts are scored by another one, and nothing is drawn."""
    at = copied("unscored", tmp_path / "run")
    calibrate(RECORDS, None, {"judge": HashScorer(5)}, at, **CALIBRATION)
    check_same_run(at, SAVED / "experiment" / "table")


def test_a_scorer_with_names_of_the_package_in_it(tmp_path: Path) -> None:
    """A function of the user's that calls the package is the same scorer, wherever the package's modules are by now."""
    at = copied("callable", tmp_path / "run")
    scorer = import_module("functions_of_saved_rewards").risen
    found = calibrate(None, Unasked(), {"risen": scorer}, at, k=2, seed=3, show_progress=False)["risen"]
    u = [sorted(1 / (1 + len(row["completion"])) for row in rows) for rows in rollouts_of(at).values()]
    expected = np.expm1(2 * np.sort(u, axis=0)) / np.expm1(2)
    scores = [found.scores(row).tolist() for row in range(2)]
    np.testing.assert_allclose(np.sort(scores, axis=0), expected, rtol=1e-6)


def test_an_import(tmp_path: Path) -> None:
    """Scores that came with the rollouts; a reward model is added."""
    at = copied("imported", tmp_path / "run")
    table = ReferenceTable.load(at, verify=True)
    rows = table.rows([record["prompt"] for record in RECORDS[:3]])
    assert [table.scores(row).tolist() for row in rows.tolist()] == [[0.0, 1.0, 2.5]] * 3
    added = calibrate(None, None, {"length": NumberScorer(7.0)}, at, show_progress=False)["length"]
    assert [added.scores(row).tolist() for row in added.rows(["2+2=", "Hello"]).tolist()] == [[1.0, 2.5, 7.0]] * 2


def test_an_evaluation(tmp_path: Path) -> None:
    """Its numbers by counting in its rollouts; the same call draws nothing, and writes the same numbers."""
    at = copied("experiment/evaluation", tmp_path / "evaluation")
    found = Evaluation.load(at / "evaluation.json")
    assert (found.selected_by, found.prompts, found.completions) == ("reward", 6, 4)
    (policy,) = found.policies
    assert policy.kl is not None
    assert policy.kl.value == 0.5
    ours, theirs = rollouts_of(at / "shifted"), rollouts_of(at / "reference")
    for judge in JUDGES:
        mean = np.mean([row[f"score:{judge}"] for rows in ours.values() for row in rows])
        np.testing.assert_allclose(policy.scores[judge].value, mean, rtol=1e-6)
        for n, procedure in ((1, "Standard()"), (2, "BestOf(n=2)")):
            rates = []
            for prompt in ours:
                best, base = (chosen(rows[prompt], n, judge) for rows in (ours, theirs))
                rates.append(np.mean([np.heaviside(a - b, 0.5) for a in best for b in base]))
            np.testing.assert_allclose(policy.win_rates[judge][procedure].value, np.mean(rates), rtol=1e-6)
    before = (at / "evaluation.json").read_bytes()
    shifted = Unasked((("kind", "shifted"), ("by", 1.0)))
    settings: dict[str, Any] = {"m": 4, "seed": 11, "prompts_per_shard": 4, "id_column": "row", "show_progress": False}
    again = evaluate(
        {"shifted": shifted},
        Unasked(),
        RECORDS,
        JUDGES,
        at,
        procedures=(Standard(), BestOf(2)),
        divergence={"shifted": Unmeasured()},
        **settings,
    )
    # The file was written on another processor, and processors differ in the last bits of a sum.
    after = (at / "evaluation.json").read_bytes()
    then, now = (dict(list_values(json.loads(each))) for each in (before, after))
    assert {at: value for at, value in now.items() if not isinstance(value, float)} == {
        at: value for at, value in then.items() if not isinstance(value, float)
    }
    floats = {at: value for at, value in then.items() if isinstance(value, float)}
    assert {at: now[at] for at in floats} == pytest.approx(floats, rel=1e-12)
    assert again == Evaluation.load(at / "evaluation.json")


def list_values(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """List the values of a JSON document, each by its place."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from list_values(each, f"{at}/{key}")
    else:
        yield at, value


def chosen(rows: list[dict[str, Any]], n: int, judge: str) -> list[float]:
    """The judge's score of the best of each n by the reward."""
    best = [max(some, key=lambda row: row["score:reward"]) for some in combinations(rows, n)]
    return [row[f"score:{judge}"] for row in best]


def test_a_frontier() -> None:
    """Each arm's beta gives its KL, and its win rate, by the weights of the rollouts themselves."""
    found = FrontierEstimate.load(SAVED / "experiment" / "frontier.json")
    assert (found.prompts, found.rollouts, found.selected_by) == (6, 6, "reward")
    assert [(point.arm, point.kl) for point in found.points] == [
        (arm, kl) for kl in (0.1, 0.3) for arm in ("identity", "exp:10")
    ]
    u = np.arange(6) / 6 + 1 / 12
    for point in found.points:
        values = u if point.arm == "identity" else np.exp(10 * u) / (np.exp(10) - 1)
        weights = np.exp(values / point.beta) / np.exp(values / point.beta).sum()
        np.testing.assert_allclose((weights * np.log(6 * weights)).sum(), point.kl, rtol=1e-6)
        # By the score that selects, a rollout meets itself too, for one half.
        rate = (weights * (np.arange(6) + 0.5) / 6).sum()
        np.testing.assert_allclose(point.win_rates["reward"]["Standard()"].value, rate, rtol=1e-6)


def training(at: Path, **changes: Any) -> Path:
    """The run, asked for again."""
    asked = [Asked(record["prompt"]) for record in RECORDS if isinstance(record["prompt"], str)]
    reward = CalibratedReward.from_pretrained(SAVED / "experiment" / "reward")
    small = {"steps": 2, "prompts_a_step": 2, "completions": 2, "lr": 1e-3, "rows": 2, **changes}
    settings = TRLSettings(**small)
    given = (at.parent / "policy", reward, asked, Decoding(5, temperature=0.9), settings)
    return Path(train_rloo(*given, at, show_progress=False))


def test_a_training_run_is_known_again(tmp_path: Path) -> None:
    """The same call finds it finished and leaves it; another one is refused, and told what differs."""
    at = copied("experiment/trained", tmp_path / "trained")
    (tmp_path / "policy").mkdir()
    settings = at / "settings.json"
    settings.write_text(settings.read_text().replace("/checkpoints", str(tmp_path)))
    (at / "model").mkdir()
    log = (at / "log.jsonl").read_bytes()
    assert training(at) == at / "model"
    assert (at / "log.jsonl").read_bytes() == log
    assert [*(at / "model").iterdir()] == []
    with pytest.raises(ValueError, match=r"settings\.beta was 0\.1, is 0\.2"):
        training(at, beta=0.2)


def test_a_report(tmp_path: Path) -> None:
    """All parts of the experiment are found, and read: the page has a section of each."""
    text = report(copied("experiment", tmp_path / "experiment")).read_text()
    said = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(svg|style).*?</\1>", " ", text)))
    for part in ("What was trained", "train_rloo", "e 5u", "shifted", "2 steps", "e 10u"):
        assert part in said, part


def test_a_predictor() -> None:
    """Its quantiles by the arrays in its file: location and scale linear in the features, and one curve for all."""
    found = Amortised.load(SAVED / "predictor", Length())
    arrays = load_file(SAVED / "predictor" / "amortised.safetensors")
    assert found.errors.chosen == "+ location"
    for length in (7, 100):
        place = np.clip(length * arrays["weights"][0] + arrays["intercept"], arrays["low"], arrays["high"])
        level = arrays["curve.levels"][[3, 10]]
        expected = place[0] + np.exp(place[1]) * arrays["curve.values"][[3, 10]]
        np.testing.assert_allclose(found.quantiles(["b" * length], level)[0], expected, rtol=1e-9)
        np.testing.assert_allclose(found.cdf(["b" * length] * 2, expected), level, rtol=1e-9)
    with pytest.raises(ValueError, match="other features"):
        Amortised.load(SAVED / "predictor", Length().__call__)
