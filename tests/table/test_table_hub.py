"""Tables on the Hub: the real huggingface_hub against a server of forty lines, plain directories, cards, rollouts."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from hub import COMMIT, serving
from huggingface_hub import DatasetCard
from PIL import Image

from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.table import card, hub as table_hub
from calibrated_rewards.table.card import describe_table, escape, find_hub_names, find_secrets, list_settings
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer

REPO = "someone/references"


@pytest.fixture
def hub(tmp_path):
    """A hub with one dataset."""
    with serving(REPO, "/datasets", tmp_path / "home") as found:
        yield found


def test_push_and_pull_through_the_real_client(hub, tmp_path):
    """What was pushed comes back, checked; nothing else of the repository is downloaded."""
    handler, environment = hub
    before = handler.stored["README.md"]
    code = f"""
        from calibrated_rewards.table.reference_table import ReferenceTable
        table = ReferenceTable.build([(str(i), [i, 2.0]) for i in range(100)], meta={{"scorer": "x"}})
        print(table.push_to_hub({REPO!r}, private=True, token="secret", card=False))
        again = ReferenceTable.from_pretrained({REPO!r}, revision="main", verify=True, token="secret")
        again.save({str(tmp_path / "pulled")!r})
        table.save({str(tmp_path / "pushed")!r})
        print(again.path)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    url, snapshot = done.stdout.split()

    assert url.endswith(f"/datasets/{REPO}/commit/{COMMIT}")
    created, *_ = handler.requests
    assert json.loads(created[2])["type"] == "dataset"
    assert "private" in created[2].decode()
    assert {authorization for _, authorization, _ in handler.requests} == {"Bearer secret"}
    assert sorted(os.listdir(snapshot)) == ["table.json", "table.safetensors"]
    assert handler.stored["README.md"] == before
    for name in os.listdir(snapshot):
        contents = {(tmp_path / way / name).read_bytes() for way in ("pulled", "pushed")} | {handler.stored[name]}
        assert len(contents) == 1


def test_from_pretrained_takes_a_directory(tmp_path):
    """Without a word to any server."""
    table = ReferenceTable.build([("a", [1.0, 2.0])])
    table.save_pretrained(tmp_path / "table")
    again = ReferenceTable.from_pretrained(tmp_path / "table", verify=True)
    assert again.path == str(tmp_path / "table")
    assert np.array_equal(again.scores(0), table.scores(0))


def run_of_two(folder: Path, **settings: Any) -> dict[str, ReferenceTable]:
    """Calibrate texts and a chat, in three shards, with two reward models."""
    prompts: list[Any] = [f"prompt {i}" for i in range(7)] + [[{"role": "user", "content": "Hi | <b>"}]]
    scorers = {"number": NumberScorer(), "hash": HashScorer()}
    return calibrate(prompts, NumberSampler(), scorers, folder, k=5, prompts_per_shard=3, **settings)


def read_front(folder: Path) -> dict[str, Any]:
    return DatasetCard.load(folder / "README.md").data.to_dict()


