"""Layouts: TRL's own trainers take a step on an export, and other frameworks' columns are as their code reads them."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from datasets import load_dataset
from rollout_runs import Drawn, chat, save_run
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from calibrated_rewards import CalibratedReward
from calibrated_rewards.training.offline.dataset_folder import export
from calibrated_rewards.training.offline.datasets import Selection
from calibrated_rewards.training.offline.layouts import LAYOUTS

TALK = [*chat("Hi"), {"role": "assistant", "content": "ho"}, *chat("2+2=")]
STEP: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "activation_checkpointing": False,
    "disable_tqdm": True,
}


def write(folder: Path, chats: bool, kind: Any, **settings: Any) -> Path:
    """Export a run of two prompts, whose best completion is "four" and whose worst is "5", and return its file."""
    prompts: list[Any] = [chat("2+2="), TALK] if chats else ["2+2=", "1+3="]
    drawn: list[Drawn] = [(prompt, ["5", "four", "4"], [0.0, 2.0, 1.0]) for prompt in prompts]
    table = save_run(folder / "run", drawn)
    reward = CalibratedReward(None, table, beta=0.5)
    return export(folder / "run", folder / "out", kind, reward, show_progress=False, **settings).path


def read(path: Path) -> Any:
    """The rows, by the library that the frameworks use."""
    reader = "parquet" if path.suffix == ".parquet" else "json"
    return load_dataset(reader, data_files=str(path), split="train", cache_dir=str(path.parent.with_name("cache")))


@pytest.mark.parametrize("chats", [False, True])
@pytest.mark.parametrize("draws", [None, 2])
def test_trl_fine_tunes_on_completions_alone(chats: bool, draws: int | None, tmp_path: Path) -> None:
    """SFTTrainer takes a step, and its labels are the completion and the end that it adds, nothing of the prompt."""
    path = write(tmp_path, chats, Selection("sft", draws=draws), file_format="parquet" if chats else "jsonl")
    args = SFTConfig(str(tmp_path / "sft"), **STEP)
    tokens = tiny.tokenizer()
    trainer = SFTTrainer(tiny.causal(), args, train_dataset=read(path), processing_class=tokens)
    trainer.train()
    found = {
        tokens.decode([t for t in row["labels"] if t != -100]).removesuffix("<|end|>").removesuffix("</s>")
        for row in trainer.train_dataset
    }
    assert len(trainer.train_dataset) == 2 * (draws or 1)
    if draws is None:
        assert found == {"four"}
    else:
        assert found <= {"four", "4", "5"}
        assert found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("chats", [False, True])
def test_trl_learns_from_the_pairs(chats: bool, tmp_path: Path) -> None:
    """DPOTrainer, KTOTrainer and RewardTrainer take a step; the last one reads the margin too."""
    data, tokens = read(write(tmp_path, chats, "pairs")), tiny.tokenizer()
    args = {"processing_class": tokens, "train_dataset": data}
    dpo = DPOTrainer(tiny.causal(), tiny.causal(), args=DPOConfig(str(tmp_path / "dpo"), **STEP), **args)
    dpo.train()
    sides = [tokens.decode(dpo.train_dataset[0][side]) for side in ("prompt_ids", "chosen_ids", "rejected_ids")]
    assert sides[0].replace("<s>", "") == ("<|user|>2+2=<|end|><|assistant|>" if chats else "2+2=")
    assert [side.partition("<")[0] for side in sides[1:]] == ["four", "5"]
    KTOTrainer(tiny.causal(), tiny.causal(), args=KTOConfig(str(tmp_path / "kto"), **STEP), **args).train()
    rm = RewardTrainer(tiny.classifier(), args=RewardConfig(str(tmp_path / "rm"), **STEP), **args)
    rm.train()
    assert rm.train_dataset[0]["margin"] == 1  # the best and the worst, among the two others


def test_all_rollouts_are_read_by_datasets(tmp_path: Path) -> None:
    """Weighted rows by TRL's SFTTrainer, which reads no weight but takes the rows."""
    data = read(write(tmp_path, True, "weighted"))
    assert {*data.column_names} == {"prompt", "completion", "weight", "rollouts"}
    SFTTrainer(
        tiny.causal(), SFTConfig(str(tmp_path / "sft"), **STEP), train_dataset=data, processing_class=tiny.tokenizer()
    ).train()


