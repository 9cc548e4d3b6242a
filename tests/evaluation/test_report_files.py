"""Files of an experiment that are not what they should be: an error that names them, and what is wrong."""

import json
import re

import pytest

from calibrated_rewards.evaluation.report import report
from calibrated_rewards.evaluation.report.experiment import read_experiment
from calibrated_rewards.table.reference_table import ReferenceTable

STEP = '{"step": 0, "u": 0.5, "kl": null, "note": "anything"}\n'


@pytest.fixture
def run(tmp_path):
    """A run, with a reward."""
    (tmp_path / "log.jsonl").write_text(STEP)
    (tmp_path / "settings.json").write_text('{"recipe": "mine"}')
    (tmp_path / "reward.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "holds", "says"),
    [
        ("settings.json", b"", "JSON object"),
        ("settings.json", b'{"recipe": "mi', "JSON object.*part of one"),
        ("settings.json", b"null", "got None"),
        ("settings.json", b"[]", r"got \[\]"),
        ("settings.json", b"\xff\xfe", "JSON object"),
        ("reward.json", b'{"transform', "JSON object"),
        ("demo.json", b"[1]", r"got \[1\]"),
        ("frontier.json", b"", "frontier"),
        ("frontier.json", b'{"points": [', "frontier"),
        ("evaluation.json", b"[]", "evaluation"),
        ("held_out.json", b"{}", "held-out comparison"),
        ("log.jsonl", STEP.encode() + b"garbage\n", "got 'garbage' in line 2"),
        ("log.jsonl", b"null\n", "got None in line 1"),
        ("log.jsonl", b"[]\n", r"got \[\] in line 1"),
        ("log.jsonl", b'{"u": 1}\n', "with a step in each line"),
        ("log.jsonl", b'{"step": "one"}\n', "with a step in each line"),
        ("log.jsonl", b'{"step": 1, "u": "x"}\n', "got u='x' in line 1"),
        ("log.jsonl", b"\xff\xfe\x00", "needs to be text"),
    ],
)
def test_what_is_wrong_is_named(run, name, holds, says):
    """The file, and what it holds in place of what it should."""
    read_experiment(run)
    (run / name).write_bytes(holds)
    with pytest.raises(ValueError, match=f"{re.escape(str(run / name))}.*{says}"):
        read_experiment(run)


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"<b>x"', "null"])
def test_an_estimate_is_of_numbers(run, value):
    """NaN, infinity, text and nothing are no win rates."""
    score = {"value": "here", "low": None, "high": None, "standard_error": None, "prompts": 1}
    reference = {"name": "reference", "kl": None, "tokens": None, "win_rates": {}, "scores": {"judge": score}}
    said = {"reference": reference, "policies": [], "differences": [], "selected_by": "judge"}
    text = json.dumps({**said, "prompts": 1, "completions": 1})
    (run / "evaluation.json").write_text(text.replace('"here"', "0.5"))
    read_experiment(run)
    (run / "evaluation.json").write_text(text.replace('"here"', value))
    with pytest.raises(ValueError, match=re.escape(str(run / "evaluation.json"))):
        read_experiment(run)


def test_a_line_that_was_broken_off_is_passed_over(run):
    """A killed run's last line, also where another run has gone on after it; a step of NaN is a step."""
    rows = ['{"step": 0, "u": 0.5}', '{"step": 1, "u"', "", '{"step": 1, "u": NaN}', '{"st']
    (run / "log.jsonl").write_text("\n".join(rows))
    assert [row["step"] for row in read_experiment(run).runs[run.name].rows] == [0, 1]
    assert "<svg" in report(run).read_text()


def test_settings_of_any_shape_are_no_reason_to_fail(run):
    """What a loop of one's own keeps under the names that recipes use."""
    for settings in ({"settings": [1], "reward": "mine"}, {"settings": "x", "reward": ["y"]}, {"settings": None}):
        (run / "settings.json").write_text(json.dumps(settings))
        assert "1 step)" in report(run).read_text()


def test_a_folder_is_no_page(run, tmp_path):
    """It is named, before any work is done."""
    (tmp_path / "pages").mkdir()
    with pytest.raises(IsADirectoryError, match=r"pages.*which is a folder"):
        report(run, tmp_path / "pages")
    with pytest.raises(NotADirectoryError, match=r"settings\.json is no folder"):
        report(run, run / "settings.json" / "new" / "page.html")
    ReferenceTable.build([("p", [1.0])]).save(tmp_path / "t")
    (tmp_path / "t" / "report.html").mkdir()
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path / "t" / "report.html"))):
        report(tmp_path / "t")