def test_rollouts_are_read_as_a_dataset(hub, tmp_path, monkeypatch):
    """What was uploaded, put into a folder, is a dataset of every rollout with the scores that the tables hold."""
    tables = run_of_two(tmp_path / "run")
    handler, environment = hub
    code = f"""
        from calibrated_rewards.table.reference_table import ReferenceTable
        table = ReferenceTable.load({str(tmp_path / "run/number")!r})
        table.push_to_hub({REPO!r}, token="secret", rollouts=True, licence="mit", base_model=["org/policy"])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    for name, data in handler.stored.items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(data)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    rows = datasets.load_dataset(str(tmp_path / "pulled"), split="train", cache_dir=str(tmp_path / "cache")).to_list()

    assert len(rows) == 8 * 5
    for name, table in tables.items():
        for key, scores in table.items():
            own = [row[f"score:{name}"] for row in rows if row["key"] == key.hex()]
            assert sorted(own) == scores.tolist()
    assert all(float(row["completion"]) == pytest.approx(row["score:number"]) for row in rows)
    (chat,) = {row["prompt"] for row in rows if row["chat"]}
    assert json.loads(chat) == [{"role": "user", "content": "Hi | <b>"}]
    front = read_front(tmp_path / "pulled")
    assert (front["license"], front["base_model"]) == ("mit", ["org/policy"])
    assert front["tags"] == ["calibrated-rewards", "reference-table"]
    (config,) = front["configs"]
    assert [file["path"] in handler.stored for file in config["data_files"]] == [True]
    assert "viewer" not in front


def test_rollouts_that_wait_for_a_score_have_none(tmp_path):
    """A column that only some shards have is there for all, with nulls: a dataset has one schema."""
    tables = run_of_two(tmp_path / "run")
    file = tmp_path / "run/rollouts/00001.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["score:hash"]), file)
    rows, scores = table_hub.write_rollouts(tables["number"], tmp_path / "out/data.parquet")
    joined = pq.read_table(tmp_path / "out/data.parquet")

    assert (rows, scores) == (40, ["score:hash", "score:number"])
    assert joined.column_names[:4] == ["prompt", "completion", "score:hash", "score:number"]
    assert (joined["score:hash"].null_count, joined["score:number"].null_count) == (15, 0)


def test_a_table_without_a_run_has_no_rollouts(tmp_path):
    """In memory, saved elsewhere, or in a run that has drawn nothing."""
    table = ReferenceTable.build([("a", [1.0, 2.0])])
    table.save(tmp_path / "table")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    table.save(tmp_path / "run")
    for each in (table, ReferenceTable.load(tmp_path / "table"), ReferenceTable.load(tmp_path / "run")):
        with pytest.raises(ValueError, match="folder of a calibration run"):
            table_hub.write_rollouts(each, tmp_path / "out.parquet")


def test_a_card_says_what_the_table_was_made_with(tmp_path, monkeypatch):
    """Size, decoding, seed, fingerprints and models, without paths of this machine; the code in it runs."""
    decoding = {"max_tokens": 64, "temperature": 0.7, "stop": ["|", "<end>"], "top_k": None}
    sampler = {"kind": "openai", "model": "org/policy", "decoding": decoding, "folder": "/home/me/sft"}
    scorer = {"kind": "cost", "of": {"checkpoint": "org/rm", "weights": "0f3a"}}
    meta = {"sampler": sampler, "scorer": scorer, "seed": 3, "probes": [{"prompt": {"name": "no/name"}}]}
    table = ReferenceTable.build([("a", [1.0, 2.0]), ("b", [3.0] * 4)], meta=meta)
    table_hub.write_repository(table, tmp_path, "me/table")
    text = (tmp_path / "README.md").read_text()

    assert read_front(tmp_path)["base_model"] == ["org/policy", "org/rm"]
    assert read_front(tmp_path)["viewer"] is False
    for row in (
        "| prompts | 2 |",
        "| references a prompt, K | 2 to 4 |",
        "| seed | 3 |",
        "temperature=0.7",
        "weights=0f3a",
        "&#124;",
    ):
        assert row in text
    assert "/home/me" not in text
    assert "<end>" not in text
    with Image.open(tmp_path / "scores.png") as figure:
        assert figure.size[0] > 300
    code = text.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    monkeypatch.setattr(ReferenceTable, "from_pretrained", lambda name: table if name == "me/table" else None)
    exec(code, names)
    assert names["table"] is table


SECRETS = {
    "api_key": "sk-12345",
    "token": "hf_abc",
    "auth": {"user": "me", "pw": "hunter2"},
    "Authorization": "Basic xyz",
    "db_password": 4711,
    "credentials": ["cred-1"],
    "client_secret": "s3cret",
    "api_tokens": ["one-token"],
    "url": "http://me:letmein@rm:8000",
    "path": r"C:\Users\me",
    "share": r"\\host\me",
    "folder": "/home/me/rm",
    "other": "../me/rm",
    "home": "~me/rm",
    "hidden": ".cache/me",
    "file": "file:///home/me",
    "said": "rm of /home/me/rm",
    "several": ["org/a", "/home/me/a"],
    "headers": [{"api_key": "k"}],
    "inside": [{"at": "/home/me/b"}],
}


LOCAL = {"path", "share", "folder", "other", "home", "hidden", "file", "said", "several", "inside"}


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_found_wherever_it_is(name):
    """In mappings and lists of metadata; a path of this machine is none, and neither is any setting beside it."""
    public = {"tokenizer": "org/t", "max_tokens": 64, "stop_token_ids": [1], "use_auth_token": True, "authors": ["me"]}
    public |= {"keys": [], "token": None, "probes": [{"prompt": "http://a:b@c", "token": "t"}]}
    at = f"of.0.{name}" if name != "headers" else "of.0.headers.0.api_key"
    assert [*find_secrets({**public, "of": [{name: SECRETS[name]}]})] == [at] * (name not in LOCAL)
    assert [*find_secrets({**public, "at": ["send hf_" + "x" * 30]})] == ["at.0"]


@pytest.mark.parametrize("name", SECRETS)
def test_a_card_shows_no_secret_and_no_path(name):
    """Whatever a user's metadata holds, however deep it is; the settings beside it are shown."""
    public = {"model": "org/rm", "max_tokens": 64, "stop_token_ids": [1, 2], "add_special_tokens": True, "stop": ["."]}
    for value in (SECRETS[name], [SECRETS[name]]):
        assert dict(list_settings({**public, "of": {name: value}})) == {
            "model": "org/rm",
            "max_tokens": "64",
            "stop_token_ids": "[1, 2]",
            "add_special_tokens": "true",
            "stop": '["."]',
        }


