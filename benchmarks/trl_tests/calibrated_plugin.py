"""pytest plugin: TRL's trainers get a CalibratedReward in place of each reward that a test gives them.

Loaded by `run.py` (`pytest -p calibrated_plugin`). The environment says what it does:

    TRL_TESTS_FOLDER    the folder of `checkpoints.py`; it becomes the working directory, and tests that need what it
                        lacks are skipped
    TRL_TESTS_RESULTS   a JSON file: the outcome of each test, and which rewards were replaced in it
    TRL_TESTS_REPLACE   1 to replace rewards; 0 runs the tests as they are, for comparison

A reward model is replaced by the same model behind ranks; a function, if it needs prompts and completions only. The
table has all prompts of the tests' datasets, each with the scores of a few fixed completions as its references.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from transformers import PreTrainedModel

from calibrated_rewards import CalibratedReward, Exponential, ReferenceTable, prompt_key
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.scorers.protocol import score

FOLDER = Path(os.environ["TRL_TESTS_FOLDER"])
RESULTS = Path(os.environ["TRL_TESTS_RESULTS"])
REPLACE = os.environ["TRL_TESTS_REPLACE"] == "1"
COMPLETIONS = ("", "a", "Yes.", "No!", "?? 12", "the end", "zzzzzzzz", "Beautiful is better than ugly.")
NAME = re.compile(r"trl-internal-testing/[\w.-]+")

outcomes: dict[str, dict[str, Any]] = {}
replaced: list[str] = []


def pytest_configure() -> None:
    """Make the Hub's names folders on disk, and put ours between the tests and TRL's trainers."""
    os.chdir(FOLDER)
    if REPLACE:
        from trl.trainer.grpo_trainer import GRPOTrainer
        from trl.trainer.rloo_trainer import RLOOTrainer

        for trainer in (GRPOTrainer, RLOOTrainer):
            trainer.__init__ = replacing(trainer.__init__)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what loads a model or a dataset that cannot be built here."""
    for item in items:
        assert isinstance(item, pytest.Function)
        parameters = getattr(item, "callspec", None)
        fixed = re.sub(r"parametrize\((.|\n)*?\n    \)\n", "", inspect.getsource(item.function))
        wanted = NAME.findall(f"{fixed} {parameters.params if parameters else ''}")
        lacking = sorted({name for name in wanted if not (FOLDER / name).exists()})
        if lacking:
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(lacking)}, which cannot be built offline"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Forget the rewards of the test before."""
    replaced.clear()
    return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note how a test ended; an error in setup or teardown counts as its failure."""
    before = outcomes.get(report.nodeid, {}).get("outcome", "passed")
    if report.when == "call" or report.outcome != "passed":
        worse = "failed" if "failed" in (before, report.outcome) else report.outcome
        # The message alone: a traceback would name folders of this machine.
        crash = getattr(report.longrepr, "reprcrash", None)
        told = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(crash, "message", "")
        why = "" if report.outcome == "passed" else str(told).partition("\n")[0][:300]
        outcomes[report.nodeid] = {"outcome": worse, "replaced": list(replaced), "why": why}


def pytest_sessionfinish() -> None:
    """Write it all down."""
    RESULTS.write_text(json.dumps(outcomes, indent=1))


def replacing(init: Callable[..., None]) -> Callable[..., None]:
    """A trainer's constructor whose rewards are replaced on their way in."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def constructor(*arguments: Any, **options: Any) -> None:
        given = signature.bind(*arguments, **options)
        rewards = given.arguments.get("reward_funcs")
        if rewards is not None:
            own = dataset_prompts(given.arguments.get("train_dataset"), given.arguments.get("eval_dataset"))
            # A function of a test reads texts or messages, as its dataset has them.
            others = [prompt for prompt in zen_prompts() if not own or type(prompt) is type(own[0])]
            prompts = list({prompt_key(prompt): prompt for prompt in (*own, *others)}.values())
            several = isinstance(rewards, list)
            ours = [calibrated(reward, prompts) for reward in (rewards if several else [rewards])]
            given.arguments["reward_funcs"] = ours if several else ours[0]
        init(*given.args, **given.kwargs)

    return constructor


def dataset_prompts(*datasets: Any) -> list[Any]:
    """The distinct prompts of all datasets, streamed or not, and of dicts of them."""
    found: dict[Any, Any] = {}
    for data in datasets:
        rows: Iterable[Any] = [row for part in data.values() for row in part] if isinstance(data, dict) else data or ()
        found |= {prompt_key(row["prompt"]): row["prompt"] for row in rows}
    return list(found.values())


@functools.cache
def zen_prompts() -> list[Any]:
    """All prompts of the tests' own dataset: `evaluate` may bring a split that the constructor never saw."""
    configs = ("standard_prompt_only", "conversational_prompt_only")
    return dataset_prompts(*(load_dataset("trl-internal-testing/zen", config) for config in configs))


def calibrated(reward: Any, prompts: list[Any]) -> Any:
    """The reward's ranks among its scores of the fixed completions; the reward itself where it cannot be a scorer."""
    scorer, name = scorer_of(reward)
    if scorer is None:
        return reward
    rows = []
    for prompt in prompts:
        chat = not isinstance(prompt, str)
        answers = [[{"role": "assistant", "content": text}] if chat else text for text in COMPLETIONS]
        rows.append((prompt, score(scorer, [prompt] * len(answers), answers)))
    replaced.append(name)
    return CalibratedReward(scorer, ReferenceTable.build(rows), Exponential(5.0), name=name)


def scorer_of(reward: Any) -> tuple[Any, str]:
    """A scorer and the name that TRL would log, or None for rewards of other columns, coroutines and lists of None."""
    if isinstance(reward, PreTrainedModel):
        reward = reward.config._name_or_path
    if isinstance(reward, str):
        return load_scorer(reward, show_progress=False), reward.split("/")[-1]
    parameters = inspect.signature(reward).parameters
    kinds = {p.kind for name, p in parameters.items() if name not in ("prompts", "completions")}
    name = getattr(reward, "__name__", "reward")
    if not kinds <= {inspect.Parameter.VAR_KEYWORD} or inspect.iscoroutinefunction(reward):
        return None, name
    if "columns.get" in (source := inspect.getsource(reward)) or "kwargs[" in source or "None" in source:
        return None, name
    return reward, name
