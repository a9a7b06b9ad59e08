"""The actor pool: every job has its outcome, whatever is killed; nothing is left running."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import torch.distributed as dist

from klray.cluster import connect, pool
from klray.cluster.pool import Outcome, Place, Report, Work, run_jobs
from klray.errors import RunError, UserError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def by_index(outcomes: Iterator[Outcome]) -> list[Outcome]:
    return sorted(outcomes, key=lambda outcome: outcome.index)


def pool_workers() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any("PoolWorker" in part for part in process.info["cmdline"] or []):
            found.append(process)
    return found


def free_cpus() -> float:
    import ray

    return float(ray.available_resources().get("CPU", 0))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After each test its workers are gone and all CPUs free."""
    before = free_cpus()
    yield
    assert free_cpus() == before
    assert not psutil.wait_procs(pool_workers(), timeout=5)[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def drawing(place: Place, shape: tuple[int, ...]) -> Work:
    def work(seed: int, report: Report) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    return work


def test_any_number_of_workers_gives_the_same() -> None:
    seeds = list(range(7))
    one, two = ([outcome.value for outcome in by_index(run_jobs(drawing, (2, 3), seeds, workers=n))] for n in (1, 2))
    expected = [torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    assert len(one) == len(two) == len(seeds)
    assert all(map(torch.equal, one, expected)) and all(map(torch.equal, two, expected))


def faulty(place: Place, folder: Path) -> Work:
    """Jobs are names of what goes wrong; each attempt leaves a file."""

    def work(job: str, report: Report) -> str:
        attempt = len(list(folder.glob(f"{job}.*")))
        (folder / f"{job}.{attempt}").touch()
        if job == "kill" or (job == "kill once" and not attempt):
            die()
        if job == "raise" or (job == "raise once" and not attempt):
            raise ArithmeticError("too large\nby far")
        if job == "klray's":
            raise RunError("the step was not finite")
        return job

    return work


@pytest.mark.essential
def test_what_fails_is_done_again_and_then_reported(tmp_path: Path) -> None:
    jobs = ["kill once", "fine", "raise", "raise once", "kill", "klray's", "fine too"]
    outcomes = by_index(run_jobs(faulty, tmp_path, jobs, workers=2))
    errors = {"raise": "ArithmeticError: too large", "kill": "worker died", "klray's": "the step was not finite"}
    expected = [
        Outcome(index, error=errors[job]) if job in errors else Outcome(index, job) for index, job in enumerate(jobs)
    ]
    assert outcomes == expected
    attempts = {job: len(list(tmp_path.glob(f"{job}.*"))) for job in jobs}
    assert attempts == {job: 1 if job.startswith("fine") else 2 for job in jobs}


def summing(place: Place, folder: Path) -> Work:
    def work(job: str, report: Report) -> float:
        report((place.rank, job))
        if place.rank == 1 and (job == "kill" or (job == "kill once" and not (folder / job).exists())):
            (folder / job).touch()
            die()
        value = torch.tensor(float(10 + place.rank), device=place.device)
        dist.all_reduce(value)
        return float(value) + 100 * place.rank

    return work


def test_a_group_computes_together_and_is_made_anew_as_a_whole(tmp_path: Path) -> None:
    reports: list[tuple[int, Any]] = []
    outcomes = run_jobs(
        summing,
        tmp_path,
        ["kill once", "fine", "kill"],
        workers=2,
        group_size=2,
        on_report=lambda index, value: reports.append((index, value)),
    )
    assert by_index(outcomes) == [Outcome(0, 21.0), Outcome(1, 21.0), Outcome(2, error="worker died")]
    assert {report for report in reports if report[0] < 2} == {(0, (0, "kill once")), (1, (0, "fine"))}


class NoCheckpointError(UserError):
    pass


def unprepared(place: Place, error: Exception) -> Work:
    raise error


@pytest.mark.parametrize(
    "error, raised",
    [
        (NoCheckpointError("no checkpoint in x"), NoCheckpointError("no checkpoint in x")),
        (KeyError("a"), RunError("KeyError: 'a'")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_in_preparing_is_raised_before_any_job(error: Exception, raised: Exception) -> None:
    with pytest.raises(type(raised)) as caught:
        next(run_jobs(unprepared, error, ["a", "b"], workers=2))
    assert type(caught.value) is type(raised)
    assert str(caught.value) == str(raised)


def prepared_once(place: Place, folder: Path) -> Work:
    if list(folder.glob("*")):
        raise RunError("the disk is gone")
    (folder / str(os.getpid())).touch()
    return lambda job, report: die()


def test_without_any_group_left_the_run_fails(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no worker is left: the disk is gone"):
        list(run_jobs(prepared_once, tmp_path, ["a", "b"], workers=1))


def test_without_resources_the_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_PLACEMENT_TIMEOUT_S", 1)
    monkeypatch.setattr(pool, "cpu_share", lambda workers: 1000)
    with pytest.raises(RunError, match="no worker is left: no resources for it within 1 s"):
        list(run_jobs(drawing, (1,), [0], workers=1))


def counting(place: Place, pause: float) -> Work:
    def work(job: int, report: Report) -> int:
        state = {"count": 0}
        while state["count"] < job:
            report(state)
            state["count"] += 1
            time.sleep(pause)
        return job

    return work


def test_reports_arrive_in_order_before_their_outcome() -> None:
    jobs = [5, 200, 0, 3]
    got: dict[int, list[int]] = {index: [] for index in range(len(jobs))}
    for outcome in run_jobs(
        counting, 1e-4, jobs, workers=2, on_report=lambda index, value: got[index].append(value["count"])
    ):
        assert got[outcome.index] == list(range(jobs[outcome.index]))
    assert {index: len(counts) for index, counts in got.items()} == dict(enumerate(jobs))


def test_an_early_end_leaves_nothing() -> None:
    before = free_cpus()
    outcomes = run_jobs(counting, 1, [0, 1000, 1000], workers=2)
    assert next(outcomes) == Outcome(0, 0)
    assert free_cpus() < before
    workers = pool_workers()
    assert len(workers) == 2
    outcomes.close()
    assert free_cpus() == before
    assert not psutil.wait_procs(workers, timeout=5)[1]


def test_ctrl_c_leaves_nothing() -> None:
    def interrupt(index: int, value: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray Train leaves a handler of its own
    try:
        with pytest.raises(KeyboardInterrupt):
            list(run_jobs(counting, 1, [1000, 1000], workers=2, on_report=interrupt))
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("workers, group_size", [(3, 2), (0, 1), (2, 0)])
def test_groups_that_do_not_fit_are_refused(workers: int, group_size: int) -> None:
    with pytest.raises(UserError, match=f"group_size must divide the number of workers, {workers}, got {group_size}"):
        run_jobs(drawing, (1,), [0], workers=workers, group_size=group_size)


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "cluster_size", lambda: (4, 2))
    with pytest.raises(UserError, match="workers x gpus_per_worker must be at most 2, got 3 x 1"):
        run_jobs(drawing, (1,), [0, 1, 2], workers=3, gpus_per_worker=1)


def test_workers_share_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(*nodes: int) -> list[float]:
        alive = [{"Alive": True, "Resources": {"CPU": float(cpus)}} for cpus in nodes]
        monkeypatch.setattr(ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"CPU": 64.0}}])
        return [connect.cpu_share(workers) for workers in (1, 3, 4, 6)]

    assert shares(4) == [4, 1, 1, 0.666]
    assert shares(8, 8) == [8, 4, 4, 2]  # no worker lies on two nodes


def test_no_jobs_have_no_outcomes() -> None:
    assert list(run_jobs(drawing, (1,), [], workers=2)) == []
