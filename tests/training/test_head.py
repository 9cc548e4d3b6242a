"""The command `train head`: from files to a head, in one go or two, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from training_files import head_command as words, write_head_files
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.models.llama.modeling_llama import LlamaAttention

from calibrated_rewards.cli.main import main
from calibrated_rewards.files import claim
from calibrated_rewards.heads import HeadedModel, Pair, measure_pairs
from calibrated_rewards.models.adapters import ignore_peft_warning
from calibrated_rewards.models.text import TruncationWarning
from calibrated_rewards.training import head as head_run
from calibrated_rewards.training.callbacks import HeadLog
from calibrated_rewards.training.head import HeadTraining, read_pairs, split_pairs
from calibrated_rewards.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, pairs of two tasks, and templates."""
    return write_head_files(Path(tmp_path_factory.mktemp("head")))


def test_from_files_to_a_head(files: Path, tmp_path: Path, capsys: Any) -> None:
    """The head in `model/` scores the held-out pairs as the run says, and the command ends with its verdict."""
    out = tmp_path / "run"
    options = ("--steps", "60", "--pooler", "tanh", "--head-lr", "0.01", "--eval-steps", "20", "--seed", "1")
    assert main(words(files, out, *options)) == 0
    verdict = capsys.readouterr().out.splitlines()

    headed = HeadedModel.from_pretrained(out / "model")
    pairs = read_pairs([f"marks={files / 'marks.jsonl'}", f"even={files / 'even.jsonl'}"], files / "templates.json")
    training, held_out = split_pairs(pairs, 0.25, 1)
    sides = [[pair.chosen for pair in held_out], [pair.rejected for pair in held_out]]
    scores = [headed.score_rows(headed.encode([pair.prompt for pair in held_out], side))[:, 0] for side in sides]
    metrics = measure_pairs(head_run.torch.stack(scores, 1).double().numpy())
    result = json.loads((out / "model" / "training.json").read_text())
    for name, value in metrics.items():
        assert result[f"held_out_{name}"] == pytest.approx(value, abs=1e-5), name
    assert verdict[0].startswith(f"pairwise accuracy {100 * metrics['accuracy']:.1f} % +- ")
    assert f"on {len(held_out)} held-out pairs" in verdict[0]
    assert verdict[1:] == [f"head: {out / 'model'}", f"log: {out / 'log.jsonl'}"]
    assert result["held_out_marks/accuracy"] > 0.9
    assert 5 < len(held_out) < len(training)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(60))
    assert [row["step"] for row in rows if "held_out/accuracy" in row][:3] == [19, 39, 59]

    assert main(words(files, out, *options)) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert main(words(files, out, "--steps", "61")) != 0
    assert "has a run with other settings" in capsys.readouterr().err


class CrashError(Exception):
    """What ends a run in the middle."""


@pytest.mark.parametrize("backbone", ["frozen", "lora", "full"])
def test_interrupted_and_started_again(backbone: str, files: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The same command after a crash ends with the files of a run that was not interrupted, bit for bit."""
    options = ["--backbone", backbone, "--save-steps", "2", "--rows", "4"]
    options += [] if backbone == "frozen" else ["--lr", "1e-3"]
    options += ["--dpo-weight", "1", "--window", "128"] if backbone == "lora" else []
    assert main(words(files, tmp_path / "whole", *options)) == 0
    log = HeadLog.on_log

    def crash(self: HeadLog, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 5:
            raise CrashError
        log(self, args, state, control, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(HeadLog, "on_log", crash)
        with pytest.raises(CrashError):
            main(words(files, tmp_path / "two", *options))
    assert not (tmp_path / "two" / "model").exists()
    assert (tmp_path / "two" / "checkpoints" / "checkpoint-4").exists()
    assert main(words(files, tmp_path / "two", *options)) == 0

    for name in ("preference_head", *{"frozen": [], "lora": ["adapter_model"], "full": ["model"]}[backbone]):
        one, other = (load_file(tmp_path / run / "model" / f"{name}.safetensors") for run in ("whole", "two"))
        assert one.keys() == other.keys()
        assert all((one[key] == other[key]).all() for key in one)
    logs = [(tmp_path / run / "log.jsonl").read_text() for run in ("whole", "two")]
    assert logs[0] == logs[1]
    assert not (tmp_path / "two" / "checkpoints").exists()


KILLED = """
import os, signal, sys
from calibrated_rewards.heads import preference_head
write, count = preference_head.write_file, 0
def write_or_die(path, content):
    global count
    count += 1
    if count == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)
