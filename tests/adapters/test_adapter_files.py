"""What all adapters hold to, those that this machine can import or not; and the rewards of three of them."""

import ast
import asyncio
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from calibrated_rewards import CalibratedReward, Exponential, ReferenceTable, adapters
from calibrated_rewards.adapters import verifiers_reward
from calibrated_rewards.adapters.trl_ppo_module import RewardModule
from calibrated_rewards.prompts import id_key
from calibrated_rewards.reward.find_prompts import Originals
from calibrated_rewards.testing.check_adapter import check_adapter
from calibrated_rewards.testing.suites import HashScorer

FILES = sorted(Path(adapters.__path__[0]).glob("*.py"))
SHIPPED = [file for file in FILES if file.stem != "__init__"]
ROOT = Path(__file__).parents[2]
FRAMEWORKS = {"trl", "verl", "openrlhf", "swift", "slime", "skyrl", "areal", "verifiers", "tinker", "lightrft", "nemo"}

SYSTEM = {"role": "system", "content": "Be brief."}
CHATS = [[SYSTEM, {"role": "user", "content": f"Say {word}"}] for word in ("one", "two", "three")]
PLAIN = [[{"role": "user", "content": "No system here"}]]
COMPLETIONS = [f" answer {i}\n" for i in range(8)]
PROMPTS = [*CHATS, *CHATS, *PLAIN, *PLAIN]
IDS = ["a", "b", "c", "a", "b", "c", "d", "d"]


