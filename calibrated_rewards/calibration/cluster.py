"""Do the work of a run on a Ray cluster: actors load their own models, and are replaced when they die.

Actors rather than Ray Data: tasks are made as they are taken, results come as each is done, a task whose worker died
is begun again alone, and a cluster all of whose processors are workers still makes progress.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import ray
from ray import cloudpickle
from ray.exceptions import RayError, RayTaskError

logger = logging.getLogger(__name__)

# Seconds without any worker, after which a warning says what the cluster lacks.
PATIENCE = 60.0
_dump: Callable[[Any], bytes] = cloudpickle.dumps  # as pickle, and also functions of a notebook or a script


@dataclass(frozen=True)
class RayCluster:
    """Workers on a Ray cluster, for `calibrate(..., cluster=RayCluster(8, num_gpus=1))`.

    Each gets the sampler and the reward models once, as they pickle: those of `load_sampler` and `load_scorer` as how
    to load them. Workers need no shared folder: results come back, and are kept where `calibrate` runs.
    """

    workers: int
    num_cpus: float = 1
    """CPUs that each worker needs, and has to itself."""
    num_gpus: float = 0
    resources: Mapping[str, float] | None = None
    address: str | None = None
    """The address of a running cluster; None: the one Ray is connected to, or finds, or a new one on this machine."""
    max_restarts: int = 3
    """Times that a task whose worker died is begun again, before the task is taken to be what kills them."""
    runtime_env: Mapping[str, Any] | None = None
    """The environment that workers on bare machines need, such as {"pip": ["calibrated-rewards[hf]"]}."""

    def __post_init__(self) -> None:
        if not isinstance(self.workers, int) or self.workers < 1:
            raise ValueError(f"RayCluster needs a whole number of workers >= 1, got workers={self.workers!r}")
        if self.max_restarts < 0:
            raise ValueError(f"RayCluster needs max_restarts >= 0, got max_restarts={self.max_restarts}")

    def __call__(self, function: Callable[[Any], Any], tasks: Iterable[Any], /) -> Iterator[Any]:
        """Yield function(task) for each task, in the order in which they are done.

        An error of the function ends the run, and is raised as it was. Tasks are taken one at a time, as workers
        become free.
        """
        crew = _Crew(self, _dump(function), iter(tasks))
        if not crew.has_work():
            return  # nothing is started for a run that is complete
        with _connect(self.address):
            try:
                yield from crew.results()
            finally:
                for actor in [*crew.idle, *(job.actor for job in crew.jobs.values())]:
                    ray.kill(actor)

    def needs(self) -> dict[str, Any]:
        """List the resources that each worker asks of the cluster."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, "resources": dict(self.resources or {})}


class _Worker:
    """An actor: a process that does one task after another."""

    def __init__(self, pickled: bytes) -> None:
        self.pickled = pickled
        self.function: Callable[[Any], Any] | None = None

    def start(self) -> None:
        """Answer when the process has started."""

    def do(self, task: bytes) -> bytes:
        """Do a task; load the function first, so that an error in that is an error of a task."""
        if self.function is None:
            self.function = cloudpickle.loads(self.pickled)
        return _dump(self.function(cloudpickle.loads(task)))


class _Job(NamedTuple):
    """An actor's pickled task, or None while it starts, and the number of workers that died of the same."""

    actor: Any
    task: bytes | None
    deaths: int


@dataclass
class _Crew:
    """The actors of one call, and the job of each."""

    cluster: RayCluster
    function: bytes
    tasks: Iterator[Any]
    jobs: dict[Any, _Job] = field(default_factory=dict)
    idle: list[Any] = field(default_factory=list)
    waiting: list[tuple[bytes, int]] = field(default_factory=list)
    """Tasks that no actor does, and the number of workers that died of each."""

    def has_work(self) -> bool:
        """Check that a task is waiting or at work."""
        return any(job.task for job in self.jobs.values()) or self._has_waiting()

    def results(self) -> Iterator[Any]:
        """Yield the results of the tasks."""
        function = ray.put(self.function)
        for _ in range(self.cluster.workers):
            self._hire(function, 0)
        while self.has_work():
            job, answer = self._wait()
            if isinstance(answer, RayError):
                self._hire(function, self._note_death(job, answer))
            else:
                self.idle.append(job.actor)
            while self.idle and self._has_waiting():
                actor, (task, deaths) = self.idle.pop(), self.waiting.pop()
                self.jobs[actor.do.remote(task)] = _Job(actor, task, deaths)
            if isinstance(answer, bytes):
                yield cloudpickle.loads(answer)

    def _wait(self) -> tuple[_Job, Any]:
        """Wait for the next actor that is ready; with its answer: a result, None for a start, or how it died."""
        at_work = self.idle or any(job.task for job in self.jobs.values())
        while not (ready := ray.wait([*self.jobs], timeout=None if at_work else PATIENCE)[0]):
            list_nodes: Callable[[], Any] = ray.nodes
            nodes = [node["Resources"] for node in list_nodes() if node["Alive"]]
            needs = self.cluster.needs()
            logger.warning("no worker has started for %.0f s: each needs %s, the nodes have %s", PATIENCE, needs, nodes)
        try:
            answer = ray.get(ready[0])
        except RayTaskError as error:
            raise (error.cause or error) from error
        except RayError as error:
            answer = error
        return self.jobs.pop(ready[0]), answer

    def _has_waiting(self) -> bool:
        """Check that a task waits for a worker; take a new one only if no other does."""
        if not self.waiting:
            self.waiting += [(_dump(task), 0) for task in islice(self.tasks, 1)]
        return bool(self.waiting)

    def _note_death(self, job: _Job, error: RayError) -> int:
        """Put the task of a dead worker first in the queue; count the workers that have died as they started."""
        ray.kill(job.actor)
        if job.deaths >= self.cluster.max_restarts:
            what = "came to life" if job.task is None else "outlived the same task"
            raise RuntimeError(f"none of {job.deaths + 1} workers {what}; the last: {error}") from error
        logger.warning("a worker died, and another takes its place: %s", str(error).partition("\n")[0])
        if job.task is None:
            return job.deaths + 1
        self.waiting.append((job.task, job.deaths + 1))
        return 0

    def _hire(self, function: Any, deaths: int) -> None:
        options = {**self.cluster.needs(), "scheduling_strategy": "SPREAD"}
        if self.cluster.runtime_env:
            options["runtime_env"] = dict(self.cluster.runtime_env)
        worker: Any = ray.remote(_Worker)
        actor = worker.options(**options).remote(function)
        self.jobs[actor.start.remote()] = _Job(actor, None, deaths)


@contextmanager
def _connect(address: str | None) -> Iterator[None]:
    """Connect to Ray for the block; end with it what was started for it."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()