preference_head.write_file = write_or_die
from calibrated_rewards.cli.main import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize(("backbone", "write", "kept"), [("lora", 3, 2), ("frozen", 8, 6)])
def test_killed_while_a_head_is_saved(backbone: str, write: int, kept: int, files: Path, tmp_path: Path) -> None:
    """SIGKILL behind the adapter of the second checkpoint, or before the last file: the same bytes after a new start.

    A head has two files; a checkpoint comes every two of six steps, and the model behind the last one.
    """
    options, env = ["--backbone", backbone, "--save-steps", "2"], {**os.environ, "OMP_NUM_THREADS": "1"}
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(write), *words(files, out, *options)]
    assert subprocess.run(command, env=env, check=False, timeout=500).returncode == -signal.SIGKILL
    assert not (out / "model").exists()
    assert RunFolder(out).find_checkpoint() == str(out / "checkpoints" / f"checkpoint-{kept}")

    assert main(words(files, out, *options)) == 0
    assert main(words(files, tmp_path / "whole", *options)) == 0

    both = [
        {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
        for run in (out, tmp_path / "whole")
    ]
    assert both[0] == both[1]


def test_a_second_process_in_the_folder_is_refused(files: Path, tmp_path: Path, capsys: Any) -> None:
    """While another one trains there, the command names the folder, and leaves it as it is."""
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / ".lock"
    lock.touch()
    with claim(lock):
        assert main(words(files, tmp_path / "run")) == 2
    assert f"{tmp_path / 'run'} is for one run at a time" in capsys.readouterr().err
    assert [*(tmp_path / "run").iterdir()] == [lock]


def test_each_head_is_measured(files: Path, tmp_path: Path, capsys: Any) -> None:
    """Of several names, accuracy and calibration of each by its own pairs: in print, in the result and in the log."""
    rows = [{"prompt": f"{i}", "chosen": "a" * 5, "rejected": "b" * 5, "head": "first"} for i in range(40)]
    rows += [{"prompt": f"{i}", "chosen": "b" * 5, "rejected": "a" * 5, "head": "second"} for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, options = tmp_path / "run", ["--steps", "20", "--held-out", "0.3", "--heads", "first,second"]
    options += ["--head-lr", "0.05", "--eval-steps", "10"]
    places = ["--policy", str(files / "policy"), "--pairs", str(tmp_path / "pairs.jsonl"), "--out", str(out)]
    assert main(["train", "head", *places, *options]) == 0
    lines = capsys.readouterr().out.splitlines()

    _, held_out = split_pairs(read_pairs([str(tmp_path / "pairs.jsonl")], None), 0.3, 0)
    headed = HeadedModel.from_pretrained(out / "model")
    result = json.loads((out / "model" / "training.json").read_text())
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for column, name in enumerate(headed.head.names):
        own = [pair for pair in held_out if pair.head == name]
        sides = [headed.encode([p.prompt for p in own], [p[at] for p in own]) for at in (1, 2)]
        scores = head_run.torch.stack([headed.score_rows(side)[:, column] for side in sides], 1)
        for metric, value in measure_pairs(scores.double().numpy()).items():
            assert result[f"held_out_head_{name}/{metric}"] == pytest.approx(value, abs=1e-5)
        assert lines[1 + column].startswith(f"head {name}: pairwise accuracy 100.0 % +- ")
        assert f"on {len(own)} held-out pairs; calibration error " in lines[1 + column]
        assert [f"held_out/head_{name}/accuracy" in row for row in log].count(True) == 2
    assert f"on {len(held_out)} held-out pairs" in lines[0]


def test_one_is_not_many(files: Path, tmp_path: Path, capsys: Any) -> None:
    """One step, one pair, one task: in the singular."""
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    pairs = ["--pairs", str(tmp_path / "one.jsonl"), "--eval-pairs", str(tmp_path / "one.jsonl")]
    places = ["--policy", str(files / "policy"), "--out", str(tmp_path / "run")]
    assert main(["train", "head", *pairs, *places, "--steps", "1", "--pairs-a-step", "1"]) == 0
    said = capsys.readouterr()
    assert "1 step of 1 pair; 1 pair of 1 task with " in said.err
    assert "1 pair held out" in said.err
    assert "on 1 held-out pair; " in said.out


def test_the_split_is_by_prompt() -> None:
    """Pairs of one prompt are on one side; the seed decides which; a share of 0 holds nothing out."""
    pairs = [Pair(f"prompt {i % 200}", "a", f"b{i}") for i in range(600)]
    training, held_out = split_pairs(pairs, 0.2, 0)
    assert not {pair.prompt for pair in training} & {pair.prompt for pair in held_out}
    assert 60 < len(held_out) < 190
    assert split_pairs(pairs, 0.2, 1)[1] != held_out
    assert split_pairs(pairs, 0.0, 0) == (pairs, [])


@pytest.mark.parametrize(("backbone", "batches"), [("frozen", 1), ("lora", 4)])
def test_a_step_has_all_its_pairs(backbone: str, batches: int, tmp_path: Path) -> None:
    """Of all processes together, in as many batches as --rows asks for."""
    settings = HeadTraining(backbone=backbone, pairs_a_step=24, rows=9)
    args = head_run.configure(settings, RunFolder(tmp_path), 5, 2, False, ())
    assert args.gradient_accumulation_steps == batches
    assert 2 * args.per_device_train_batch_size * batches == 24


@pytest.mark.parametrize("backbone", ["lora", "full"])
def test_activations_are_computed_twice(backbone: str, files: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """`--checkpoint-activations` runs each layer again in the backward pass, and ends with the same bytes."""
    forward, calls, counts, weights = LlamaAttention.forward, [], [], []

    def count(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(self)
        return forward(self, *args, **options)

    monkeypatch.setattr(LlamaAttention, "forward", count)
    for name, options in {"once": [], "twice": ["--checkpoint-activations"]}.items():
        calls.clear()
        out = tmp_path / name
        assert main(words(files, out, "--backbone", backbone, "--held-out", "0", *options)) == 0
        counts.append(len(calls))
        weights.append({path.name: path.read_bytes() for path in (out / "model").glob("*.safetensors")})
    assert counts[1] == 2 * counts[0]
    assert weights[0] == weights[1]


def test_a_backbone_in_bfloat16(files: Path, tmp_path: Path) -> None:
    """`--bf16` computes a trained backbone in 16 bits: other scores, and an adapter that is kept in float32."""
    heads = {}
    for name, options in {"float32": [], "bfloat16": ["--bf16"]}.items():
        assert main(words(files, tmp_path / name, "--backbone", "lora", *options)) == 0
        heads[name] = load_file(tmp_path / name / "model" / "adapter_model.safetensors")
    assert {str(weight.dtype) for weight in heads["bfloat16"].values()} == {"torch.float32"}
    assert any((heads["float32"][key] != heads["bfloat16"][key]).any() for key in heads["float32"])


class Lines(TrainerCallback):
    """A tracker that keeps what it is sent."""

    events: list[Any] = []  # noqa: RUF012  (transformers makes the object: only its class is known here)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep the run's name and the numbers of a step."""
        self.events.append((args.run_name, dict(logs)))


def test_a_tracker_gets_the_numbers(files: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """`--report-to` sends each step's loss and accuracy, and those of the evaluation, under the run's name."""
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "lines", Lines)
    monkeypatch.setattr(Lines, "events", [])
    assert main(words(files, tmp_path / "my-head", "--report-to", "lines")) == 0
    steps = [numbers for _, numbers in Lines.events if "loss" in numbers]
    assert len(steps) == 6
    assert all({"accuracy", "margin", "loss/head"} <= numbers.keys() for numbers in steps)
    assert {name for name, _ in Lines.events} == {"my-head"}
    assert any("held_out_accuracy" in numbers for _, numbers in Lines.events)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--dpo-weight", "1"],
            "a frozen backbone learns nothing, got --dpo-weight 1.0: train an adapter",
        ),
        (["--smoothing", "0.5"], "0 <= eps < 0.5, got --smoothing 0.5"),
        (["--layers", "last"], "whole numbers with commas between, or all, got --layers last"),
        (["--layers", "7"], "the model has hidden states from -3 to 2, got --layers 7"),
        (["--held-out", "0.999999"], "pairs are held out, got --held-out 0.999999: say --held-out 0, or evaluate on"),
        (["--held-out", "1"], "below 1, got --held-out 1.0"),
        (["--end-token", "<|im_end|>"], "that the tokenizer knows, got --end-token <|im_end|>"),
        (["--end-token", ""], "that the tokenizer knows, got --end-token ''"),
        (["--pairs", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--head-lr", "0"], "a run needs a finite head_lr > 0"),
        (["--window", "8", "--backbone", "lora"], "holds the longest text"),
        (["--window", "512"], "never packed, got --window 512: leave it out, or train --backbone lora"),
        (["--heads", "a, a"], "scores have names, each its own, got --heads 'a, a'"),
        (
            ["--heads", "reward,other"],
            "whose column head names it, got none for other of --heads reward,other",
        ),
        (["--heads", ""], "scores have names, each its own"),
        (["--bf16"], "read once, in the precision of its weights, got --bf16: say --dtype bfloat16, or leave it out"),
        (["--checkpoint-activations"], "without activations to keep, got --checkpoint-activations: leave it out"),
        (["--lr", "0.01"], "has no learning rate, got --lr 0.01: say the head's, --head-lr 0.01"),
        (["--prior-decay", "0.2"], "stays at its initial weights, got --prior-decay 0.2: leave it out"),
        (["--lora-rank", "4"], "--backbone frozen has no adapter, got --lora-rank 4"),
        (["--lora-rank", "4", "--backbone", "full"], "--backbone full has no adapter, got --lora-rank 4"),
        (["--dpo-beta", "0.3", "--backbone", "lora"], "got --dpo-beta 0.3: leave it out, or say --dpo-weight 1"),
        (["--prior-decay", "-1"], "a run needs prior_decay >= 0, got --prior-decay -1.0"),
        (["--head-decay", "-1"], "a run needs head_decay >= 0, got --head-decay -1.0"),
    ],
)
def test_what_is_refused(options: list[str], message: str, files: Path, tmp_path: Path, capsys: Any) -> None:
    """Wrong settings end the command with a line that names the option."""
    assert main(words(files, tmp_path / "run", *options)) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "reason"), [("T5", "is an encoder-decoder"), ("Bert", "fills in words")])
def test_a_policy_that_cannot_write(name: str, reason: str, files: Path, tmp_path: Path, capsys: Any) -> None:
    """An encoder, and an encoder with a decoder, are refused in a sentence."""
    model = tiny.saved(architectures.ALL[name].classifier(), tmp_path / "model", tiny.tokenizer())
    assert main([*words(files, tmp_path / "run"), "--policy", model]) == 2
    assert reason in capsys.readouterr().err


def test_a_policy_that_is_an_adapter(files: Path, tmp_path: Path, capsys: Any) -> None:
    """The head goes on its base, which the command says."""
    with ignore_peft_warning():
        options = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = AutoModelForCausalLM.from_pretrained(files / "policy")
        get_peft_model(model, options).save_pretrained(tmp_path / "lora")
    assert main([*words(files, tmp_path / "run"), "--policy", str(tmp_path / "lora"), "--steps", "1"]) == 0
    assert f"lora is an adapter: the head is put on its base, {files / 'policy'}" in capsys.readouterr().err
    assert HeadedModel.from_pretrained(tmp_path / "run" / "model").settings.base == str(files / "policy")


def test_pairs_that_are_cut_to_the_same_tokens(files: Path, tmp_path: Path, capsys: Any) -> None:
    """Where both completions end alike and what differs was cut off, the command counts them."""
    rows = [{"prompt": f"{i}", "chosen": "good" + "x" * 40, "rejected": "bad" + "x" * 40} for i in range(3)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = [
        "--policy",
        str(files / "policy"),
        "--pairs",
        str(tmp_path / "long.jsonl"),
        "--out",
        str(tmp_path / "run"),
    ]
    with pytest.warns(TruncationWarning):
        assert main(["train", "head", *places, "--steps", "1", "--held-out", "0", "--max-length", "16"]) == 0
    assert "3 pairs with the same tokens twice" in capsys.readouterr().err


def test_settings_by_default() -> None:
    """All layers are a mix of each, with the embeddings; the defaults are the paper's loss."""
    with pytest.raises(ValueError, match="never packed, got window=8"):  # before anything is loaded
        HeadTraining(window=8)
    settings = HeadTraining(layers="all")
    assert settings.layer_indices(3) == (0, 1, 2, 3)
    loss = HeadTraining().joint_loss()
    assert (loss.head.kind, loss.head.smoothing, loss.head_weight, loss.dpo_weight) == ("separable", 0.1, 1.0, 0.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "templates.json is not JSON: "),
        ('{"nli": {"promt": "{question}"}}', "the template nli needs a prompt, and may have answers, choices, label"),
        ('{"nli": {"prompt": "{question}", "answer": []}}', "system, chat, got prompt, answer"),
    ],
)
def test_templates_that_are_none(content: str, message: str, files: Path, tmp_path: Path, capsys: Any) -> None:
    """A file that is not JSON, and fields that a template does not have, are named."""
    (tmp_path / "templates.json").write_text(content)
    assert main([*words(files, tmp_path / "run"), "--templates", str(tmp_path / "templates.json")]) == 2
    assert message in capsys.readouterr().err


