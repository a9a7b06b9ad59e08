"""What a comparison asks of the cluster for its runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from klray.cluster import jobs as jobs_module
from klray.cluster.jobs import JobProgress
from klray.cluster.pool import Outcome
from klray.comparison import job as job_module
from klray.comparison.arms import Arm, read_arms
from klray.comparison.job import FINISHED, ComparisonJob
from klray.comparison.plan import matched
from klray.config import Config, load_config
from klray.training.job import SharedImages


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Of a cluster of 16 CPUs, for every call: the runs, their threads and CPUs. Each run's error is its rate's."""
    calls: list[dict[str, Any]] = []
    rates: dict[str, float] = {}

    def run_jobs(prepare: Any, settings: Any, jobs: Sequence[Any], **options: Any) -> Iterator[Outcome]:
        calls.append({"runs": len(jobs), "threads": settings[2], "cpus": options["cpus_per_worker"], **options})
        for index, run in enumerate(jobs):
            rates[run.name] = run.config.optimizer.lr
            yield Outcome(index, FINISHED)

    monkeypatch.setattr(jobs_module, "run_jobs", run_jobs)
    monkeypatch.setattr(job_module, "cluster_size", lambda: (16, 0))
    monkeypatch.setattr(job_module, "runs_at_once", lambda workers, unit, part: 16 // workers)
    monkeypatch.setattr(job_module, "cpu_share", lambda workers: 16 // workers)
    monkeypatch.setattr(job_module, "finished", lambda config, run_dir, warn: run_dir.name in rates)
    monkeypatch.setattr(job_module, "history", lambda run_dir: rates[run_dir.name])
    monkeypatch.setattr(job_module, "final_error", lambda rate: abs(rate - 0.002) if rate else float("inf"))
    monkeypatch.setattr(job_module, "arm_result", lambda arm, config, tried, runs, lost: config.optimizer.lr)
    return calls


def arms(*names: str) -> dict[Arm, Config]:
    base = load_config("digits", ["budget.unit=network_evals", "budget.amount=768"])
    return {arm: matched(arm, base) for arm in read_arms(names, base)}


def job(folder: Path) -> ComparisonJob:
    return ComparisonJob(folder, cast(SharedImages, None), 1, {}, JobProgress(lambda line: None, []))


def test_every_run_has_the_same_share_of_the_cpus(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    """However few are left to train, in this command or in a later one."""
    job(tmp_path).run(arms("vp", "kl2"), seeds=3, rates=4, factor=2)
    job(tmp_path).run(arms("vp", "kl2"), seeds=4, rates=4, factor=2)
    assert [call["runs"] for call in asked] == [8, 6, 2]
    assert {(call["threads"], call["cpus"]) for call in asked} == {(2, 2)}
    job(tmp_path).run(arms("vp", "kl2", "kl4", "kl8"), seeds=4, rates=5, factor=2)
    assert {(call["threads"], call["cpus"]) for call in asked} == {(2, 2)}
    assert all(call["workers"] <= 8 for call in asked)


def test_a_smaller_cluster_runs_fewer_at_once(
    tmp_path: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    job(tmp_path).run(arms("vp", "kl2"), seeds=3, rates=4, factor=2)
    monkeypatch.setattr(job_module, "runs_at_once", lambda workers, unit, part: 4 // workers)
    monkeypatch.setattr(job_module, "cpu_share", lambda workers: 4 // workers)
    job(tmp_path).run(arms("vp", "kl2"), seeds=6, rates=4, factor=2)
    assert (asked[-1]["threads"], asked[-1]["cpus"], asked[-1]["workers"]) == (2, 2, 2)
