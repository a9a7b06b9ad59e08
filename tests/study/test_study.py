"""Studies on a real cluster: what fails, what is pruned, what a killed driver leaves, and that budgets are equal."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import ray
from optuna.trial import TrialState

from klray import tune
from klray.cluster.connect import free_in_words
from klray.cluster.places import free_orphans
from klray.config import Config
from klray.runs.records import history, read_records
from klray.study.progress import StudyProgress
from klray.study.search import FINISHED, PERCENT, StudySearch
from klray.study.space import load_space
from tests.study.spaces import TINY, space_file

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

KID = "eval/kid_64.efficientnet_lite0.train"


def trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'optuna.db'}")
    return optuna.load_study(study_name=folder.name, storage=storage).get_trials()


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_study_with_a_failing_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trial whose folder holds another run fails with its reason; the others are compared at equal cost."""
    parameters = {"process.num_terms": {"type": "categorical", "choices": [2, 3, 4]}}
    file = space_file(tmp_path, parameters=parameters, trials=3, seeds=2)
    folder = tmp_path / "studies" / "study"
    taken = folder / "trials" / "0001-seed0"
    taken.mkdir(parents=True)
    (taken / "run.json").write_text(json.dumps({"config": Config().model_dump(mode="json")}))
    command = ["--space", str(file), "--name", "study", "--trial-runner", "inline"]
    assert tune.main([*command, "--tracking-uri", "sqlite:///mlflow.db"]) == 1
    printed = capsys.readouterr().out
    states = {t.user_attrs["chosen"]["process.num_terms"]: t.state for t in trials_of(folder)}
    assert states == {2: TrialState.COMPLETE, 3: TrialState.FAIL, 4: TrialState.COMPLETE}
    assert "1 trials failed" in printed
    assert "run 0001-seed0 exists with another configuration" in printed
    assert "python -m klray.train" in printed
    with (folder / "results.csv").open() as table:
        rows = list(csv.DictReader(table))
    complete = [row for row in rows if row["state"] == "complete"]
    assert [float(row["val/eps_mse"]) for row in complete] == sorted(float(row["val/eps_mse"]) for row in complete)
    for row in complete:  # within one step of the budget, for every M
        step = 16 * int(row["process.num_terms"])
        assert 640 - step < float(row["network_evals"]) <= 640
        assert float(row["val/eps_mse +-"]) > 0
    for number in (int(row["trial"]) for row in complete):
        runs = sorted(path.name for path in (folder / "trials").glob(f"{number:04d}*"))
        assert runs == [f"{number:04d}-seed0", f"{number:04d}-seed1"]
    assert {path.name for path in (folder / "figures").iterdir()} >= {"history.png", "convergence.png"}

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "study"]
    runs = client.search_runs([experiment.experiment_id])
    (study,) = [run for run in runs if run.data.tags.get("klray.kind") == "study"]
    nested = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == study.info.run_id]
    titles = {f"M={row['process.num_terms']} seed=0" for row in complete}
    assert {run.info.run_name for run in nested} >= titles
    assert {run.data.params["process.num_terms"] for run in nested} == {"2", "4"}
    assert "results.csv" in [artifact.path for artifact in client.list_artifacts(study.info.run_id)]

    # What failed goes on when its cause is gone, if that is asked for.
    shutil.rmtree(taken)
    assert tune.main([*command, "--tracking-uri", "off"]) == 1
    assert not taken.exists()
    assert tune.main([*command, "--tracking-uri", "off", "--retry-failed"]) == 0
    assert history(taken)["budget_used"][-1][1] > 0.8

    # The same command runs nothing again; another space under the name is refused, and so are fewer trials.
    before = {path: path.read_bytes() for path in folder.glob("trials/*/records.jsonl")}
    assert tune.main([*command, "--tracking-uri", "off"]) == 0
    assert {path: path.read_bytes() for path in folder.glob("trials/*/records.jsonl")} == before
    capsys.readouterr()
    assert tune.main(["--space", str(file), "--name", "study", "--set", "budget.amount=700"]) == 2
    assert "budget.amount: 640.0 -> 700.0" in capsys.readouterr().err
    assert tune.main(["--space", str(file), "--name", "study", "--set", "seeds=1"]) == 2


@pytest.fixture
def other_cluster() -> Iterator[None]:
    """Somebody else's, on the same machine."""
    program = "import ray; ray.init(address='local', num_cpus=1); print('up', flush=True); input()"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, text=True, **pipes) as other:
        assert other.stdin is not None and other.stdout is not None
        assert "up" in other.stdout.readline()
        yield
        other.stdin.write("\n")


