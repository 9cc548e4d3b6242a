"""Settings as JSON and back; and that a file from elsewhere runs no code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from calibrated_rewards import BestOf, Exponential, Log, Tabulated, optimum, scaled
from calibrated_rewards.models.labels import Expected
from calibrated_rewards.models.loading import Placement
from calibrated_rewards.models.text import Text
from calibrated_rewards.reward.combined import WeightedMean
from calibrated_rewards.reward.saving import NeedsTrust, read, spelled
from calibrated_rewards.scorers.ensemble import Cost, Ensemble, Min
from calibrated_rewards.scorers.lazy import Loaded
from calibrated_rewards.scorers.loading import FromCheckpoint
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
    again = read(json.loads(json.dumps(spelled(setting))), trust=True)
    assert again == (tuple(setting) if isinstance(setting, list) else setting)


def test_dtypes_go_by_name() -> None:
    """As transformers takes them too."""
    assert spelled(Placement(dtype=torch.bfloat16))["dtype"] == "bfloat16"


def test_secrets_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token is left out, and whoever reads the file brings their own; a url with a password is refused."""
    said = spelled(Remote("http://host:80", Native("m"), token="hush"))
    assert "hush" not in json.dumps(said)
    monkeypatch.setenv("CALIBRATED_REWARDS_TOKEN", "mine")
    monkeypatch.setenv("CALIBRATED_REWARDS_TOKEN_URL", "http://host")
    assert read(said, trust=True).token == "mine"
    secret = dict.fromkeys(("token", "use_auth_token", "hf_token", "api-key", "Authorization", "apiKey"), "hush")
    options = {"model_options": {**secret, "a": 1, "deep": [{"headers": secret, "max_tokens": 2, "eos_token": "x"}]}}
    kept = {"a": 1, "deep": [{"headers": {}, "max_tokens": 2, "eos_token": "x"}]}
    assert spelled(options) == {"model_options": kept}
    assert spelled(Vllm("m", options=options))["options"] == {"model_options": kept}
    with pytest.raises(ValueError, match="no url with a password") as caught:
        spelled({"model_options": {"proxies": {"https": "http://me:hush@proxy:80"}}})
    assert "hush" not in str(caught.value)
    for url in ("http://me:hush@host", "http://hush@host", "http://host/?token=hush", "http://host/t/hush/score"):
        with pytest.raises(ValueError, match="no password and no query") as caught:
            spelled(Remote(url, Native("m")))
        assert "hush" not in str(caught.value)
    monkeypatch.setenv("THE_URL", "http://host/t/hush/score")
    assert spelled(Remote("$THE_URL", Native("m")))["url"] == "$THE_URL"


def test_what_has_no_name_is_not_written() -> None:
    """Lambdas, objects, functions of a main module, numbers that JSON does not have."""
    for thing in (lambda prompts, completions: [], object(), float("nan"), Path("x"), {1: 2}, {"is": "x"}):
        with pytest.raises(TypeError):
            spelled(thing)


def test_a_function_is_imported_only_by_those_who_trust() -> None:
    """Nothing of a file is run on its own word."""
    said = spelled(json.dumps)
    assert said == {"function": "json:dumps"}
    assert read(said, trust=True) is json.dumps
    with pytest.raises(NeedsTrust, match="trust_remote_code=True"):
        read(said)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        read(spelled(FromCheckpoint("x", placement=Placement(trust_remote_code=True))))
    with pytest.raises(NeedsTrust, match=r"would be sent to the server http://host:80"):
        read(spelled(Remote("http://host:80", Native("m"))))


def test_a_file_from_elsewhere_asks_no_server_and_loads_no_kernels() -> None:
    """A url would be sent prompts and a token; options of from_pretrained can bring code by other ways."""
    for risky in (
        Remote("http://host:80", Native("m")),
        Ensemble([Remote("http://host:80", Native("m"))]),
        FromCheckpoint("x", placement=Placement(model_options={"attn_implementation": "someone/kernels"})),
    ):
        assert read(spelled(risky), trust=True) == risky
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            read(spelled(risky))
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
        "calibrated_rewards.theory.transforms.Exponential",
        "calibrated_rewards.nowhere.Thing",
        "calibrated_rewards.theory.transforms.Nothing",
        "calibrated_rewards.theory.transforms.__import__",
        "calibrated_rewards",
        "",
    ],
)
def test_only_our_dataclasses_are_made(name: str) -> None:
    """A name that leads elsewhere is refused, whatever it leads to."""
    with pytest.raises(ValueError, match=r"one of the library's dataclasses|has no"):
        read({"is": name, "t": 1})
