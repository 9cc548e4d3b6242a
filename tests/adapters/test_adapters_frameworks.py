"""Each framework's adapter, loaded from its file and called in the framework's shape, gives the reward's own numbers.

The frameworks are not installed here: what an adapter imports of one stands in for it, in the shape that its source
has. benchmarks/frameworks runs the frameworks' own loading code.
"""

import asyncio
import logging
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import calibrated_rewards.adapters
from calibrated_rewards import CalibratedReward, Exponential, ReferenceTable
from calibrated_rewards.prompts import UnknownPromptError, id_key
from calibrated_rewards.reward.find_prompts import Originals
from calibrated_rewards.reward.frameworks import completion_of, loud
from calibrated_rewards.testing.check_adapter import check_adapter
from calibrated_rewards.testing.suites import HashScorer

ADAPTERS = Path(calibrated_rewards.adapters.__file__).parent
END, PAD = "<|im_end|>", "<pad>"
CHATS = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{n}+{n}=?"}] for n in (1, 2, 3, 1)]
ANSWERS = ["2", "I say 4", "6", "two"]
IDS = ["one", "two", "three", "one"]
NAMES = ("raw", "u", "hit")


class RewardManagerBase:
    """In verl's place."""

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any) -> None:
        self.config, self.tokenizer, self.compute_score = config, tokenizer, compute_score


class DefaultRMPlugin:
    """In ms-swift's place: its `model` scores a row."""

    def __init__(self, model: Any, template: Any) -> None:
        self.model = model

    def __call__(self, inputs: list[Any], **_: Any) -> torch.Tensor:
        """Raw scores."""
        return torch.tensor([self.model(row) for row in inputs])


class BaseTextEnv:
    """In skyrl_gym's place."""


class EnvironmentInterface:
    """In nemo_rl's place."""


class EnvironmentReturn(NamedTuple):
    """In nemo_rl's place: its six fields."""

    observations: Any
    metadata: Any
    next_stop_strings: Any
    rewards: Any
    terminateds: Any
    answers: Any


class Tokens:
    """A tokenizer whose tokens are characters, END and PAD special ones."""

    def decode(self, tokens: torch.Tensor, skip_special_tokens: bool) -> str:
        """Their text."""
        assert skip_special_tokens
        return "".join(chr(token) for token in tokens.tolist() if token)


class Rollout:
    """As much of verl's DataProto, and of its items, as managers read."""

    def __init__(self, chat: Any, said: str, own: Any) -> None:
        tokens = torch.tensor([ord(c) for c in said + "xx"])  # padding that is no special token would show
        mask = torch.tensor([0, 1, 1] + [1] * len(said) + [0, 0])
        self.batch = {"responses": tokens, "attention_mask": mask}
        raw_prompt = np.empty(len(chat), dtype=object)
        raw_prompt[:] = chat
        self.non_tensor_batch = {"raw_prompt": raw_prompt, "extra_info": {"uid": own}}

    def __getitem__(self, at: Any) -> "Rollout":
        return self


STAND_INS: dict[str, dict[str, Any]] = {
    "verl.experimental.reward_loop.reward_manager.base": {"RewardManagerBase": RewardManagerBase},
    "swift.rewards": {"orms": {}, "rm_plugins": {"default": DefaultRMPlugin}},
    "skyrl_gym.envs.base_text_env": {"BaseTextEnv": BaseTextEnv, "BaseTextEnvStepOutput": dict},
    "nemo_rl.environments.interfaces": {
        "EnvironmentInterface": EnvironmentInterface,
        "EnvironmentReturn": EnvironmentReturn,
    },
}


def render(messages: Any) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}{END}\n" for m in messages) + "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> CalibratedReward:
    """Of a scorer that minds every character: what reads the rendering, or a special token, scores something else."""
    folder, scorer = tmp_path_factory.mktemp("reward"), HashScorer()
    rows = [
        (chat, scorer([chat] * 8, [str(k) for k in range(8)]), [render(chat), id_key(own)])
        for chat, own in list(zip(CHATS, IDS, strict=True))[:3]
    ]
    probe = {"prompt": CHATS[0], "completion": "0", "score": float(scorer([CHATS[0]], ["0"])[0])}
    table = ReferenceTable.build(rows, meta={"probes": [probe]})
    originals = Originals.write(folder / "prompts.jsonl", table, CHATS)
    made = CalibratedReward(
        scorer, table, Exponential(4.0), originals=originals, id_column="uid", endings=(END, PAD), name="it"
    )
    made.save_pretrained(folder / "saved")
    return CalibratedReward.from_pretrained(folder / "saved")