@pytest.mark.essential
@pytest.mark.usefixtures("other_cluster")
def test_bad_settings_are_pruned_and_free_their_workers(tmp_path: Path) -> None:
    """Beside another cluster, where Ray's own helper that frees them finds two; a trial waits for each one's places."""
    parameters = {"optimizer.lr": {"type": "categorical", "choices": [1e-2, 5e-3, 1e-8, 1e-9]}}
    budget, scheduler = (
        {"unit": "images", "amount": 25600},
        {"kind": "asha", "reduction_factor": 2, "min_fraction": 0.1},
    )
    settings = {**TINY, "validation.every_images": 640}  # rare looks: Tune has time to stop a trial between two
    workers = int(ray.cluster_resources()["CPU"])  # of a trial: two have no place beside each other
    settings["optimizer.batch_size"] = 8 * workers
    changes = {"parameters": parameters, "budget": budget, "scheduler": scheduler, "trials": 4}
    file = space_file(tmp_path, set=settings, **changes)
    folder = tmp_path / "studies" / "study"
    folder.mkdir(parents=True)
    search = StudySearch(load_space(file), folder)
    for name in ("good", "better"):  # as if they had been trained
        assert search.suggest(name) != "FINISHED"
        search.keep(name, {"val/eps_mse": 0.1, PERCENT: 10})
        search.on_trial_complete(name, {FINISHED: [0.1], "values": [[0.1]]})
    command = ["--space", str(file), "--name", "study", "--workers", str(workers), "--tracking-uri", "off"]
    assert tune.main(command) == 0
    _, _, bad, worse = trials_of(folder)
    assert (bad.state, worse.state) == (TrialState.PRUNED, TrialState.PRUNED)
    assert bad.intermediate_values  # what it was judged by
    with (folder / "results.csv").open() as table:
        row = next(row for row in csv.DictReader(table) if row["trial"] == str(bad.number))
    assert float(row["val/eps_mse"]) == bad.intermediate_values[max(bad.intermediate_values)]
    run_dir = folder / "trials" / f"{bad.number:04d}"
    used = history(run_dir)["budget_used"][-1][1]
    assert [r["status"] for r, _ in read_records(run_dir) if r["kind"] == "status"] == ["RUNNING", "KILLED"]
    assert used < 0.9
    assert not free_orphans()