def test_a_template_of_no_task_is_named(files: Path, tmp_path: Path, capsys: Any) -> None:
    """A misspelled task would leave its template unused without a word."""
    content = json.loads((files / "templates.json").read_text())
    (tmp_path / "more.json").write_text(json.dumps(content | {"evn": {"prompt": "{question}"}}))
    options = ["--templates", str(tmp_path / "more.json"), "--steps", "1", "--held-out", "0"]
    assert main([*words(files, tmp_path / "run"), *options]) == 0
    said = capsys.readouterr()
    assert "the template evn is not used: the pairs are of even, marks\n" in said.err
    assert said.out.startswith("no pair was held out, so how well the head orders pairs is not known: --held-out 0.2")


def test_a_policy_without_a_template(files: Path, tmp_path: Path, capsys: Any) -> None:
    """Messages, and texts that are to be messages, are refused in a sentence; texts are not."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    policy = ["--policy", tiny.saved(tiny.causal(), tmp_path / "plain", tokenizer)]
    texts = ["--pairs", f"marks={files / 'marks.jsonl'}"]
    assert main([*words(files, tmp_path / "run"), *policy]) == 2  # the task even has chats
    assert "no chat template, which pairs of messages need: put chat_template.jinja" in capsys.readouterr().err
    assert main([*words(files, tmp_path / "chat"), *policy, *texts, "--chat"]) == 2
    assert "no chat template, which --chat needs" in capsys.readouterr().err
    assert main([*words(files, tmp_path / "texts"), *policy, *texts]) == 0