@pytest.mark.parametrize("kind", ["sft", "pairs", "weighted"])
@pytest.mark.parametrize("chats", [False, True])
@pytest.mark.parametrize("layout", ["axolotl", "llama-factory", "openrlhf", "ms-swift"])
def test_columns_are_those_that_the_settings_name(layout: str, chats: bool, kind: Any, tmp_path: Path) -> None:
    """Every column that the card's settings name is in the file, and the card names no other file."""
    path = write(tmp_path, chats, kind, layout=layout, file_format="jsonl")
    columns, card = {*read(path).column_names}, (path.parent / "README.md").read_text()
    usage = LAYOUTS[layout].usage("out/train.jsonl", kind, chats)
    assert usage in card
    assert ("reads no weights" in card) == (kind == "weighted" and layout != "ms-swift")
    lines = usage.splitlines()[1:-1]
    if layout == "axolotl":
        (entry,) = yaml.safe_load("\n".join(lines))["datasets"]
        assert entry["path"] == "out/train.jsonl"
        fields = {**entry, **(entry["type"] if isinstance(entry["type"], dict) else {})}
        named = {value for name, value in fields.items() if name.startswith("field_")}
    elif layout == "llama-factory":
        assert yaml.safe_load("\n".join(lines))["dataset_dir"] == "out"
        (entry,) = json.loads((path.parent / "dataset_info.json").read_text()).values()
        assert (path.parent / entry["file_name"]).is_file()
        named = {*entry["columns"].values()}
    elif layout == "openrlhf":
        words = lines[0].split()
        named = {word for option, word in pairwise(words) if option.endswith("_key")}
    else:
        named = {"messages", *(["rejected_response"] if kind == "pairs" else [])}
    assert named
    assert named <= columns


def test_an_axolotl_chat_trains_on_the_last_turn_alone(tmp_path: Path) -> None:
    """Earlier turns of the assistant, which are part of a prompt, are marked as not to be trained on."""
    rows = list(read(write(tmp_path, True, "sft", layout="axolotl")))
    assert [turn["training"] for turn in rows[1]["messages"]] == [False, False, False, True]
    assert [turn["content"] for turn in rows[1]["messages"]] == ["Hi", "ho", "2+2=", "four"]


def test_weights_of_ms_swift_are_one_on_average(tmp_path: Path) -> None:
    """The loss scale of a completion is K times its weight; earlier turns of the assistant have no loss."""
    rows = list(read(write(tmp_path, True, "weighted", layout="ms-swift")))
    scales = [row["messages"][-1]["loss_scale"] for row in rows]
    assert sum(scales[:3]) == pytest.approx(3)
    assert scales == pytest.approx([3 * row["weight"] for row in rows])
    assert [turn["loss"] for turn in rows[3]["messages"]] == [None, False, None, True]


@pytest.mark.parametrize(
    ("prompt", "completion", "layouts"),
    [
        ([*chat("a"), *chat("b")], "c", {"llama-factory"}),
        ([*chat("a"), {"role": "system", "content": "b"}], "c", {"llama-factory"}),
        ([{"role": "system", "content": "b"}, *chat("a")], "c", set()),
        ([*chat("a"), {"role": "assistant", "content": "b"}, *chat("c")], "d", set()),
        (
            chat("a"),
            [{"role": "assistant", "content": "b"}, {"role": "tool", "content": "c"}],
            {"llama-factory", "ms-swift"},
        ),
    ],
)
def test_rows_that_a_framework_would_skip_are_counted(
    prompt: Any, completion: Any, layouts: set[str], tmp_path: Path
) -> None:
    """LLaMA-Factory drops turns that do not alternate with a warning: such rows are left out, and said."""
    drawn: list[Drawn] = [(chat("ok"), ["a", "b"], [0.0, 1.0]), (prompt, [completion, completion], [1.0, 0.0])]
    reward = CalibratedReward(None, save_run(tmp_path / "run", drawn))
    for layout in LAYOUTS:
        done = export(tmp_path / "run", tmp_path / layout, "sft", reward, layout=layout, show_progress=False)
        skipped = {"rows that the framework would skip": 1} if layout in layouts else {}
        assert (done.left_out, done.rows) == (skipped, 2 - len(skipped))