def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = space_file(
        tmp_path,
        set={**TINY, "validation.every_images": 4000, "checkpoint.every_images": 500},
        parameters={"optimizer.lr": {"type": "categorical", "choices": [1e-3]}},
        budget={"unit": "images", "amount": 8000},
        trials=1,
    )
    run_dir = tmp_path / "studies" / "study" / "trials" / "0000"

    def kill() -> None:
        deadline = time.monotonic() + 300
        while not any(run_dir.glob("checkpoints/checkpoint_*/manifest.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            if process.name().startswith("ray::ImplicitFu"):  # Tune's name of a trial
                process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    command = ["--space", str(file), "--name", "study", "--tracking-uri", "off", "--trial-runner", "inline"]
    assert tune.main(command) == 0
    killer.join()
    assert "trial 0 goes on from its checkpoint" in capsys.readouterr().out
    (trial,) = trials_of(tmp_path / "studies" / "study")
    assert trial.state == TrialState.COMPLETE
    statuses = [record["status"] for record, _ in read_records(run_dir) if record["kind"] == "status"]
    assert statuses == ["RUNNING", "RUNNING", "FINISHED"]
    assert history(run_dir)["images_seen"][-1][1] == 8000


def test_a_killed_driver_loses_no_trial_and_repeats_none(tmp_path: Path) -> None:
    lr = {"optimizer.lr": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True}}
    file = space_file(
        tmp_path,
        set={**TINY, "validation.every_images": 4000, "checkpoint.every_images": 1000},
        parameters=lr,
        budget={"unit": "images", "amount": 12000},
        sampler="random",
        trials=3,
        concurrency=1,
    )
    command = [sys.executable, "-m", "klray.tune", "--space", str(file), "--name", "study", "--tracking-uri", "off"]
    command += ["--trial-runner", "inline"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    folder = tmp_path / "studies" / "study"
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not (folder / "study.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert second.returncode == 2 and "study is being run by another process" in second.stderr
        while not any(folder.glob("trials/0001/checkpoints/checkpoint_*/manifest.json")):
            assert first.poll() is None, "the study ended before its second trial was under way"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        first.kill()
        first.wait()
    before = trials_of(folder)
    assert [t.state for t in before] == [TrialState.COMPLETE, TrialState.RUNNING]
    kept = (folder / "trials" / "0000" / "records.jsonl").read_bytes()
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "goes on: 1 of 3 trials is finished, 1 goes on from a checkpoint, 1 is to come" in again.stdout
    after = trials_of(folder)
    assert [t.state for t in after] == [TrialState.COMPLETE] * 3
    assert [t.user_attrs["chosen"] for t in after[:2]] == [t.user_attrs["chosen"] for t in before]
    assert (folder / "trials" / "0000" / "records.jsonl").read_bytes() == kept  # not run again
    for number in range(3):
        records = [record for record, _ in read_records(folder / "trials" / f"{number:04d}")]
        assert [r["status"] for r in records if r["kind"] == "status"].count("FINISHED") == 1
        assert history(folder / "trials" / f"{number:04d}")["images_seen"][-1][1] == 12000
    assert len(list((folder / "trials").iterdir())) == 3


def test_scores_and_costs_as_two_objectives(tmp_path: Path) -> None:
    """N * M = 8 in every trial; the front is drawn; a trial's evaluation is a run below it."""
    parameters = {
        "process.num_terms": {"type": "categorical", "choices": [1, 2]},
        "process.time_grid": {"derive": "8 / process.num_terms"},
        "sampling.num_steps": {"type": "categorical", "choices": [2, 3]},
    }
    objectives = [
        {"metric": "kid", "direction": "minimize"},
        {"metric": "network_evals_per_image", "direction": "minimize"},
    ]
    settings = {key: value for key, value in TINY.items() if key != "sampling.num_steps"}
    settings |= {"evaluation.num_samples": 64, "evaluation.features": "efficientnet_lite0"}
    file = space_file(tmp_path, set=settings, parameters=parameters, objectives=objectives, trials=4)
    arguments = ["--space", str(file), "--name", "study", "--trial-runner", "inline"]
    assert tune.main([*arguments, "--tracking-uri", "sqlite:///mlflow.db"]) == 0
    folder = tmp_path / "studies" / "study"
    for trial in trials_of(folder):
        chosen = trial.user_attrs["chosen"]
        assert chosen["process.num_terms"] * chosen["process.time_grid"] == 8
        assert trial.values[1] == chosen["process.num_terms"] * chosen["sampling.num_steps"]
        assert trial.values[0] == history(folder / "trials" / f"{trial.number:04d}")[KID][-1][1]
    assert (folder / "figures" / "pareto_front.png").is_file()

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "study"]
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    evaluations = [run for run in runs.values() if run.data.tags.get("klray.kind") == "evaluation"]
    assert len(evaluations) == 4
    for run in evaluations:
        trial_run = runs[run.data.tags["mlflow.parentRunId"]]
        assert trial_run.data.tags["klray.kind"] == "trial"
        assert run.data.metrics[KID] == trial_run.data.metrics[KID]
        study = runs[trial_run.data.tags["mlflow.parentRunId"]]
        assert study.data.tags["klray.kind"] == "study"
    artifacts = {artifact.path for artifact in client.list_artifacts(study.info.run_id)}
    assert {"pareto_front.png", "results.csv"} <= artifacts


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"mesh.basis": 2}, [], "mesh.basis must divide the number of workers, 1, got 2"),
        ({"network.init_from": "nowhere"}, [], "nowhere"),
        ({"sampling.solver": "ddmi"}, [], "sampling.solver must be one of"),
        ({}, ["--workers", "2", "--trial-runner", "inline"], "--trial-runner inline trains in the trial's own process"),
    ],
    ids=["mesh", "init_from", "solver", "inline"],
)
def test_what_every_trial_would_fail_by_is_refused_before_the_first(
    changes: dict[str, Any], arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = space_file(tmp_path, set={**TINY, **changes})
    assert tune.main(["--space", str(file), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "studies").exists()


def test_a_study_that_hears_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    progress = StudyProgress(load_space(space_file(tmp_path)), shown.append)
    monkeypatch.setattr("klray.study.progress.PATIENCE_S", 0.0)
    progress("started", 3, {"chosen": {}})
    progress.silent(free_in_words)
    assert "no look at trials 3 for" in shown[-1]
    assert "CPUs are free" in shown[-1]
    progress("finished", 3, {})
    ended = len(shown)
    progress.silent(free_in_words)
    assert len(shown) == ended


def test_the_space_is_kept_with_the_study(tmp_path: Path) -> None:
    file = space_file(tmp_path)
    assert tune.main(["--space", str(file), "--dry-run"]) == 0
    assert not (tmp_path / "studies").exists()
    assert json.dumps(load_space(file).describe())
