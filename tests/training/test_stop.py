"""Stopping on request: no step is lost, and what was begun goes on as if it had never been stopped."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from klray.errors import StoppedError
from klray.parallel.mesh import Mesh
from klray.runs.checkpoint import load_latest
from klray.runs.progress import kept
from klray.runs.records import history, read_records
from klray.training.recorded import train_and_record
from klray.training.stop import MovedError, Request, StopFile, agreed, on_sigterm
from tests.training.test_training import CPU, DATA, config_of, tensors


def trained(folder: Path, ask: Callable[[], Request] = lambda: Request.NONE, **changes: Any) -> None:
    config = config_of(**changes)
    train_and_record(config, DATA, mesh_shape=(1, 1), device=CPU, run_dir=folder, provenance={}, asked=ask)


def at_step(number: int, request: Request = Request.STOP) -> Callable[[], Request]:
    """Asks after so many steps of a process."""
    steps = iter([Request.NONE] * (number - 1))
    return lambda: next(steps, request)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What does not depend on the machine's pace."""
    paced = ("perf/", "seconds")
    return {key: values for key, values in history(folder).items() if not key.startswith(paced)}


def statuses(folder: Path) -> list[str]:
    return [record["status"] for record, _ in read_records(folder) if record["kind"] == "status"]


@pytest.mark.parametrize("stops", [[5], [4], [1, 1, 3], [11]])
def test_no_step_is_lost(stops: list[int], tmp_path: Path) -> None:
    """Also between two reports (every third step), at a checkpoint of its own (the fourth), and several times."""
    for number in range(len(stops)):
        with pytest.raises(StoppedError, match="stopped by SIGTERM"):
            trained(tmp_path / "parts", at_step(stops[number]))
        there = kept(tmp_path / "parts", pytest.fail)
        assert there is not None and there.step == sum(stops[: number + 1])
    trained(tmp_path / "parts")
    trained(tmp_path / "whole")
    assert statuses(tmp_path / "parts") == ["RUNNING", "KILLED"] * len(stops) + ["RUNNING", "FINISHED"]
    assert curves(tmp_path / "parts") == curves(tmp_path / "whole")
    found, wanted = tensors(tmp_path / "parts"), tensors(tmp_path / "whole")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_request_at_the_last_step_changes_nothing(tmp_path: Path) -> None:
    trained(tmp_path, at_step(12))
    assert statuses(tmp_path) == ["RUNNING", "FINISHED"]


def test_a_group_that_is_to_move_says_so(tmp_path: Path) -> None:
    with pytest.raises(MovedError):
        trained(tmp_path, at_step(2, Request.MOVE))
    assert load_latest(tmp_path, pytest.fail) is not None


def test_the_first_sigterm_is_a_request_and_the_second_is_none() -> None:
    """The one before gets that, and is back afterwards."""
    asked: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append("before"))
    try:
        with on_sigterm(lambda: asked.append("request")):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        with on_sigterm(lambda: asked.append("another")):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked == ["request", "before", "before"]


def test_a_driver_asks_its_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who look once a second; what an earlier driver asked for does not count."""
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    StopFile(tmp_path).ask()
    driver, worker = StopFile(tmp_path), StopFile(tmp_path)
    driver.clear()
    assert not worker.asked()
    driver.ask()
    assert not worker.asked()
    now += 1
    assert worker.asked()
    assert not StopFile(tmp_path / "elsewhere").asked()


CASES: list[tuple[dict[int, Request], Request]] = [  # what which rank is asked for, and what all do
    ({}, Request.NONE),
    ({2: Request.STOP}, Request.STOP),
    ({0: Request.MOVE}, Request.MOVE),
    ({0: Request.MOVE, 1: Request.MOVE, 2: Request.STOP}, Request.STOP),
]


def _rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    mesh = Mesh.create(3, 1, "cpu")
    for asking, all_do in CASES:
        mine = asking.get(rank, Request.NONE)
        assert agreed(mine, mesh, CPU, reporting=False) is Request.NONE
        assert agreed(mine, mesh, CPU, reporting=True) is all_do
    dist.destroy_process_group()


def test_ranks_agree_where_they_report(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, tmp_path)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0, 0]
