"""A pool of Ray actors for independent jobs; whatever dies is made anew and its job is done again."""

from __future__ import annotations

import math
import pickle
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from klray.cluster.connect import cluster_size, cpu_share, may_grow
from klray.cluster.group import Address, join_group, open_store
from klray.errors import RunError, UserError

_PLACEMENT_TIMEOUT_S = 60.0
_MACHINE_TIMEOUT_S = 900.0  # where one must be started first


@dataclass(frozen=True)
class Place:
    """Where a worker is: its rank within its group, the group's size, its device."""

    rank: int
    size: int
    device: torch.device


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its value, or in one line why its last attempt failed."""

    index: int
    value: Any = None
    error: str | None = None


class _WorkerLost(RunError):
    """A group that died or found no place: another one may do better."""


Report = Callable[[Any], None]
Work = Callable[[Any, Report], Any]


def run_jobs(
    prepare: Callable[[Place, Any], Work],
    settings: Any,
    jobs: Sequence[Any],
    *,
    workers: int,
    group_size: int = 1,
    gpus_per_worker: float | None = None,
    cpus_per_worker: float | None = None,
    attempts: int = 2,
    on_report: Callable[[int, Any], None] | None = None,
) -> Generator[Outcome, None, None]:
    """Hands the jobs in their order to groups of workers and yields each outcome as it comes.

    Every worker calls ``prepare(place, settings)`` once, then ``work(job, report)`` for each job of its group. The
    members of a group do the same job, joined in torch.distributed's default process group; rank 0's value and reports
    count. The first job begins when every group is prepared or given up.

    A death or an exception in any member ends the attempt at a job, and the group is made anew: after some exceptions,
    such as CUDA's, a process is of no more use. A group that cannot be made is given up. ``report(value)`` does not
    wait; ``on_report(index, value)`` is called here, in a job's order, from the start again where the job is repeated.
    Ending the iteration kills the workers and waits until their resources are free.

    Args:
        workers: of all groups; fewer are started where there are fewer jobs than groups.
        gpus_per_worker: one by default, or a part where the cluster has fewer GPUs than workers; without GPUs the
            workers share its CPUs.
        cpus_per_worker: an equal share of all by default; less where others use the cluster too.
        attempts: at each job before its outcome is an error.

    Raises:
        UserError: where the workers do not fit the groups or the GPUs, or where ``prepare`` raises it.
        RunError: where ``prepare`` fails otherwise, or no group is left.
    """
    if workers < 1 or group_size < 1 or workers % group_size:
        raise UserError(f"group_size must divide the number of workers, {workers}, got {group_size}")
    groups = min(workers // group_size, len(jobs))
    workers = max(1, groups) * group_size
    gpus = cluster_size()[1]
    if not gpus:
        gpus_per_worker = 0
    elif gpus_per_worker is None:  # a part must be free on a single GPU
        gpus_per_worker = int(10000 / math.ceil(workers / gpus)) / 10000
    if workers * gpus_per_worker > gpus:
        raise UserError(f"workers x gpus_per_worker must be at most {gpus}, got {workers} x {gpus_per_worker}")
    share = {"CPU": cpus_per_worker or cpu_share(workers), "GPU": gpus_per_worker}
    given = ray.put((prepare, settings, on_report is not None))
    return _outcomes(lambda: _Group(group_size, share, given), groups, jobs, attempts, on_report)


def _outcomes(
    make: Callable[[], _Group],
    missing: int,
    jobs: Sequence[Any],
    attempts: int,
    on_report: Callable[[int, Any], None] | None,
) -> Generator[Outcome, None, None]:
    waiting, failures = deque(range(len(jobs))), Counter[int]()
    groups: list[_Group] = []
    placements: list[PlacementGroup] = []
    outcomes: list[Outcome] = []
    left, begun, why = len(jobs), False, ""
    try:
        while left:
            while missing and len(waiting) > sum(group.index is None for group in groups):
                groups.append(make())
                placements.append(groups[-1].placement)
                missing -= 1
            begun = begun or not any(group.pending for group in groups)
            for group in groups:
                if begun and waiting and group.index is None and not group.pending:
                    index = waiting.popleft()
                    group.start(index, jobs[index], reporting=on_report is not None)
            yield from outcomes  # only now, so that no group waits for the caller
            left -= len(outcomes)
            outcomes = []
            if left and not groups:
                raise RunError(f"no worker is left: {why}")
            _wait(groups)
            for group in list(groups):
                error = group.collect()
                if error is None:
                    if on_report is not None:
                        group.pass_on(on_report)
                    if group.index is not None and not group.pending:
                        outcomes.append(Outcome(group.index, group.value))
                        group.index = None
                    continue
                groups.remove(group)
                group.kill()
                if group.index is None:  # it could not be made
                    if not begun and not isinstance(error, _WorkerLost):
                        raise error
                    why = str(error)
                    continue
                missing += 1
                failures[group.index] += 1
                if failures[group.index] < attempts:
                    waiting.appendleft(group.index)
                else:
                    outcomes.append(Outcome(group.index, error=str(error)))
    finally:
        if ray.is_initialized():
            for group in groups:
                group.kill()
            _wait_until_free(placements)


def _wait(groups: list[_Group]) -> None:
    """Until any group has something to collect or pass on."""
    awaited = [ref for group in groups for ref in group.pending]
    awaited += [group.reports for group in groups if group.reports is not None]
    if awaited:
        ray.wait(awaited, timeout=0.5 if any(group.place_by for group in groups) else None)


def _wait_until_free(placements: list[PlacementGroup]) -> None:
    """Until no node counts the placement groups' resources as theirs any more."""
    give_up = time.monotonic() + 30
    ids = [placement.id.hex() for placement in placements]
    while any(id_ in name for name in ray.available_resources() for id_ in ids) and time.monotonic() < give_up:
        time.sleep(0.05)


