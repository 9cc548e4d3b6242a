"""The prompts of a saved reward: replaced in one step, refused if cut short, and those of no other reward."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.reward.find_prompts import Originals
from calibrated_rewards.testing.suites import NumberScorer


def reward_of(folder: Path, *prompts: str) -> CalibratedReward:
    """A reward that finds each prompt by an alias of it, <prompt>."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    rows = [(chat, [1.0, 2.0], [f"<{prompt}>"]) for chat, prompt in zip(chats, prompts, strict=True)]
    table = ReferenceTable.build(rows)
    return CalibratedReward(NumberScorer(), table, originals=Originals.write(folder / "source.jsonl", table, chats))


def test_a_process_that_uses_the_folder_lives_on(tmp_path: Path) -> None:
    """It still has the prompts that it loaded, after another reward was saved to the same folder."""
    code = f"""
        from pathlib import Path
        from test_saved_prompts import reward_of
        from calibrated_rewards.reward.saving import load_reward
        at = Path({str(tmp_path)!r})
        reward_of(at, *[f"{{i:040}}" for i in range(3000)]).save_pretrained(at / "reward")
        live = load_reward(at / "reward")
        last = f"<{{2999:040}}>"
        before = live([last, last], ["1.5", "9"])
        reward_of(at, "other").save_pretrained(at / "reward")
        assert live([last, last], ["1.5", "9"]) == before
        print(load_reward(at / "reward")(["<other>"], ["9"]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[1.0]\n"), done.stderr


def test_prompts_that_are_cut_short_are_refused(tmp_path: Path) -> None:
    """When the reward is loaded, not at the first prompt that is missing; with prompts of one's own it loads."""
    reward = reward_of(tmp_path, "a", "b")
    reward.save_pretrained(tmp_path / "reward")
    file = tmp_path / "reward/prompts.jsonl"
    whole = file.read_bytes()
    for size in (0, 7, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"prompts\.jsonl needs the {len(whole)} bytes .* got {size} bytes"):
            CalibratedReward.from_pretrained(tmp_path / "reward")
    file.unlink()
    with pytest.raises(ValueError, match="got no file"):
        CalibratedReward.from_pretrained(tmp_path / "reward")
    again = CalibratedReward.from_pretrained(tmp_path / "reward", originals=reward.originals)
    assert again(["<b>"], ["1.5"]) == [0.5]


def test_earlier_versions_did_not_say_how_long_the_prompts_are(tmp_path: Path) -> None:
    """Their rewards load, with the prompts that lie there; where a reward was saved without, others' are ignored."""
    reward_of(tmp_path, "a").save_pretrained(tmp_path / "old")
    settings = json.loads((tmp_path / "old/reward.json").read_text())
    del settings["prompts"]
    (tmp_path / "old/reward.json").write_text(json.dumps(settings))
    assert CalibratedReward.from_pretrained(tmp_path / "old")(["<a>"], ["9"]) == [1.0]

    CalibratedReward(NumberScorer(), ReferenceTable.build([("a", [1.0])])).save_pretrained(tmp_path / "new")
    (tmp_path / "new/prompts.jsonl").write_text('"another prompt"\n')
    assert CalibratedReward.from_pretrained(tmp_path / "new").originals is None


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    """The file of another folder, to which it leads, is as it was; saved in place, a reward keeps its own."""
    reward_of(tmp_path, "a").save_pretrained(tmp_path / "first")
    before = (tmp_path / "first/prompts.jsonl").read_bytes()
    (tmp_path / "second").mkdir()
    (tmp_path / "second/prompts.jsonl").symlink_to(tmp_path / "first/prompts.jsonl")
    reward_of(tmp_path, "b").save_pretrained(tmp_path / "second")

    assert (tmp_path / "first/prompts.jsonl").read_bytes() == before
    second = CalibratedReward.from_pretrained(tmp_path / "second")
    second.save_pretrained(tmp_path / "second")
    assert CalibratedReward.from_pretrained(tmp_path / "second")(["<b>"], ["9"]) == [1.0]
