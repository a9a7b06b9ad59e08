"""Parts of GPUs for small trials."""

from __future__ import annotations

from pathlib import Path

import pytest

from klray import compare, tune
from klray.training import job as job_module
from klray.training.job import WorkersError, runs_at_once
from tests.study.spaces import TINY, space_file


@pytest.mark.parametrize(
    ("gpus", "workers", "part", "runs"), [(2, 1, 1, 2), (2, 1, 0.25, 8), (2, 2, 0.5, 2), (1, 1, 0.3, 3), (3, 2, 0.4, 3)]
)
def test_runs_share_gpus(gpus: int, workers: int, part: float, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's part is of one GPU."""
    monkeypatch.setattr(job_module, "cluster_size", lambda: (16, gpus))
    assert runs_at_once(workers, "images", part) == runs


def test_what_does_not_fit_the_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "cluster_size", lambda: (16, 2))
    with pytest.raises(WorkersError, match="at most the cluster's GPUs, 2, got 3"):
        runs_at_once(3, "images")
    with pytest.raises(WorkersError, match="GPUs, 2 at --gpus-per-worker 0.5, 4 places, got 5"):
        runs_at_once(5, "images", 0.5)
    with pytest.raises(WorkersError, match="must be 1 for a budget in seconds, got 0.5"):
        runs_at_once(1, "seconds", 0.5)


@pytest.mark.parametrize("part", ["0", "1.5", "-1"])
def test_parts_are_checked(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flag = ["--gpus-per-worker", part]
    assert tune.main(["--space", str(space_file(tmp_path)), *flag, "--dry-run"]) == 2
    assert compare.main(["--config", "digits", "--arms", "vp", "kl2", *flag, "--dry-run"]) == 2
    assert capsys.readouterr().err.count("must be above 0 and at most 1") == 2


def test_scores_need_the_trial_s_own_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images would be drawn by a process that asks for a whole GPU while other trials hold parts of all."""
    settings = {**TINY, "evaluation.num_samples": 64, "evaluation.features": "efficientnet_lite0"}
    file = space_file(tmp_path, set=settings, objectives=[{"metric": "kid"}])
    command = ["--space", str(file), "--gpus-per-worker", "0.5", "--dry-run"]
    assert tune.main(command) == 2
    assert "take --trial-runner inline" in capsys.readouterr().err
    assert tune.main([*command, "--trial-runner", "inline"]) == 0
