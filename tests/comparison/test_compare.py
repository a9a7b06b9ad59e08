"""A comparison from end to end: equal budgets, tuned rates, verdicts, MLflow, and what a second command adds."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import ray

from klray import compare
from klray.comparison.results import METRIC
from klray.runs.records import history

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

TINY = [
    "network.kind=mlp",
    "network.width=16",
    "optimizer.batch_size=16",
    "optimizer.warmup_images=0",
    "validation.images=16",
    "validation.time_bins=1",
    "sampling.images=4",
    "sampling.num_steps=2",
    "data.limit=200",
    "budget.amount=768",
]
SETTINGS = [part for change in TINY for part in ("--set", change)]


def arguments(*arms: str, uri: str = "off") -> list[str]:
    return ["--config", "digits", "--arms", *arms, *SETTINGS, "--name", "c", "--tracking-uri", uri]


def records_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.glob("trials/*/records.jsonl")}


def test_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert compare.main(arguments("vp", "kl2", "kl2_wide", uri="sqlite:///mlflow.db")) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "comparisons" / "c"
    assert {path.name for path in folder.iterdir()} >= {"report.md", "verdicts.csv", "curves.png", "rates.png"}
    assert (folder / "report.md").read_text().strip() in printed
    assert "vp_ensemble2 is its control" in printed
    runs: dict[str, list[tuple[float, int]]] = {}
    for path in (folder / "trials").iterdir():
        found = re.fullmatch(r"(.+)-lr([0-9.e-]+)-seed([0-9]+)", path.name)
        assert found is not None
        runs.setdefault(found[1], []).append((float(found[2]), int(found[3])))
        step = 16 * (2 if found[1] == "kl2" else 1)  # of the optimiser, in network evaluations
        assert 768 - step < history(path)["network_evals"][-1][1] <= 768
    assert set(runs) == {"vp", "kl2", "kl2_wide"}
    for arm, trained in runs.items():
        tuned = {
            lr: history(folder / "trials" / f"{arm}-lr{lr:g}-seed1000")[METRIC][-1][1] for lr, s in trained if s > 2
        }
        assert len(tuned) >= 5
        best = min(tuned, key=lambda lr: tuned[lr])
        assert best not in (min(tuned), max(tuned)) or len(tuned) == 11  # the ladder went on until the best was inside
        assert sorted((lr, seed) for lr, seed in trained if seed < 3) == [(best, 0), (best, 1), (best, 2)]
    with (folder / "verdicts.csv").open() as file:
        verdicts = list(csv.DictReader(file))
    assert {(v["arm"], v["axis"]) for v in verdicts} == {
        (arm, axis) for arm in ("kl2", "kl2_wide") for axis in ("images", "network_evals", "flops", "seconds")
    }

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "c"]
    in_mlflow = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in in_mlflow if run.data.tags.get("klray.kind") == "comparison"]
    nested = [run for run in in_mlflow if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.info.run_name for run in nested) == sorted(path.name for path in (folder / "trials").iterdir())
    assert {run.data.tags["klray.arm"] for run in nested} == set(runs)
    assert {artifact.path for artifact in client.list_artifacts(parent.info.run_id)} >= {"curves.png", "report.md"}

    # An arm more, and a seed: only they are trained. Another budget under the name is refused.
    before = records_of(folder)
    assert compare.main([*arguments("vp", "kl2", "kl2_wide", "vp_batch2"), "--seeds", "4"]) == 0
    after = records_of(folder)
    assert {path: after[path] for path in before} == before
    added = sorted(path.parent.name for path in after.keys() - before.keys())
    assert [name for name in added if not name.startswith("vp_batch2")] == sorted(
        f"{arm}-lr{best_of(trained):g}-seed3" for arm, trained in runs.items()
    )
    capsys.readouterr()
    assert compare.main([*arguments("vp", "kl2"), "--set", "budget.amount=999"]) == 2
    assert "base.budget.amount: 768.0 -> 999.0" in capsys.readouterr().err
    for _ in range(60):
        if ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return
    pytest.fail(f"workers are still held: {ray.available_resources()}")


def best_of(trained: list[tuple[float, int]]) -> float:
    (best,) = {lr for lr, seed in trained if seed < 3}
    return best
