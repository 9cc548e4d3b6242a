"""Settings as JSON and back; and that a file from elsewhere runs no code."""

import json
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from calibrated_rewards import BestOf, Exponential, Log, Tabulated, optimum, scaled
from calibrated_rewards.models.labels import Difference, Expected
from calibrated_rewards.models.loading import Placement
from calibrated_rewards.models.text import Text
from calibrated_rewards.reward.combined import WeightedMean
from calibrated_rewards.reward.hub import find_checkpoints
from calibrated_rewards.reward.saving import CLASSES, NeedsTrust, from_json, to_json
from calibrated_rewards.scorers.ensemble import Cost, Ensemble, Min
from calibrated_rewards.scorers.loading import FromCheckpoint
from calibrated_rewards.scorers.protocol import Loaded
from calibrated_rewards.scorers.remote import Native, Remote
from calibrated_rewards.scorers.remote_vllm import Vllm
from calibrated_rewards.testing.suites import HashScorer, NumberScorer

OPTIONS = {"labels": Expected((1.0, 2.0)), "text": Text(max_length=5, strip=("</s>",))}
SETTINGS = [
    None,
    [1, 2.5, "a", True],
    Exponential(5.0),
    scaled(Log(), "standard"),
    optimum(BestOf(4), kl=1.0).transform,
    Tabulated([0.0, 0.5, 1.0], [0.0, 0.1, 1.0]),
    WeightedMean((1.0, 2.0)),
    Ensemble([NumberScorer(), HashScorer(3)], Min(), scales=[1.0, 2.0]),
    Cost(NumberScorer()),
    Remote("http://host:80", Native("m"), batch_size=3),
    Loaded(FromCheckpoint("/x/y", kind="judge", placement=Placement(dtype="bfloat16"), options=OPTIONS)),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda each: type(each).__name__)
def test_what_is_written_is_read(setting: Any) -> None:
    """By way of JSON text; lists come back as tuples."""
    again = from_json(json.loads(json.dumps(to_json(setting))), trust=True)
    assert again == (tuple(setting) if isinstance(setting, list) else setting)


def test_dtypes_go_by_name() -> None:
    """As transformers takes them too."""
    assert to_json(Placement(dtype=torch.bfloat16))["dtype"] == "bfloat16"


