"""The options that name the policy: what sampler they lead to, what they refuse, and that they load nothing early."""

import argparse
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import tiny

from calibrated_rewards.cli import model_options
from calibrated_rewards.models.text import Text
from calibrated_rewards.samplers.loading import load_sampler
from calibrated_rewards.samplers.openai import OpenAISampler
from calibrated_rewards.samplers.protocol import Decoding, sample
from calibrated_rewards.samplers.vllm import VllmSampler

SHORT = ["--max-tokens", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved language model."""
    return tiny.saved(tiny.causal(), tmp_path_factory.mktemp("policy"), tiny.tokenizer())


def parsed(*words: str, required: bool = True) -> argparse.Namespace:
    """Beside the options of a reward model, as `calibrate` has them."""
    parser = argparse.ArgumentParser()
    model_options.add_reward_model_options(parser)
    model_options.add_policy_options(parser, required)
    return parser.parse_args(["--reward-model", "rm", *words])


def test_the_decoding_is_what_was_said():
    """Every setting has its option, and nothing said is the model's own distribution."""
    assert model_options.build_decoding(parsed("--policy", "p", *SHORT)) == Decoding(max_tokens=4)
    words = (
        "--max-tokens 9 --temperature 0.7 --top-p 0.9 --top-k 5 --min-p 0.1 --repetition-penalty 1.2 --stop a --stop"
    )
    said = model_options.build_decoding(parsed("--policy", "p", *words.split(), "b c"))
    assert said == Decoding(9, 0.7, 0.9, 5, 0.1, 1.2, ("a", "b c"))


@pytest.mark.parametrize("words", [["--policy", "p"], SHORT])
def test_what_must_be_said(words, capsys):
    """A policy and the length of completions; where nothing has to be sampled, only when it is."""
    with pytest.raises(SystemExit):
        parsed(*words)
    assert "required" in capsys.readouterr().err
    with pytest.raises(ValueError, match="sampling needs --"):
        model_options.load_policy(parsed(*words, required=False))


def test_a_folder_is_sampled(folder):
    """By transformers, if nothing is said: the same as load_sampler's."""
    options = ["--policy-dtype", "float32", "--policy-device", "cpu", "--temperature", "0.5"]
    found = sample(model_options.load_policy(parsed("--policy", folder, *SHORT, *options)), ["ab"], [[1, 2]])

    expected = load_sampler(folder, Decoding(max_tokens=4, temperature=0.5), dtype="float32", device="cpu")
    assert found == sample(expected, ["ab"], [[1, 2]])


def test_vllm_is_told_its_options(folder, tmp_path):
    """It is loaded later: what it is told is in its recipe."""
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}!")
    words = "--engine vllm --policy-dtype bfloat16 --policy-option gpu_memory_utilization=0.5 --policy-chat-template"
    found: Any = model_options.load_policy(parsed("--policy", folder, *SHORT, *words.split(), str(template)))
    sampler = found if isinstance(found, VllmSampler) else found.sampler

    assert sampler.llm.options["gpu_memory_utilization"] == 0.5
    assert sampler.llm.options["dtype"] == "bfloat16"
    assert sampler.rendered([{"role": "user", "content": "Hi"}]) == "Hi!"


def test_a_url_is_asked(folder, tmp_path):
    """By the API of OpenAI, if nothing is said; with a tokenizer, prompts become tokens here."""
    url = ["--policy", "http://h:8000/v1", "--policy-served-model", "m", *SHORT]
    plain = OpenAISampler("http://h:8000/v1", "m", Decoding(max_tokens=4))
    assert (
        model_options.load_policy(parsed(*url))
        == model_options.load_policy(parsed(*url, "--engine", "openai"))
        == plain
    )
    chat: Any = model_options.load_policy(parsed(*url, "--policy-api", "chat", "--policy-option", "concurrency=3"))
    assert (chat.api, chat.concurrency) == ("chat", 3)

    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}!")
    read: Any = model_options.load_policy(
        parsed(*url, "--policy-tokenizer", folder, "--policy-chat-template", str(template))
    )
    assert read.text == Text(template="{{ messages[0]['content'] }}!")
    assert read.rendered([{"role": "user", "content": "Hi"}]) == "Hi!"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["http://u:secret@h?k=1"], "--policy-served-model"),
        (["http://u:secret@h?k=1", "--engine", "hf"], "got --policy http://h --engine hf"),
        (["p", "--engine", "openai"], "got --policy p --engine openai"),
        (["p", "--policy-api", "chat"], "--policy-api: --policy is no URL"),
        (["p", "--policy-served-model", "m"], "--policy-served-model: --policy is no URL"),
        (["p", "--engine", "vllm", "--policy-device", "cpu"], "--policy-device: vLLM"),
        (["http://h", "--policy-served-model", "m", "--policy-dtype", "float16"], "--policy-dtype: the server"),
        (["http://h", "--policy-served-model", "m", "--policy-revision", "r"], "--policy-revision: for a server"),
        (["p", "--policy-chat-template", "none.jinja"], "--policy-chat-template none.jinja"),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(words, message):
    """Before anything is loaded, and without the secrets of a URL."""
    with pytest.raises((ValueError, OSError), match=message) as caught:
        model_options.load_policy(parsed("--policy", *words, *SHORT))
    assert "secret" not in str(caught.value)


def test_every_setting_of_a_decoding_has_an_option():
    """But for token ids, which nobody types: they go by a stop text."""
    fields = set(signature(Decoding).parameters) - {"stop_token_ids"}
    assert fields <= set(vars(parsed("--policy", "p", *SHORT)))


def test_options_load_nothing():
    """Help and parsing take neither torch nor transformers."""
    code = (
        "import argparse, sys\nfrom calibrated_rewards.cli import model_options\n"
        "model_options.add_policy_options(argparse.ArgumentParser())\n"
        "sys.exit(not {'torch', 'transformers', 'httpx', 'vllm'}.isdisjoint(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0
