"""Kill test of calibrate(): whatever ends a run, and whenever, the same command finishes it with the same bytes.

    python benchmarks/crash.py            all of it, about half an hour
    python benchmarks/crash.py --quick    every 25th call, and 5 random kills of each kind

- At every call that changes a file (opens to write, writes, half writes, syncs, renames, removes, makes, locks) a run
  is killed with SIGKILL, and at every seventh interrupted with Ctrl-C, or told that the disk is full; then done again.
  Three runs: from nothing; more prompts, rollouts and reward models in a directory that has some; rollouts made
  elsewhere.
- At 20 random times over planning, sampling, scoring, writing and tabulating a run is killed with SIGKILL and done
  again, each in a directory of its own; the same with a tiny transformers policy and reward model; and 20 times in a
  row in one directory.

Each row says whether table.safetensors, table.json, run.json and the names of all files came out as without a kill, and
how many prompts were given to the sampler a second time. Processes are forked; none shares anything but the directory.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import deaths
from deaths import Noted, NotedScorer, note, notes, sampled
from environment import save

from calibrated_rewards.calibration.calibrate import calibrate

PROMPTS = [f"prompt {i}" for i in range(24)]
PER_SHARD = 4
KILLS = 20
# A call of each run in so many; all of the kills.
EVERY = {"killed": 1, "interrupted": 7, "full": 7}


def at_every_call(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Deaths at the calls of a run that change a file."""
    rows = []
    for death, every in EVERY.items():
        for run in deaths.RUNS:
            place = folder / f"{run}-{death}"
            place.mkdir()
            found = [*deaths.deaths(run, death, place, 25 if quick else every)]
            row = {
                "run": run,
                "death": death,
                "every": 25 if quick else every,
                "deaths": len(found),
                "finished": sum(died["again"] == deaths.DONE for died in found),
                "identical": sum(died["identical"] for died in found),
                "left_temporary_files": sum(bool(died["left"]) for died in found),
                "most_prompts_drawn_again": max(died["repeated"] for died in found),
                "prompts_per_shard": deaths.PER_SHARD,
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def slowly(log: str) -> None:
    """Have each sync take a while, and note what it is of."""
    phases = {"rollouts": "writing", "prompts": "planning", "aliases": "planning", ".run.json": "planning"}

    def sync(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        begins = path.name.rsplit(".", 1)[0]
        place = path.name if path.is_dir() else path.parent.name
        phase = phases.get(begins) or phases.get(place, "tabulating")
        note(log, {"phase": phase})
        time.sleep(0.03)

    os.fsync = sync


def fakes(folder: Path) -> None:
    """A run of two seconds, most of them spent waiting."""
    log = f"{folder}.log"
    slowly(log)
    calibrate(_slow(log), Noted(log, 0.08), NotedScorer(log, 0.08), folder, k=4, **_options())


def real(folder: Path) -> None:
    """The same with a policy and a reward model of transformers, tiny and random."""
    log = f"{folder}.log"
    slowly(log)
    draw, scorer = models()
    calibrate(_slow(log), Watched(log, draw), WatchedScorer(log, scorer), folder, k=4, **_options())


@cache
def models() -> tuple[Any, Any]:
    """The policy and the reward model, loaded before any process is forked."""
    import tiny
    import torch

    from calibrated_rewards.samplers.hf import HfSampler
    from calibrated_rewards.samplers.protocol import Decoding
    from calibrated_rewards.scorers.classifiers import SequenceClassifier

    torch.set_num_threads(1)
    draw = HfSampler(tiny.causal(), tiny.tokenizer(), Decoding(max_tokens=8), show_progress=False)
    return draw, SequenceClassifier(tiny.classifier(), tiny.tokenizer(), show_progress=False)


class Watched:
    """A sampler, and a note of what it was given."""

    def __init__(self, log: str, draw: Any) -> None:
        self.log, self.draw = log, draw

    def __call__(self, prompts: Any, seeds: Any) -> Any:
        """What it gives."""
        Noted(self.log)(prompts, seeds)
        return self.draw(prompts, seeds)

    def fingerprint(self) -> dict[str, Any]:
        """Its own."""
        return dict(self.draw.fingerprint())


class WatchedScorer(Watched):
    """A scorer, and a note of when it was called."""

    def __call__(self, prompts: Any, completions: Any) -> Any:
        """What it gives."""
        note(self.log, {"scoring": len(completions)})
        return self.draw(prompts, completions)


def _slow(log: str) -> Any:
    for prompt in PROMPTS:
        note(log, {"phase": "planning"})
        time.sleep(0.01)
        yield prompt


def _options() -> dict[str, Any]:
    return {"prompts_per_shard": PER_SHARD, "show_progress": False}


def killed_after(seconds: float, run: Callable[[Path], None], folder: Path) -> str | None:
    """Start a run and kill it; what it was doing, or None if it was done before."""
    pid = os.fork()
    if not pid:
        code = deaths.WRONG
        try:
            run(folder)
            code = deaths.DONE
        finally:
            if code:
                sys.excepthook(*sys.exc_info())
            os._exit(code)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (deaths.DONE, -signal.SIGKILL), code
    last = (notes(f"{folder}.log") or [{}])[-1]
    doing = last.get("phase") or next((name for name in ("sampling", "scoring") if name in last), "starting")
    return None if code == deaths.DONE else doing


def at_random(run: Callable[[Path], None], folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """So many kills, each of a run of its own."""
    folder.mkdir()
    if run is real:
        models()
    rng, began = random.Random(seed), time.monotonic()
    assert deaths.child(run, folder / "whole") == deaths.DONE
    lasts, expected = time.monotonic() - began, deaths.files(folder / "whole")
    phases, identical, again, number = Counter[str](), 0, [], 0
    while phases.total() < kills:
        path = folder / str(number := number + 1)
        phase = killed_after(rng.uniform(0, lasts), run, path)
        if phase is None:
            continue
        phases[phase] += 1
        assert deaths.child(run, path) == deaths.DONE
        identical += deaths.files(path) == expected
        again.append(_again(path))
    row = {"kills": kills, "seconds_of_a_run": round(lasts, 1), "phases": dict(phases), "identical": identical}
    return row | {"most_prompts_drawn_again": max(again), "prompts_per_shard": PER_SHARD}


def in_a_row(run: Callable[[Path], None], folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """So many kills of one run, which gets a little further each time."""
    folder.mkdir()
    rng, phases, number = random.Random(seed), Counter[str](), 0
    assert deaths.child(run, folder / "whole") == deaths.DONE
    while phases.total() < kills:
        path = folder / f"row{number}"
        phase = killed_after(rng.uniform(0.2, 0.9), run, path)
        if phase is None:
            number += 1  # it came to its end; the next one begins anew
        else:
            phases[phase] += 1
    assert deaths.child(run, path) == deaths.DONE
    identical = all(deaths.files(folder / f"row{n}") == deaths.files(folder / "whole") for n in range(number + 1))
    row = {"kills": kills, "runs": number + 1, "phases": dict(phases), "identical": identical}
    drawn_again = sum(_again(folder / f"row{n}") for n in range(number + 1))
    return row | {"prompts_drawn_again": drawn_again, "prompts_per_shard": PER_SHARD}


def _again(folder: Path) -> int:
    found = sampled(f"{folder}.log")
    return (found - Counter({*found})).total()


def main() -> None:
    """Run it, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    deaths.warm()
    folder = Path(tempfile.mkdtemp())
    kills = 5 if quick else KILLS
    try:
        results: dict[str, Any] = {"at_every_call": at_every_call(folder, quick)}
        scenes = {
            "at_random": partial(at_random, fakes, seed=0),
            "at_random_with_transformers": partial(at_random, real, seed=1),
            "in_a_row": partial(in_a_row, fakes, seed=2),
        }
        for name, scene in scenes.items():
            results[name] = scene(folder=folder / name, kills=kills)
            print(name, results[name], flush=True)
    finally:
        shutil.rmtree(folder)
    if not quick:
        print(save("crash", results))


if __name__ == "__main__":
    main()
