"""Training in two processes: gradients, logs and weights are those of one process on all of the batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_files import SMALL, head_command, offline_command, write_head_files, write_offline_files
from transformers import AutoModelForCausalLM

from calibrated_rewards.cli.main import main

SCRIPT = Path(__file__).parents[1] / "two_processes.py"


def run_in_two(*arguments: Path) -> str:
    """Run a script in two processes with what torchrun sets, without it: it imports torch as well; what they said."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **shared, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    with TemporaryFile("w+") as said:
        ranks = [
            subprocess.Popen(command, env={**environment, "RANK": rank, "LOCAL_RANK": rank}, stdout=said, stderr=said)
            for rank in ("0", "1")
        ]
        try:
            codes = [rank.wait(300) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        said.seek(0)
        text = said.read()
    assert codes == [0, 0], text[-3000:]
    return text


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of `two_processes.py` by one pair of processes, for each imports torch, and beside them one process's.

    `two/` has those of two processes, `one/` those of one.
    """
    root = Path(tmp_path_factory.mktemp("runs"))
    for name in ("one", "two", "offline", "head"):
        (root / name).mkdir()
    offline, head = write_offline_files(root / "offline"), write_head_files(root / "head")
    options = ("--backbone", "lora", "--rows", "4", "--lr", "1e-3")
    one, two = (
        [
            # A rate at which rounding does not grow from step to step.
            offline_command(offline, root / to / "offline", *SMALL.split(), "--lr", "0.02"),
            head_command(head, root / to / "head", *options),
        ]
        for to in ("one", "two")
    )
    for words in one:
        assert main(words) == 0
    commands = root / "commands.json"
    commands.write_text(json.dumps(two))
    said = run_in_two(SCRIPT, head / "policy", root / "two", commands)
    assert said.count("the same gradient") == 2
    return root


def logged(out: Path) -> list[dict[str, Any]]:
    """The rows of a log, without what depends on the machine."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_plain_loops_and_trl(runs: Path) -> None:
    """Gradients are those of one process on all, and the loops write one log and one model."""
    for name in ("grpo", "ppo", "train_rloo"):
        assert [row["step"] for row in logged(runs / "two" / name)] == [0, 1]
    assert (runs / "two/train_rloo/model/adapter_model.safetensors").exists()


def test_offline(runs: Path) -> None:
    """The log and the weights of `train offline` are those of one process, but for rounding."""
    for ours, theirs in zip(*(logged(runs / by / "offline") for by in ("two", "one")), strict=True):
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=2e-3, abs=2e-4), name
    one, two = (AutoModelForCausalLM.from_pretrained(runs / by / "offline" / "model") for by in ("one", "two"))
    start = AutoModelForCausalLM.from_pretrained(runs / "offline" / "policy").state_dict()
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    assert max(float((value - start[name]).abs().max()) for name, value in one.state_dict().items()) > 1e-2


def test_head(runs: Path) -> None:
    """The log and the weights of `train head` are those of one process, but for rounding."""
    rows = [logged(runs / by / "head") for by in ("one", "two")]
    assert len(rows[0]) == len(rows[1])
    for one, two in zip(*rows, strict=True):
        assert two == pytest.approx(one, abs=1e-5)
    weights = [load_file(runs / by / "head" / "model" / "adapter_model.safetensors") for by in ("one", "two")]
    for name, weight in weights[0].items():
        np.testing.assert_allclose(weight, weights[1][name], atol=1e-5)
