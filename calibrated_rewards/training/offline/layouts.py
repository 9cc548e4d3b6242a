"""Arrange the rows of a dataset as a framework reads them, and say how it is told to.

>>> chat = [{"role": "user", "content": "2+2="}]
>>> row = {"prompt": chat, "completion": [{"role": "assistant", "content": "4"}], "score": 3.0}
>>> LAYOUTS["axolotl"].arrange(row)["messages"][1]
{'role': 'assistant', 'content': '4', 'training': True}
>>> LAYOUTS["llama-factory"].arrange({**row, "prompt": [*chat, *chat]}) is None  # two turns of the user
True
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from calibrated_rewards.training.offline.datasets import Kind, Row

TEXTS = ("prompt", "completion", "chosen", "rejected")


def arrange_for_trl(row: Row) -> Row | None:
    """TRL: prompt and completion, or prompt, chosen and rejected; texts, or all of them messages."""
    return row


def arrange_for_openrlhf(row: Row) -> Row | None:
    """OpenRLHF: input and output, or prompt, chosen and rejected."""
    names = {"prompt": "input", "completion": "output"} if "completion" in row else {}
    return {names.get(name, name): value for name, value in row.items()}


def arrange_for_axolotl(row: Row) -> Row | None:
    """axolotl: texts as they are; chats as messages, of which the completion's own are marked for training."""
    if isinstance(row["prompt"], str):
        return row
    if "completion" in row:
        turns = [{**turn, "training": False} for turn in row["prompt"]]
        turns += [{**turn, "training": turn["role"] == "assistant"} for turn in row["completion"]]
        return {"messages": turns, **numbers_of(row)}
    pair = answer_of(row["chosen"]), answer_of(row["rejected"])
    if None in pair:
        return None
    return {"messages": row["prompt"], "chosen": pair[0], "rejected": pair[1], **numbers_of(row)}


def arrange_for_llama_factory(row: Row) -> Row | None:
    """LLaMA-Factory: texts as in alpaca's format, chats in sharegpt's; None for turns that it would skip."""
    if isinstance(row["prompt"], str):
        return row
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["prompt"]]
    roles = [turn["role"] for turn in turns if turn["role"] != "system"]
    alternate = roles == [("user", "assistant")[at % 2] for at in range(len(roles))] and len(roles) % 2 == 1
    systems = [at for at, turn in enumerate(turns) if turn["role"] == "system"]
    answers = {name: answer_of(row[name]) for name in TEXTS[1:] if name in row}
    if not alternate or systems not in ([], [0]) or None in answers.values():
        return None
    if "completion" in row:
        return {"messages": [*turns, answers["completion"]], **numbers_of(row)}
    return {"messages": turns, **answers, **numbers_of(row)}


def arrange_for_ms_swift(row: Row) -> Row | None:
    """ms-swift: messages, a text as a user's; a weight, times the prompt's K, is the loss scale of the completion."""
    chat = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]
    prompt = [{**turn, "loss": False} if turn["role"] == "assistant" else turn for turn in chat]
    answers = {name: answer_of(row[name]) for name in TEXTS[1:] if name in row}
    if None in answers.values():
        return None
    if "completion" in row:
        numbers = numbers_of(row)
        answer = {**answers["completion"], "loss": True} if answers["completion"] else {}
        if "weight" in numbers:
            answer["loss_scale"] = numbers["weight"] * numbers["rollouts"]
        return {"messages": [*prompt, answer], **numbers}
    chosen, rejected = answers["chosen"], answers["rejected"]
    return {"messages": [*prompt, chosen], "rejected_response": rejected and rejected["content"], **numbers_of(row)}


def numbers_of(row: Row) -> Row:
    """Select the columns that are neither prompt nor completions."""
    return {name: value for name, value in row.items() if name not in TEXTS}


def answer_of(completion: Any) -> Row | None:
    """Return role and text of a completion that is one message of the assistant; None for any other."""
    if isinstance(completion, str):
        return {"role": "assistant", "content": completion}
    if len(completion) != 1 or completion[0]["role"] != "assistant" or completion[0].get("tool_calls"):
        return None
    return {"role": "assistant", "content": completion[0]["content"]}


@dataclass(frozen=True)
class Layout:
    """How a framework reads rows: their columns, and what it is told of them."""

    arrange: Callable[[Row], Row | None]
    """The function from a row of TRL's layout to one of this layout; None for a row that the framework would skip."""
    usage: Callable[[str, Kind, bool], str]
    """The settings that read a file, given its place, its kind and if its prompts are chats."""


