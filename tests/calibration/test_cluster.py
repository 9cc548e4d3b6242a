"""Work on a Ray cluster of two nodes: the table of one process, though workers are killed and a node goes away."""

import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass

import deaths
import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster

from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.calibration.cluster import RayCluster
from calibrated_rewards.testing.suites import NumberSampler, NumberScorer

pytestmark = [
    # Ray leaves sockets and processes to the garbage collector, and says what its next versions will change.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
PROMPTS = [f"prompt {i}" for i in range(12)]
MEMORY = 80 * 2**20


@pytest.fixture(scope="module")
def nodes():
    """A cluster of two machines with a processor each, on this one."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": MEMORY, "include_dashboard": False}
    )
    # Workers know the library, and get what is of these tests with their work.
    ours = deaths, sys.modules[__name__]
    for module in ours:
        cloudpickle.register_pickle_by_value(module)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        for module in ours:
            cloudpickle.unregister_pickle_by_value(module)


@dataclass(frozen=True)
class Busy(deaths.Noted):
    """A sampler that does not go on before so many workers have begun."""

    workers: int = 1

    def __call__(self, prompts, seeds):
        """What NumberSampler gives."""
        drawn, patience = super().__call__(prompts, seeds), time.monotonic() + 60
        while len(pids(self.log)) < self.workers and time.monotonic() < patience:
            time.sleep(0.02)
        return drawn


@dataclass(frozen=True)
class Fatal(deaths.Noted):
    """A sampler that kills its process at a prompt, so many times."""

    prompt: str = PROMPTS[5]
    times: int = 1

    def __call__(self, prompts, seeds):
        """What NumberSampler gives, if it lives."""
        drawn = super().__call__(prompts, seeds)
        lines = [line for line in deaths.notes(self.log) if line["sampling"]]
        if self.prompt in prompts and sum(key(self.prompt) in line["sampling"] for line in lines) <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        return drawn


@dataclass(frozen=True)
class Faulty(NumberSampler):
    """A sampler that cannot do one of the prompts."""

    def __call__(self, prompts, seeds):
        """What NumberSampler gives."""
        if PROMPTS[5] in prompts:
            raise LookupError(f"odd: {PROMPTS[5]}", 5)
        return super().__call__(prompts, seeds)


def key(prompt):
    return deaths.prompt_key(prompt).hex()


def pids(log):
    return {line["pid"] for line in deaths.notes(log)}


def run(folder, sampler, **options):
    return calibrate(PROMPTS, sampler, NumberScorer(), folder, k=3, prompts_per_shard=2, **options)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The files of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, deaths.Noted(f"{folder}.log"))
    return deaths.files(folder)


@pytest.mark.usefixtures("nodes")
def test_a_worker_that_dies_is_replaced(tmp_path, expected):
    """Killed at a shard: that shard alone is done again, by another."""
    log = f"{tmp_path}.log"
    run(tmp_path, Fatal(log), cluster=RayCluster(2))
    assert deaths.files(tmp_path) == expected
    assert Counter(deaths.sampled(log).values()) == {1: 10, 2: 2}


@pytest.mark.usefixtures("nodes")
def test_an_error_of_the_sampler_is_raised_as_it_was(tmp_path):
    """Type and words, once; what was done before is kept, and the next run goes on with it."""
    with pytest.raises(LookupError, match="odd: prompt 5") as caught:
        run(tmp_path, Faulty(), cluster=RayCluster(1))
    assert caught.value.args == (f"odd: {PROMPTS[5]}", 5)
    assert type(caught.value) is LookupError
    assert "in __call__" in str(caught.value.__cause__)  # where it was, on the worker
    assert sorted(path.name for path in tmp_path.glob("rollouts/*")) == ["00000.parquet", "00001.parquet"]
    patience = time.monotonic() + 15  # workers are gone, also while the error is looked at
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < patience
        time.sleep(0.05)


@pytest.mark.usefixtures("nodes")
def test_a_task_that_kills_its_workers_is_named_as_the_cause(tmp_path):
    """Not for ever: after max_restarts the run ends, and says so."""
    log = f"{tmp_path}.log"
    with pytest.raises(RuntimeError, match="none of 2 workers outlived the same task"):
        run(tmp_path, Fatal(log, times=9), cluster=RayCluster(1, max_restarts=1))
    assert deaths.sampled(log)[key(PROMPTS[5])] == 2


@pytest.mark.usefixtures("nodes")
def test_a_sampler_that_does_not_load_is_an_error_of_the_run():
    """What fails as a worker unpickles is raised, and what does not pickle is, before anything starts."""

    class Unloadable:
        def __reduce__(self):
            return int, ("no number",)

        def __call__(self, task):
            return task

    with pytest.raises(ValueError, match="no number"):
        list(RayCluster(1)(Unloadable(), [1]))
    with pytest.raises(TypeError, match="pickle"):
        list(RayCluster(1)((task for task in ()).send, [1]))


@pytest.mark.usefixtures("nodes")
def test_tasks_are_taken_as_workers_become_free():
    """One for each worker, and results come while others are at work."""
    taken = []

    def tasks():
        for i in range(6):
            taken.append(i)
            yield i

    results = RayCluster(1)(str, tasks())
    assert [(next(results), len(taken)) for _ in range(5)] == [(str(i), i + 2) for i in range(5)]
    results.close()


def test_nothing_starts_for_nothing(monkeypatch):
    """A run that is complete needs no cluster."""
    monkeypatch.setattr(ray, "is_initialized", lambda: 1 / 0)
    assert list(RayCluster(1)(str, [])) == []


@pytest.mark.parametrize(
    ("options", "says"), [({"workers": 0}, "workers=0"), ({"max_restarts": -1}, "max_restarts=-1")]
)
def test_wrong_numbers_are_refused(options, says):
    """By name and value."""
    with pytest.raises(ValueError, match=says):
        RayCluster(**{"workers": 1, **options})


def test_a_node_that_goes_away_is_done_without(nodes, tmp_path, expected):
    """Two workers on two nodes; one of these is removed as both are at work. Last, since it is gone then."""
    log = f"{tmp_path}.log"

    def cluster(function, tasks):
        for number, task in enumerate(RayCluster(2)(function, tasks)):
            if not number:
                assert len(pids(log)) == 2
                nodes.remove_node(nodes.list_all_nodes()[-1])
            yield task

    run(tmp_path, Busy(log, 0.1, 2), cluster=cluster)
    assert deaths.files(tmp_path) == expected
    assert sum(node["Alive"] for node in ray.nodes()) == 1
    assert sum(count - 1 for count in deaths.sampled(log).values()) <= 2
