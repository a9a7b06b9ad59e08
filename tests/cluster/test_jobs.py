"""A kind of job in one file: what is missing is run and kept, whatever is killed; what fails is collected."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from klray.cluster import jobs as jobs_module
from klray.cluster.jobs import JobError, JobKind, JobProgress, check_shared, run_missing
from klray.cluster.pool import Outcome, Place, Report, Work
from klray.errors import UserError


@dataclass(frozen=True)
class Squares(JobKind):
    """Jobs are numbers; FOLDER/attempts has a file for each attempt, FOLDER/<number> holds the square."""

    folder: Path

    def name(self, job: int) -> str:
        return f"square_{job}"

    def cost(self, job: int) -> float:
        return job

    def done(self, job: int) -> bool:
        return (self.folder / str(job)).exists()

    def resources(self, missing: Sequence[int]) -> dict[str, Any]:
        return {"workers": 2}

    def settings(self) -> Path:
        return self.folder

    @staticmethod
    def prepare(place: Place, folder: Path) -> Work:
        def work(job: int, report: Report) -> int:
            attempts = len(list((folder / "attempts").glob(f"{job}.*")))
            (folder / "attempts" / f"{job}.{attempts}").touch()
            report(job)
            if job == 5 and not attempts:
                os.kill(os.getpid(), signal.SIGKILL)
            if job == 7 and attempts < 2:
                raise ArithmeticError("seven is too large")
            return job**2

        return work

    def running(self, job: int, report: int) -> tuple[float, str]:
        return 0.5, f"of {report}"

    def keep(self, job: int, value: int) -> str:
        if value < 0:
            raise JobError("a square is negative")
        (self.folder / str(job)).write_text(str(value))
        return f"is {value}"


@pytest.fixture
def kind(tmp_path: Path) -> Squares:
    (tmp_path / "attempts").mkdir()
    return Squares(tmp_path)


def progress(lines: list[str], jobs: Sequence[int], interval: float = 1e9) -> JobProgress:
    return JobProgress(lines.append, [float(job) for job in jobs], interval)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_new_kind_goes_on_with_what_is_missing(kind: Squares) -> None:
    """A worker is killed in one job, another job fails as often as is allowed; a second call does that one alone."""
    lines: list[str] = []
    jobs = [2, 5, 7, 3]
    assert run_missing(kind, jobs, progress(lines, jobs, interval=0)) == {
        "square_7": "ArithmeticError: seven is too large"
    }
    assert {job: (kind.folder / str(job)).read_text() for job in (2, 5, 3)} == {2: "4", 5: "25", 3: "9"}
    attempts = sorted(path.name for path in (kind.folder / "attempts").iterdir())
    assert attempts == [
        "2.0",
        "3.0",
        "5.0",
        "5.1",
        "7.0",
        "7.1",
    ]
    ended = [line for line in lines if not line.startswith("  ")]
    assert len(ended) == 4 and "  square_5  50 %  of 5" in lines
    assert any(line.startswith("square_7 failed: ArithmeticError: seven is too large") for line in ended)
    lines.clear()
    assert run_missing(kind, jobs, progress(lines, jobs)) == {}
    assert lines == ["square_7 is 49"]
    assert len(list((kind.folder / "attempts").iterdir())) == 7
    assert run_missing(kind, jobs, progress(lines, jobs)) == {}
    assert len(list((kind.folder / "attempts").iterdir())) == 7


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``run_jobs`` was asked, in place of a pool; ``value``: of every job, ``ended``: whether it was closed."""
    asked: dict[str, Any] = {"value": 1, "ended": False}

    def run_jobs(
        prepare: Any, settings: Any, jobs: Sequence[Any], *, on_report: Any, **resources: Any
    ) -> Iterator[Outcome]:
        asked.update(settings=settings, jobs=list(jobs), **resources)
        try:
            for index, job in enumerate(jobs):
                on_report(index, job)
                yield Outcome(index, error="worker died") if job == 7 else Outcome(index, asked["value"])
        finally:
            asked["ended"] = True

    monkeypatch.setattr(jobs_module, "run_jobs", run_jobs)
    return asked


def test_the_most_costly_begin_and_failures_are_collected(kind: Squares, pool: dict[str, Any]) -> None:
    kind.keep(5, 25)
    lines: list[str] = []
    assert run_missing(kind, [2, 5, 7, 3], progress(lines, [2, 5, 7, 3])) == {"square_7": "worker died"}
    assert (pool["settings"], pool["jobs"], pool["workers"]) == (kind.folder, [7, 3, 2], 2)
    assert lines[0].startswith("square_7 failed: worker died  (2 to go, about ")
    assert lines[2] == "square_2 is 1"
    pool["value"] = -1
    assert run_missing(kind, [4], progress(lines, [4])) == {"square_4": "a square is negative"}
    assert lines[3] == "square_4 failed: a square is negative"


def test_nothing_missing_asks_for_nothing(kind: Squares, pool: dict[str, Any]) -> None:
    kind.keep(5, 25)
    lines: list[str] = []
    assert run_missing(kind, [5], progress(lines, [5])) == {}
    assert not lines and "jobs" not in pool


def test_an_interrupt_ends_the_pool(kind: Squares, pool: dict[str, Any]) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_missing(kind, [3, 2], JobProgress(interrupt, [3.0, 2.0]))
    assert pool["ended"] and kind.done(3) and not kind.done(2)


def test_time_left_is_judged_from_the_first_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the costs, parts of running jobs included; jobs that were done before neither take time nor are to go."""
    clock = [0.0]
    monkeypatch.setattr(jobs_module.time, "monotonic", lambda: clock[0])
    lines: list[str] = []
    told = JobProgress(lines.append, [4.0, 2.0, 2.0, 8.0], interval=5.0)
    told.skip(8.0)
    clock[0] = 3.0  # starting workers
    told.running("a", 4.0, 0.25, "x 1")
    clock[0] = 9.0
    told.running("a", 4.0, 0.75, "x 2")
    assert lines == ["  a  75 %  x 2", "  about 15 s left"]  # 2 units in 6 s, 5 are left
    clock[0] = 12.0
    told.ended("a", 4.0, "finished")
    assert lines[2] == "a finished  (2 to go, about 12 s)"
    told.ended("b", 2.0, "failed: x")
    told.ended("c", 2.0, "finished")
    assert lines[4] == "c finished"


def test_a_folder_that_the_machine_does_not_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module.ray.util, "get_node_ip_address", lambda: "10.0.0.2")
    check_shared(tmp_path, "--runs")
    rule = "must be in a folder that all machines share, 10.0.0.2 does not see it; name one by --runs"
    with pytest.raises(UserError, match=rule):
        check_shared(tmp_path / "absent", "--runs")