@pytest.fixture
def load(reward: CalibratedReward, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Loads an adapter's file as frameworks do, under a name of theirs."""
    monkeypatch.setenv("CALIBRATED_REWARD", str(Path(str(reward.table.path)).parent))
    for name, members in STAND_INS.items():
        whole = name.split(".")
        for end in range(1, len(whole) + 1):
            monkeypatch.setitem(sys.modules, ".".join(whole[:end]), ModuleType(".".join(whole[:end])))
        sys.modules[name].__dict__.update(members)

    def loaded(name: str) -> ModuleType:
        spec = spec_from_file_location("reward_func", ADAPTERS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "reward_func", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return loaded


def openrlhf(module: ModuleType, chats: Any, said: Any, ids: Any) -> list[Any]:
    """Threads that ask with lists of one."""
    whole = [([render(c) + s + END], [render(c)], [own]) for c, s, own in zip(chats, said, ids, strict=True)]
    answers = [module.reward_func(*each) for each in whole]
    assert all(set(answer) == {"rewards", "scores", "extra_logs"} for answer in answers)
    return [answer["rewards"][0] for answer in answers]


def lightrft(module: ModuleType, chats: Any, said: Any, ids: Any) -> Any:
    """A micro-batch of padded sequences."""
    queries = [PAD * 2 + render(c) + s + END + PAD * 3 for c, s in zip(chats, said, strict=True)]
    return module.reward_func(queries, [render(c) for c in chats], ids)


def verl_function(module: ModuleType, chats: Any, said: Any, ids: Any) -> list[Any]:
    """By keyword, one row each, at once."""

    async def all_rows() -> list[Any]:
        return await asyncio.gather(
            *(
                module.compute_score(
                    data_source="mine", solution_str=s, ground_truth="", extra_info={"uid": own, "raw_prompt": c}
                )
                for c, s, own in zip(chats, said, ids, strict=True)
            )
        )

    answers = asyncio.run(all_rows())
    assert all(set(answer) == {"score", *NAMES} for answer in answers)
    return [answer["score"] for answer in answers]


def verl_manager(module: ModuleType, chats: Any, said: Any, ids: Any) -> list[Any]:
    """One row each, at once."""
    manager = module.CalibratedRewardManager(
        config=None, tokenizer=Tokens(), compute_score=None, reward_router_address=None, reward_model_tokenizer=None
    )

    async def all_rows() -> list[Any]:
        rows = [Rollout(*each) for each in zip(chats, said, ids, strict=True)]
        return await asyncio.gather(*(manager.run_single(row) for row in rows))

    answers = asyncio.run(all_rows())
    assert all(set(answer["reward_extra_info"]) == {"score", *NAMES} for answer in answers)
    return [answer["reward_score"] for answer in answers]


def swift(module: ModuleType, chats: Any, said: Any, ids: Any) -> list[Any]:
    """Messages that have the completion, and the dataset's columns."""
    messages = [[*c, {"role": "assistant", "content": s}] for c, s in zip(chats, said, strict=True)]
    function = sys.modules["swift.rewards"].orms["calibrated"](args=None)
    assert isinstance(function, module.Calibrated)
    columns = {"uid": ids, "prompt_id": ["x"] * len(ids), "trainer_state": SimpleNamespace(global_step=3)}
    return list(function(list(said), messages=messages, **columns))


def swift_plugin(module: ModuleType, chats: Any, said: Any, ids: Any) -> Any:
    """Rows; the model that the trainer loaded is the scorer here."""
    originals = dict(zip(IDS, CHATS, strict=True))

    def model(row: Any) -> float:
        prompt = originals.get(row["uid"], row["messages"][:-1])
        return float(HashScorer()([prompt], [row["messages"][-1]["content"]])[0])

    plugin = sys.modules["swift.rewards"].rm_plugins["calibrated"](model=model, template=None)
    assert isinstance(plugin, module.CalibratedModel)
    rows = zip(chats, said, ids, strict=True)
    return plugin(inputs=[{"messages": [*c, {"role": "assistant", "content": s}], "uid": own} for c, s, own in rows])


def skyrl(module: ModuleType, chats: Any, said: Any, ids: Any) -> list[Any]:
    """An environment each, whose prompt is appended to in the meantime."""
    rewards = []
    for chat, answer, own in zip(chats, said, ids, strict=True):
        env, prompt = module.CalibratedEnv(env_config=None, extras={"uid": own, "max_turns": 1}), list(chat)
        assert env.init(prompt) == (prompt, {})
        prompt.append({"role": "assistant", "content": answer})
        step = env.step(answer)
        assert step["done"]
        assert set(step["metadata"]) == set(env.get_metrics()) == set(NAMES)
        rewards.append(step["reward"])
    return rewards


def slime(module: ModuleType, chats: Any, said: Any, ids: Any) -> Any:
    """A group."""
    samples = [
        SimpleNamespace(prompt=render(c), response=s, metadata={"uid": own})
        for c, s, own in zip(chats, said, ids, strict=True)
    ]
    return asyncio.run(module.reward(SimpleNamespace(reward_key=None), samples))


def nemo(module: ModuleType, chats: Any, said: Any, ids: Any) -> Any:
    """A step of an actor, without its cluster; user content is the rendered template."""
    env = module.CalibratedEnv.__ray_metadata__.modified_class({})
    logs = [
        [{"role": "user", "content": render(c)}, {"role": "assistant", "content": s}]
        for c, s in zip(chats, said, strict=True)
    ]
    step = env.step(logs, [{"uid": own} for own in ids])
    assert step.terminateds.dtype == torch.bool
    assert {len(part) for part in step} == {len(logs)}
    batch, metrics = env.global_post_process_and_metrics({})
    assert batch == {}
    assert set(metrics) == ({f"calibrated/{name}" for name in NAMES} if logs else set())
    return step.rewards


def areal(module: ModuleType, chats: Any, said: Any, ids: Any) -> list[Any]:
    """One completion, then tokens, then the row's columns by name."""
    rows = zip(chats, said, ids, strict=True)
    return [
        module.reward("nobody's rendering", s + END, [1, 2], [3], messages=c, uid=own, answer="4") for c, s, own in rows
    ]


SHAPES = {
    openrlhf: "openrlhf_reward",
    lightrft: "lightrft_reward",
    verl_function: "verl_reward",
    verl_manager: "verl_reward",
    swift: "swift_reward",
    swift_plugin: "swift_reward",
    skyrl: "skyrl_env",
    slime: "slime_reward",
    nemo: "nemo_env",
    areal: "areal_reward",
}


@pytest.mark.filterwarnings("ignore:.*calibrated:UserWarning")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
@pytest.mark.parametrize("by", ["ids", "prompts"])
def test_an_adapter_gives_the_rewards_of_the_reward(shape, by, load, reward):
    """Alone, in batches, from threads, with odd texts, unknown prompts; found by ids, and by prompts alone."""
    module = load(SHAPES[shape])

    def call(prompts: Any, completions: Any, ids: Any) -> Any:
        return shape(module, prompts, completions, [None] * len(prompts) if ids is None else ids)

    check_adapter(call, reward, CHATS, ANSWERS, IDS if by == "ids" else None)


@pytest.mark.parametrize("name", sorted(set(SHAPES.values())))
def test_an_adapter_reads_nothing_before_it_is_called(name, load, monkeypatch):
    """Frameworks import it where no reward is, and only workers call it."""
    monkeypatch.delenv("CALIBRATED_REWARD")
    load_again = load(name)
    assert load_again.__doc__
    with pytest.raises(ValueError, match="CALIBRATED_REWARD"):
        load_again.configured()


def test_what_frameworks_log_is_what_the_reward_says(load, reward):
    """OpenRLHF's logs, SkyRL's metrics, verl's extra info and slime's dict: raw, u and whether the prompt is known."""
    wanted = reward.score(CHATS[:1], ANSWERS[:1])[0]
    details = {"raw": wanted.raw, "u": wanted.u, "hit": 1.0}
    text = render(CHATS[0])
    answer = load("openrlhf_reward").reward_func([text + ANSWERS[0]], [text], [""])
    assert answer["extra_logs"] == {name: [value] for name, value in details.items()}
    assert answer["scores"] == [wanted.u]
    env = load("skyrl_env").CalibratedEnv(extras={})
    env.init(CHATS[0])
    assert env.step(ANSWERS[0])["metadata"] == details
    scored = asyncio.run(load("verl_reward").compute_score(solution_str=ANSWERS[0], extra_info={"prompt": CHATS[0]}))
    assert scored == {"score": wanted.reward, **details}
    sample = SimpleNamespace(prompt=CHATS[0], response=ANSWERS[0], metadata={})
    rewarded = asyncio.run(load("slime_reward").reward(SimpleNamespace(reward_key="reward"), sample))
    assert rewarded == {"reward": wanted.reward, **details}
    assert all(type(value) is float for value in rewarded.values())


def test_verl_finds_a_prompt_that_it_is_not_told_by_its_id(load, reward):
    """The function's scorer reads the prompt that was calibrated."""
    scored = asyncio.run(load("verl_reward").compute_score(solution_str="4?", extra_info={"uid": "two"}))
    assert scored["score"] == reward.score([CHATS[1]], ["4?"]).reward[0]


def test_a_label_that_is_an_answer_is_no_id(load, reward, monkeypatch, tmp_path):
    """Without `id_column` labels lead nowhere, be they some other prompt's id."""
    unnamed = CalibratedReward.from_pretrained(Path(str(reward.table.path)).parent, id_column=None)
    unnamed.save_pretrained(tmp_path / "unnamed")
    module, text = load("openrlhf_reward"), render(CHATS[0])
    monkeypatch.setenv("CALIBRATED_REWARD", str(tmp_path / "unnamed"))
    answer = module.reward_func([text + "2"], [text], ["two"])
    assert answer["rewards"] == reward.score(CHATS[:1], ["2"]).reward


@pytest.mark.parametrize("shape", [openrlhf, areal, verl_function, slime], ids=lambda shape: shape.__name__)
def test_what_a_framework_would_hide_is_logged(shape, load, caplog):
    """OpenRLHF drops the reward, others make 0 of it: the log has the error before they do."""
    with caplog.at_level(logging.ERROR), pytest.raises(UnknownPromptError):
        shape(load(SHAPES[shape]), [[{"role": "user", "content": "Who?"}]], ["I"], [None])
    assert any("no references" in record.getMessage() for record in caplog.records)


def test_what_takes_longer_than_a_framework_waits_is_logged(caplog):
    """AReaL gives up after 15 s, and the reward is 0."""
    with loud("AReaL", seconds=-1.0):
        pass
    assert "made it 0" in caplog.text
    caplog.clear()
    with loud("AReaL", seconds=60.0):
        pass
    assert not caplog.records


def test_skipped_prompts_are_an_error_where_a_framework_takes_only_numbers(load, reward, monkeypatch, tmp_path):
    """None is no reward for verl; ms-swift leaves it out."""
    skipping = CalibratedReward.from_pretrained(Path(str(reward.table.path)).parent, on_missing="skip")
    skipping.save_pretrained(tmp_path / "skipping")
    module = load("verl_reward")
    monkeypatch.setenv("CALIBRATED_REWARD", str(tmp_path / "skipping"))
    nobodys = [[{"role": "user", "content": "Who?"}]]
    with pytest.raises(ValueError, match="neutral"):
        verl_function(module, nobodys, ["I"], [None])
    assert swift(load("swift_reward"), nobodys, ["I"], [None]) == [None]


def test_a_completion_is_what_follows_its_prompt():
    """The first time that it is there, whatever comes after; a prompt that was cut off on its left is refused."""
    assert completion_of("pp: pp: x", "pp: ") == "pp: x"
    assert completion_of("x", "") == "x"
    with pytest.raises(ValueError, match="truncated"):
        completion_of("lo wor", "hello ")


@pytest.mark.parametrize("name", sorted(set(SHAPES.values())))
def test_an_adapter_is_short_and_says_how_to_switch_it_on(name):
    """At most 60 lines; its docstring has the variable, the prompt's key and the faithful settings."""
    lines = (ADAPTERS / f"{name}.py").read_text().splitlines()
    text = "\n".join(lines)
    assert len(lines) <= 60
    for part in ("CALIBRATED_REWARD", "Prompt's key:", "Faithful to E[R] - beta KL:"):
        assert part in text