def rendered(chat: Any) -> str:
    return str(tiny.tokenizer().apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


@pytest.fixture
def reward(tmp_path, monkeypatch) -> CalibratedReward:
    """A reward that the environment names; its table knows each prompt by messages, rendering and id."""
    rng = np.random.default_rng(0)
    chats = [*CHATS, *PLAIN]
    rows = [
        (chat, rng.normal(size=16), [rendered(chat), id_key(name)]) for chat, name in zip(chats, "abcd", strict=True)
    ]
    probe = {"prompt": "p", "completion": "c", "score": float(HashScorer()(["p"], ["c"])[0])}
    table = ReferenceTable.build(rows, meta={"probes": [probe]})
    originals = Originals.write(tmp_path / "prompts.jsonl", table, chats)
    made = CalibratedReward(HashScorer(), table, Exponential(3.0), id_column="uid", originals=originals)
    made.save_pretrained(tmp_path / "reward")
    monkeypatch.setenv("CALIBRATED_REWARD", str(tmp_path / "reward"))
    return made


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_it_is_a_short_drop_in(file):
    """At most 60 lines; no import that is relative, no name of the framework alone, nothing read beside itself."""
    text = file.read_text()
    assert len(text.splitlines()) <= 60
    assert file.stem not in FRAMEWORKS
    assert "__file__" not in text
    tree = ast.parse(text)
    assert all(node.level == 0 for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_it_says_how_it_is_used(file):
    """How to switch it on, in a line that is set apart; the prompt's key; the settings. It is in the docs."""
    told = ast.get_docstring(ast.parse(file.read_text())) or ""
    assert re.search(r"^    \S", told, re.MULTILINE)
    assert "\nPrompt's key: " in told
    assert re.search(r"\nFaithful to E\[R\] - beta KL: ", told)
    assert f"`{file.stem}`" in (ROOT / "docs" / "guides" / "train.md").read_text()


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_reward_is_loaded_when_it_is_asked_for(file):
    """`configured()` is called in functions only: whoever imports the file may have no reward, and no GPU, yet."""
    tree = ast.parse(file.read_text())
    inside = {id(call) for function in ast.walk(tree) if isinstance(function, DEFS) for call in ast.walk(function)}
    called = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "configured"]
    assert "configured" in ast.unparse(tree)
    assert all(id(call) in inside for call in called)


DEFS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(frozen=True)
class Ppo:
    """TRL 1.12's get_reward, as its source has it: what it reads of a reward model, and at which position."""

    module: RewardModule

    def __call__(self, prompts: list[Any], completions: list[Any], _: Any) -> Any:
        """Prompts on the left, completions with their end on the right, both padded."""
        tokens = tiny.tokenizer()
        texts = [rendered(p) if isinstance(p, list) else p for p in prompts]
        asked = [tokens(text, add_special_tokens=False)["input_ids"] for text in texts]
        said = [[*tokens(c, add_special_tokens=False)["input_ids"], tiny.EOS] for c in completions]
        left, right = max(map(len, asked), default=0), max(map(len, said), default=0) + 1
        rows = [
            [tiny.PAD] * (left - len(p)) + p + c + [tiny.PAD] * (right - len(c))
            for p, c in zip(asked, said, strict=True)
        ]
        return self.rewards(torch.tensor(rows, dtype=torch.long).reshape(len(rows), left + right), left)

    def rewards(self, rows: torch.Tensor, context: int) -> torch.Tensor:
        """The reward of each row."""
        mask = rows != tiny.PAD
        backbone = getattr(self.module, self.module.base_model_prefix)
        output = backbone(
            input_ids=rows.masked_fill(~mask, 0),
            attention_mask=mask,
            position_ids=mask.cumsum(1) - mask.long(),
            return_dict=True,
            output_hidden_states=True,
            use_cache=False,
        )
        logits = self.module.score(output.hidden_states[-1])
        assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
        last = (rows[:, context:] == tiny.PAD).int().argmax(dim=1) - 1 + context
        return logits[torch.arange(len(rows)), last].squeeze(-1)


def test_the_module_of_ppo_conforms(reward):
    """Through token ids and padding on both sides; the end token that PPO leaves is among the endings."""
    ended = CalibratedReward(
        reward.scorer, reward.table, reward.transform, originals=reward.originals, endings=("</s>",)
    )
    module = RewardModule(tiny.tokenizer(), ended)
    check_adapter(Ppo(module), ended, PROMPTS, COMPLETIONS)
    assert not list(module.parameters())
    module.to("cpu").eval()


def test_the_module_reads_the_environment(reward):
    """Without a reward of its own; the end token stays, for the saved reward has no endings."""
    given = Ppo(RewardModule(tiny.tokenizer()))(PROMPTS, COMPLETIONS, None)
    wanted = reward.score(PROMPTS, [f"{completion}</s>" for completion in COMPLETIONS]).reward
    np.testing.assert_array_equal(given.numpy(), np.array(wanted, np.float32))


def test_plain_prompts_of_ppo_are_found_without_special_tokens():
    """A BOS before a text is no part of the prompt that was calibrated."""
    plain = CalibratedReward(HashScorer(), ReferenceTable.build([("Say one", np.linspace(-2, 2, 9))]))
    tokens = tiny.tokenizer()
    encoded = tokens(["Say one, yes", "Say one, no"], return_tensors="pt", padding=True)
    assert (encoded["input_ids"][:, 0] == tiny.BOS).all()
    output = RewardModule(tokens, plain, skip_special_tokens=True).backbone(**encoded)
    wanted = plain.score(["Say one"] * 2, [", yes", ", no"]).reward
    np.testing.assert_array_equal(output.last_hidden_state[:, 0, 0].numpy(), np.array(wanted, np.float32))


def v1(prompts: list[Any], completions: list[Any], ids: list[Any] | None) -> list[Any]:
    """Verifiers' v1, a task at a time and all at once: system prompt and prompt apart, the reply among messages."""
    named = ids or [None] * len(prompts)

    async def all_of_them():
        given = [verifiers_reward.reward(*task(*each)) for each in zip(prompts, completions, named, strict=True)]
        return list(await asyncio.gather(*given))

    return asyncio.run(all_of_them())


def task(prompt: Any, completion: str, name: Any) -> tuple[Any, Any]:
    system = prompt[0]["content"] if prompt[0]["role"] == "system" else None
    left = prompt if system is None else prompt[1:]
    # A text is what one message says.
    asked = left[0]["content"] if len(left) == 1 else left
    said = SimpleNamespace(content=completion)
    trace = SimpleNamespace(root_reply=None, assistant_messages=[said], last_reply=completion.strip())
    return SimpleNamespace(prompt=asked, system_prompt=system, id=None, uid=name), trace


def test_verifiers_conforms(reward):
    """By ids and by messages; what the policy said is not stripped, which `trace.last_reply` is."""
    check_adapter(v1, reward, PROMPTS, COMPLETIONS, IDS)
    check_adapter(v1, reward, PROMPTS, COMPLETIONS)


def old(prompts: list[Any], completions: list[Any], ids: list[Any] | None) -> list[Any]:
    """Verifiers' older Rubric, which hands over all that it has."""
    infos = [{} if ids is None else {"uid": name} for name in ids or prompts]
    messages = [[{"role": "assistant", "content": each}] for each in completions]
    others = {"answers": [""] * len(prompts), "states": [{}] * len(prompts), "tasks": [None] * len(prompts)}
    return asyncio.run(verifiers_reward.group(prompts=prompts, completions=messages, infos=infos, **others))


def test_the_old_group_function_conforms_and_ends_the_process(reward):
    """A Rubric makes 0 of exceptions, so an unknown prompt is one that it does not catch."""
    check_adapter(old, reward, PROMPTS, COMPLETIONS, IDS)
    with pytest.raises(SystemExit, match="the calibrated reward failed: UnknownPromptError"):
        old([[{"role": "user", "content": "Who?"}]], ["I"], None)