def write_trl_usage(file: str, kind: Kind, _: bool) -> str:
    """Write the code with which TRL reads the dataset, as a block of Markdown."""
    reader, name = ("parquet", file) if file.endswith(".parquet") else ("json", file)
    load = f'load_dataset("{reader}", data_files="{name}", split="train")'
    if not file.endswith((".parquet", ".jsonl")):
        load = f'load_from_disk("{file}")'
    trainers = {
        "sft": "SFTTrainer: the loss is on completions alone",
        "pairs": "DPOTrainer, KTOTrainer, or RewardTrainer, which reads the margin too",
    }
    note = trainers.get(kind, "a trainer of your own: those of TRL read no weights")
    return f"```python\nfrom datasets import {load.partition('(')[0]}\n\ndataset = {load}  # for {note}\n```"


def write_openrlhf_usage(file: str, kind: Kind, chat: bool) -> str:
    """Write the options with which OpenRLHF reads the dataset."""
    if kind == "pairs":
        keys = "--data.prompt_key prompt --data.chosen_key chosen --data.rejected_key rejected"
    else:
        keys = "--data.input_key input --data.output_key output"
    # Without a template of the user's, its SFT puts "User: " before a text.
    plain = "" if kind == "pairs" else " --data.input_template '{}'"
    return f"```\n--data.dataset {file} {keys}{' --data.apply_chat_template' if chat else plain}\n```"


AXOLOTL_TYPES = {  # of pairs or not, of chats or not
    (False, True): """    type: chat_template
    field_messages: messages
    message_field_training: training
    roles_to_train: []
    train_on_eos: turn
""",
    (False, False): """    type:
      field_instruction: prompt
      field_output: completion
      format: "{instruction}"
      no_input_format: "{instruction}"
""",
    (True, True): """    type: chat_template.default
    field_messages: messages
    field_chosen: chosen
    field_rejected: rejected
""",
    (True, False): """    type:
      field_prompt: prompt
      field_chosen: chosen
      field_rejected: rejected
""",
}


def write_axolotl_usage(file: str, kind: Kind, chat: bool) -> str:
    """Write the settings with which axolotl reads the dataset."""
    reader, pairs = "parquet" if file.endswith(".parquet") else "json", kind == "pairs"
    head = (
        f"{'rl: dpo' + chr(10) if pairs else ''}datasets:\n  - path: {file}\n    ds_type: {reader}\n    split: train\n"
    )
    return f"```yaml\n{head}{AXOLOTL_TYPES[pairs, chat]}```"


def write_llama_factory_usage(file: str, kind: Kind, chat: bool) -> str:
    """Write the settings with which LLaMA-Factory reads the dataset; `describe_for_llama_factory` writes the rest."""
    stage, folder = "dpo" if kind == "pairs" else "sft", file.rpartition("/")[0]
    more = "mask_history: true" if chat else "template: empty  # adds nothing to the texts, and so no end token"
    return f"```yaml\nstage: {stage}\ndataset_dir: {folder}\ndataset: rollouts\n{more}\n```"


def describe_for_llama_factory(file: str, kind: Kind, chat: bool) -> str:
    """Write the dataset_info.json of one dataset, `rollouts`."""
    sides = {"chosen": "chosen", "rejected": "rejected"} if kind == "pairs" else {}
    entry: dict[str, Any] = {"file_name": file, "ranking": kind == "pairs"}
    if chat:
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        tags |= {"observation_tag": "tool", "function_tag": "function", "system_tag": "system"}
        entry |= {"formatting": "sharegpt", "columns": {"messages": "messages", **sides}, "tags": tags}
    else:
        columns = {"prompt": "prompt", **(sides or {"response": "completion"})}
        entry |= {"formatting": "alpaca", "columns": columns}
    return json.dumps({"rollouts": entry}, indent=2) + "\n"


def write_ms_swift_usage(file: str, kind: Kind, chat: bool) -> str:
    """Write the options with which ms-swift reads the dataset."""
    command = "swift rlhf --rlhf_type dpo" if kind == "pairs" else "swift sft"
    weights = " --is_binary_loss_scale false" if kind == "weighted" else ""
    return f"```\n{command} --dataset {file}{weights}{'' if chat else ' --use_chat_template false'} ...\n```"


LAYOUTS = {
    "trl": Layout(arrange_for_trl, write_trl_usage),
    "axolotl": Layout(arrange_for_axolotl, write_axolotl_usage),
    "llama-factory": Layout(arrange_for_llama_factory, write_llama_factory_usage),
    "openrlhf": Layout(arrange_for_openrlhf, write_openrlhf_usage),
    "ms-swift": Layout(arrange_for_ms_swift, write_ms_swift_usage),
}