@pytest.mark.parametrize(
    ("meta", "rows"),
    [
        ({"sampler": "my policy", "scorer": "my rm"}, {"reference policy": "my policy", "reward model": "my rm"}),
        ({"sampler": ["a", "b"], "scorer": 3}, {"reference policy": '["a", "b"]', "reward model": "3"}),
        ({"sampler": {"decoding": "greedy"}}, {"decoding": "greedy"}),
        ({"sampler": "/home/me/sft"}, {}),
    ],
)
def test_metadata_in_words_is_shown_as_it_is(tmp_path, meta, rows):
    """A table that was not made by `calibrate` may say in a text what it was made with."""
    table = ReferenceTable.build([("a", [1.0])], meta=meta)
    table_hub.write_repository(table, tmp_path, "me/table")
    shown = dict(describe_table(table))
    assert {label: shown[label] for label in shown if label not in ("prompts", "references a prompt, K")} == rows


@pytest.mark.parametrize("name", ['me/x")\nimport os', 'me/"x"', "me/x`", "a/b/c", "me/x y"])
def test_a_name_that_would_be_code_is_refused(tmp_path, name):
    """It stands in the card's python, and in its title."""
    with pytest.raises(ValueError, match="Repo id must"):
        table_hub.write_repository(ReferenceTable.build([("a", [1.0])]), tmp_path, name)
    assert not (tmp_path / "README.md").exists()


def test_a_relative_path_that_is_here_is_not_shown(tmp_path, monkeypatch):
    """It looks like a name on the Hub, which is shown."""
    (tmp_path / "models/sft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = {"a": "models/sft", "b": "org/sft", "tokenizer": "org/words"}
    assert dict(list_settings(names)) == {"b": "org/sft", "tokenizer": "org/words"}


def test_without_matplotlib_a_card_has_no_figure(tmp_path, monkeypatch):
    """Nor a link to one."""
    monkeypatch.setattr(card, "find_spec", lambda name: None)
    table_hub.write_repository(ReferenceTable.build([("a", [1.0])]), tmp_path, "me/table")

    assert sorted(os.listdir(tmp_path)) == ["README.md", "table.json", "table.safetensors"]
    assert "scores.png" not in (tmp_path / "README.md").read_text()


def test_names_that_are_none_of_the_hub(tmp_path, monkeypatch):
    """A folder that is here, a path, a class and an engine are not base models."""
    (tmp_path / "models/sft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    meta = [{"model": name} for name in ("models/sft", "/x/y", "a/b/c", "LlamaForCausalLM", "http://x/y", "org/it")]
    assert [name for each in meta for name in find_hub_names(each)] == ["org/it"]
    assert find_hub_names({"dtype": "org/it"}) == []


def test_texts_of_others_stay_in_their_cell():
    """No mark of Markdown or HTML survives, nor a line's end."""
    assert escape("a|b\n# <i>`c`*") == "a&#124;b &#35; &#60;i&#62;&#96;c&#96;&#42;"
    table = ReferenceTable.build([("a", [1.0])], meta={"scorer": {"name": "x" * 65, "kind": "y" * 64}})
    assert dict(describe_table(table))["reward model"] == f"kind={'y' * 64}"