def _placement_seconds() -> float:
    return _MACHINE_TIMEOUT_S if may_grow() else _PLACEMENT_TIMEOUT_S


class PoolWorker:
    """An actor. Its methods run in one thread, for which torch's number of threads is set; ``reports`` in another."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def serve(self) -> Address:
        """The address of the store through which the group meets."""
        self._store, address = open_store(self._size)
        return address

    def prepare(
        self,
        address: Address | None,
        share: dict[str, float],
        given: tuple[Callable[[Place, Any], Work], Any, bool],
    ) -> None:
        torch.set_num_threads(max(1, int(share["CPU"])))
        device = torch.device("cuda", 0) if share["GPU"] else torch.device("cpu")
        if address is not None:
            store = address if self._rank else self._store
            # NCCL refuses several ranks on one GPU.
            join_group(self._rank, self._size, device, store, "nccl" if share["GPU"] >= 1 else "gloo")
        prepare, settings, reporting = given
        self._reports: SimpleQueue[bytes | None] | None = SimpleQueue() if reporting and self._rank == 0 else None
        self._work = prepare(Place(self._rank, self._size, device), settings)

    def run(self, job: Any) -> Any:
        value = self._work(job, self._report)
        if self._reports is not None:
            self._reports.put(None)
        return value if self._rank == 0 else None

    def _report(self, value: Any) -> None:
        if self._reports is not None:
            self._reports.put(pickle.dumps(value))  # here, since the job may change it afterwards

    @ray.method(concurrency_group="reports")
    def reports(self) -> Iterator[bytes]:
        """Those of one job."""
        assert self._reports is not None
        while (report := self._reports.get()) is not None:
            yield report


_PoolActor = ray.remote(concurrency_groups={"reports": 1})(PoolWorker)


class _Group:
    """Workers that are placed, live and die together."""

    def __init__(self, size: int, share: dict[str, float], given: ray.ObjectRef) -> None:
        self.placement = placement_group([share] * size)
        self.place_by: float | None = time.monotonic() + _placement_seconds()  # None once it is placed
        self.actors = [
            _PoolActor.options(
                num_cpus=share["CPU"],
                num_gpus=share["GPU"],
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.placement, rank),
            ).remote(rank, size)
            for rank in range(size)
        ]
        self.index: int | None = None  # of its job
        self.value: Any = None
        self.reports: Any = None
        address = self.actors[0].serve.remote() if size > 1 else None
        self.pending = {actor.prepare.remote(address, share, given): rank for rank, actor in enumerate(self.actors)}

    def start(self, index: int, job: Any, *, reporting: bool) -> None:
        self.index = index
        self.pending = {actor.run.remote(job): rank for rank, actor in enumerate(self.actors)}
        self.reports = self.actors[0].reports.remote() if reporting else None

    def collect(self) -> UserError | RunError | None:
        """Takes what the members have returned, or gives one's error: a death before what it makes others raise."""
        errors: list[UserError | RunError] = []
        for patience in (0, 2):
            if not self.pending:
                break
            ended, _ = ray.wait(list(self.pending), num_returns=len(self.pending), timeout=patience)
            for ref in ended:
                rank = self.pending.pop(ref)
                try:
                    value = ray.get(ref)
                except RayError as error:
                    errors.append(_in_one_line(error))
                else:
                    self.value = value if rank == 0 else self.value
            if not errors:
                break
        if not errors and self._unplaced():
            errors.append(_WorkerLost(f"no resources for it within {_placement_seconds():g} s"))
        return next((error for error in errors if isinstance(error, _WorkerLost)), errors[0] if errors else None)

    def _unplaced(self) -> bool:
        if self.place_by is not None and placement_group_table(self.placement)["state"] == "CREATED":
            self.place_by = None
        return self.place_by is not None and time.monotonic() > self.place_by

    def pass_on(self, on_report: Callable[[int, Any], None]) -> None:
        """The reports that have come; the rest too once the job is done."""
        while self.reports is not None and (not self.pending or ray.wait([self.reports], timeout=0)[0]):
            try:
                report = pickle.loads(ray.get(next(self.reports)))
            except (StopIteration, RayError):
                self.reports = None
            else:
                assert self.index is not None
                on_report(self.index, report)

    def kill(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.placement)


def _in_one_line(error: RayError) -> UserError | RunError:
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, (UserError, RunError)):
        return cause
    if isinstance(cause, RayActorError):
        return _WorkerLost("worker died")
    first_line = str(cause).strip().partition("\n")[0]
    line = f"{type(cause).__name__}: {first_line}" if first_line else type(cause).__name__
    return _WorkerLost(line) if isinstance(cause, RayError) else RunError(line)
