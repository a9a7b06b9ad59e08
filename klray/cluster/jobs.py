"""Jobs of one kind on a pool: what is missing is run, each result kept as it comes, and what fails is collected."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import ray

from klray.cli import duration
from klray.cluster.pool import Place, Work, run_jobs
from klray.errors import RunError, UserError


class JobError(RunError):
    """Raised by a kind's ``keep`` for a value that says that the job failed, and would again."""


class JobKind(Protocol):
    """What differs from one kind of job to another; a job is anything that can be pickled.

    Only ``prepare``, and the work that it gives, run on the workers; everything else runs in the driver.
    """

    @abstractmethod
    def name(self, job: Any) -> str:
        """Of no other job."""

    @abstractmethod
    def done(self, job: Any) -> bool:
        """Whether an earlier call has kept the job's result."""

    @abstractmethod
    def resources(self, missing: Sequence[Any]) -> dict[str, Any]:
        """Keyword arguments of ``run_jobs``, ``workers`` at least; asked for where a job is missing."""

    @abstractmethod
    def settings(self) -> Any:
        """What every worker is given; asked for where a job is missing."""

    @staticmethod
    @abstractmethod
    def prepare(place: Place, settings: Any) -> Work:
        """Loads on a worker, once, what its jobs need; returns what does one."""

    @abstractmethod
    def keep(self, job: Any, value: Any) -> str:
        """Writes down what a job gave, whole or not at all; returns what a line says of it.

        Raises:
            JobError: where the value says that the job failed.
        """

    def cost(self, job: Any) -> float:
        """In any unit, the same for all; the most costly jobs begin first."""
        return 1.0

    def running(self, job: Any, report: Any) -> tuple[float, str]:
        """Of what a job reports: the share of it that is done, in [0, 1], and what a line says."""
        return 0.0, ""

    def failed(self, job: Any, error: str) -> str:
        """Writes down why a job has failed; returns what a line says of it."""
        return f"failed: {error}"


class JobProgress:
    """Lines of jobs as they go on, with the time left; over several calls of ``run_missing`` too.

    Args:
        show: is given lines; those of running jobs at most once in ``interval`` seconds.
        costs: of all jobs that are planned, also of those that are done already.
    """

    def __init__(self, show: Callable[[str], None], costs: Sequence[float], interval: float = 15.0) -> None:
        self.show, self.interval = show, interval
        self._count, self._cost = len(costs), sum(costs)  # that are left, but for what is done of the running ones
        self._running: dict[str, tuple[float, float, str]] = {}  # cost, share, what a line says
        self._spent = 0.0  # on the jobs that ended
        self._shown_at = time.monotonic()
        self._began, self._heard = (self._shown_at, 0.0), False  # time left is judged from here on

    def skip(self, cost: float) -> None:
        """For a planned job that was done before."""
        self._count, self._cost = self._count - 1, self._cost - cost

    def running(self, name: str, cost: float, share: float, text: str) -> None:
        """For what a running job reports."""
        self._running[name] = (cost, min(1.0, share), text)
        now = time.monotonic()
        if not self._heard:  # starting the workers tells nothing of how long a job takes
            self._began, self._heard = (now, self._spent + self._underway()), True
        if now - self._shown_at >= self.interval:
            self._shown_at = now
            for each, (_, done, latest) in self._running.items():
                self.show(f"  {each}  {100 * done:.0f} %  {latest}")
            self.show(f"  about {self._time_left()} left")

    def ended(self, name: str, cost: float, text: str) -> None:
        """For a job that finished or failed."""
        self._running.pop(name, None)
        self.skip(cost)
        self._spent += cost
        self.show(f"{name} {text}" + (f"  ({self._count} to go, about {self._time_left()})" if self._count > 0 else ""))

    def _underway(self) -> float:
        return sum(cost * share for cost, share, _ in self._running.values())

    def _time_left(self) -> str:
        since, before = self._began
        spent = self._spent + self._underway() - before
        if spent <= 0:
            return "?"
        return duration((time.monotonic() - since) / spent * max(0.0, self._cost - self._underway()))


def run_missing(kind: JobKind, jobs: Sequence[Any], progress: JobProgress) -> dict[str, str]:
    """Runs the jobs that are not done, on the connected cluster; each result is kept as soon as it is there.

    What keeps two drivers off the same jobs is the lock of the folder that they lie in, which the caller holds. After
    Ctrl-C, or once killed, the same call goes on with what is missing.

    Returns:
        The error's line of each job that failed as often as ``run_jobs`` allows, by its name.

    Raises:
        UserError, RunError: as ``run_jobs``, and what ``keep`` raises but JobError.
    """
    missing = []
    for job in sorted(jobs, key=kind.cost, reverse=True):
        if kind.done(job):
            progress.skip(kind.cost(job))
        else:
            missing.append(job)
    if not missing:
        return {}

    def on_report(index: int, report: Any) -> None:
        job = missing[index]
        progress.running(kind.name(job), kind.cost(job), *kind.running(job, report))

    failures: dict[str, str] = {}
    outcomes = run_jobs(kind.prepare, kind.settings(), missing, on_report=on_report, **kind.resources(missing))
    with closing(outcomes):  # so that no worker is left when this returns or raises
        for outcome in outcomes:
            job = missing[outcome.index]
            try:
                if outcome.error is not None:
                    raise JobError(outcome.error)
                text = kind.keep(job, outcome.value)
            except JobError as error:
                failures[kind.name(job)] = str(error)
                text = kind.failed(job, str(error))
            progress.ended(kind.name(job), kind.cost(job), text)
    return failures


def check_shared(folder: Path, flags: str) -> None:
    """Refuses, on a worker, a folder that the driver has made and this machine does not see.

    Args:
        flags: that name the folder, in words.

    Raises:
        UserError: one line.
    """
    if not folder.exists():
        raise UserError(not_shared(folder, [ray.util.get_node_ip_address()], flags))


def not_shared(folder: Path, machines: Sequence[str], flags: str) -> str:
    """What is said of a folder that the machines of these addresses do not see."""
    seen_not = f"{', '.join(machines)} does not see it"
    return f"{folder} must be in a folder that all machines share, {seen_not}; name one by {flags}"