def test_secrets_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token is left out, and whoever reads the file brings their own; a url with a password is refused."""
    said = to_json(Remote("http://host:80", Native("m"), token="hush"))
    assert "hush" not in json.dumps(said)
    monkeypatch.setenv("CALIBRATED_REWARDS_TOKEN", "mine")
    monkeypatch.setenv("CALIBRATED_REWARDS_TOKEN_URL", "http://host")
    assert from_json(said, trust=True).token == "mine"
    secret = dict.fromkeys(("token", "use_auth_token", "hf_token", "api-key", "Authorization", "apiKey"), "hush")
    options = {"model_options": {**secret, "a": 1, "deep": [{"headers": secret, "max_tokens": 2, "eos_token": "x"}]}}
    kept = {"a": 1, "deep": [{"headers": {}, "max_tokens": 2, "eos_token": "x"}]}
    assert to_json(options) == {"model_options": kept}
    assert to_json(Vllm("m", options=options))["options"] == {"model_options": kept}
    with pytest.raises(ValueError, match="no url with a password") as caught:
        to_json({"model_options": {"proxies": {"https": "http://me:hush@proxy:80"}}})
    assert "hush" not in str(caught.value)
    for url in ("http://me:hush@host", "http://hush@host", "http://host/?token=hush", "http://host/t/hush/score"):
        with pytest.raises(ValueError, match="no password and no query") as caught:
            to_json(Remote(url, Native("m")))
        assert "hush" not in str(caught.value)
    monkeypatch.setenv("THE_URL", "http://host/t/hush/score")
    assert to_json(Remote("$THE_URL", Native("m")))["url"] == "$THE_URL"


def test_what_has_no_name_is_not_written() -> None:
    """Lambdas, objects, functions of a main module, numbers that JSON does not have."""
    for thing in (lambda prompts, completions: [], object(), float("nan"), Path("x"), {1: 2}, {"is": "x"}):
        with pytest.raises(TypeError):
            to_json(thing)


def test_a_function_is_imported_only_by_those_who_trust() -> None:
    """Nothing of a file is run on its own word."""
    said = to_json(json.dumps)
    assert said == {"function": "json:dumps"}
    assert from_json(said, trust=True) is json.dumps
    with pytest.raises(NeedsTrust, match="trust_remote_code=True"):
        from_json(said)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        from_json(to_json(FromCheckpoint("x", placement=Placement(trust_remote_code=True))))
    with pytest.raises(NeedsTrust, match=r"would be sent to the server http://host:80"):
        from_json(to_json(Remote("http://host:80", Native("m"))))


def test_a_file_from_elsewhere_asks_no_server_and_loads_no_kernels() -> None:
    """A url would be sent prompts and a token; options of from_pretrained can bring code by other ways."""
    for risky in (
        Remote("http://host:80", Native("m")),
        Ensemble([Remote("http://host:80", Native("m"))]),
        FromCheckpoint("x", placement=Placement(model_options={"attn_implementation": "someone/kernels"})),
    ):
        assert from_json(to_json(risky), trust=True) == risky
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            from_json(to_json(risky))
    with pytest.raises(ValueError, match="no argument of its own"):
        Placement(model_options={"trust_remote_code": True})


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.Popen",
        "calibrated_rewards.table.reference_table.ReferenceTable",
        "calibrated_rewards.reward.saving.import_module",
        "calibrated_rewards.reward.saving.Any",
        "calibrated_rewards.adapters.trl_reward.reward",
        "calibrated_rewards.calibration.on_demand.OnTheSpot",
        "calibrated_rewards.theory.transforms.np",
        "os.Exponential",
        "calibrated_rewardsx.Exponential",
        "Exponential.calibrated_rewards",
        ".Exponential",
        "system",
        "ReferenceTable",
        "CalibratedReward",
        "calibrated_rewards.nowhere.Thing",
        "calibrated_rewards.theory.transforms.Nothing",
        "calibrated_rewards.theory.transforms.__import__",
        "calibrated_rewards",
        "",
    ],
)
def test_only_our_dataclasses_are_made(name: str) -> None:
    """A name that leads elsewhere is refused, whatever it leads to."""
    with pytest.raises(ValueError, match="one of the library's dataclasses"):
        from_json({"is": name, "t": 1})


@pytest.mark.parametrize(
    "path", ["", "calibrated_rewards.", "calibrated_rewards.transforms.", "calibrated_rewards.a.b."]
)
def test_classes_are_found_by_the_last_part_of_their_name(path: str) -> None:
    """A file of an older version names a module of that version, and means the class."""
    assert from_json({"is": f"{path}Exponential", "t": 1.5}) == Exponential(1.5)
    assert from_json({"is": f"{path}Difference", "good": 2, "bad": 1}) == Difference(2, 1)


def test_the_listed_classes_are_there() -> None:
    """Each is a dataclass of the module that is named, under the name that is on disk."""
    for name, module in CLASSES.items():
        cls = getattr(import_module(module), name)
        assert (cls.__module__, cls.__name__, is_dataclass(cls)) == (module, name, True)


@pytest.mark.parametrize("path", ["", "calibrated_rewards.scorers.checkpoint."])
def test_checkpoints_are_found_in_a_scorer(path: str) -> None:
    """Wherever they are, under the name of now and of older files: a local folder is not pushed to the Hub unsaid."""
    leaf = {"is": f"{path}FromCheckpoint", "name": "/x/y"}
    nested = {"is": "Ensemble", "members": [{"is": "Loaded", "recipe": leaf}, {"is": "Cost", "name": "no"}]}
    assert find_checkpoints(nested) == ["/x/y"]
    scorer = Loaded(FromCheckpoint("/x/y"))
    assert find_checkpoints(to_json(Ensemble([Cost(scorer), scorer]))) == ["/x/y"] * 2
