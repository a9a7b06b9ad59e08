"""No run stays RUNNING in MLflow: after Ctrl-C, and after kill -9 as soon as somebody comes by its folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from klray.runs.records import RecordWriter
from klray.runs.run_dir import locked
from klray.tracking.mlflow_upload import upload
from klray.tracking.stale import upload_all
from klray.tracking.state import UploadState, load_state

pytestmark = pytest.mark.slow
SETTINGS = ["network.kind=mlp", "network.width=32", "budget.unit=steps", "budget.amount=60"]
FIT = ["validation_pairs=10", "batch_size=5", "rounds_theta=1", "validate_every=2", "rounds_both=60"]
LD3 = ["--checkpoint", "runs/tiny", "--pairs", "30", "--teacher-nfe", "8", "--workers", "1", "--num-samples", "0"]
LD3 += ["--solvers", "ddim", "--name", "pool", *(part for change in FIT for part in ("--set", change))]
EVALUATE = ["--checkpoint", "runs/tiny", "--num-samples", "300", "--repeats", "1", "--metrics", "kid"]
EVALUATE += ["--features", "efficientnet_lite0", "--reference-images", "300", "--nfe", "4"]
COMMANDS = {"ld3": [*LD3, "--nfe", "3", "4"], "evaluate": EVALUATE}


def start(folder: Path, module: str, *argv: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", f"klray.{module}", *argv]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment | {"KLRAY_CACHE": str(folder / "cache")}, **pipes)


def run(folder: Path, module: str, *argv: str) -> None:
    process = start(folder, module, *argv)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def stop(process: subprocess.Popen[str], how: signal.Signals, when: Callable[[], bool]) -> None:
    """Sends the signal as soon as ``when`` holds."""
    try:
        deadline = time.monotonic() + 200
        while not when():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(how)
        process.communicate(timeout=120)
    finally:
        process.kill()


def statuses(folder: Path) -> dict[str, str]:
    """Of all runs that MLflow holds, by their names."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiments = [each.experiment_id for each in client.search_experiments()]
    return {each.info.run_name: each.info.status for each in client.search_runs(experiments)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tiny")
    changes = [part for change in SETTINGS for part in ("--set", change)]
    run(folder, "train", "--config", "digits", "--runner", "local", "--name", "tiny", *changes)
    assert statuses(folder) == {"tiny": "FINISHED"}
    yield folder


def said_running(folder: Path) -> bool:
    return any('"RUNNING"' in file.read_text() for file in folder.glob("*/records.jsonl"))


def at_mlflow(run_dir: Path) -> bool:
    state = load_state(run_dir)
    return state is not None and state.offset > 0


def test_a_killed_ld3_pool(tiny: Path) -> None:
    """Its runs are ended by klray.upload, and by a command that goes on with other jobs of the pool."""
    pool = tiny / "runs" / "tiny" / "ld3" / "pool"
    job = "ddim-nfe004"  # learned first
    process = start(tiny, "ld3", *COMMANDS["ld3"])
    stop(process, signal.SIGINT, when=lambda: at_mlflow(pool / "trials" / job))
    assert process.returncode == 130
    assert statuses(tiny) == {"tiny": "FINISHED", "pool": "KILLED", job: "KILLED"}
    offset = load_state(pool / "trials" / job).offset  # type: ignore[union-attr]
    process = start(tiny, "ld3", *COMMANDS["ld3"])
    stop(process, signal.SIGKILL, when=lambda: load_state(pool / "trials" / job).offset > offset)  # type: ignore[union-attr]
    assert statuses(tiny) == {"tiny": "FINISHED", "pool": "RUNNING", job: "RUNNING"}
    run(tiny, "upload", str(pool))
    assert statuses(tiny) == {"tiny": "FINISHED", "pool": "KILLED", job: "KILLED"}
    with RecordWriter(pool / "trials" / job) as writer:
        writer.status("RUNNING")  # as killed once more
    upload(pool / "trials" / job)
    assert statuses(tiny)[job] == "RUNNING"
    run(tiny, "ld3", *LD3, "--nfe", "3")
    assert statuses(tiny) == {"tiny": "FINISHED", "pool": "FINISHED", job: "KILLED", "ddim-nfe003": "FINISHED"}
    with RecordWriter(pool) as writer:
        writer.status("RUNNING")  # as killed when all was learned
    upload(pool)
    run(tiny, "ld3", *LD3, "--nfe", "3")
    assert "RUNNING" not in statuses(tiny).values()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_evaluation(tiny: Path, how: signal.Signals) -> None:
    root = f"evaluations-{how.name}"
    process = start(tiny, "evaluate", *COMMANDS["evaluate"], "--out", root)
    stop(process, how, when=lambda: said_running(tiny / root))
    (folder,) = (tiny / root).iterdir()
    if how == signal.SIGKILL:
        run(tiny, "upload", str(folder))

    def status() -> str:
        from mlflow import MlflowClient

        state = load_state(folder)
        assert state is not None and state.run_id is not None
        return str(MlflowClient(state.uri).get_run(state.run_id).info.status)

    assert status() == "KILLED"
    run(tiny, "evaluate", *COMMANDS["evaluate"], "--out", root)
    assert status() == "FINISHED"
    assert "RUNNING" not in statuses(tiny).values()


def test_what_somebody_holds_is_not_ended(tmp_path: Path) -> None:
    """A run, or one below it, that a living process works on; those beside it are ended."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    study, held, stale = (tmp_path / each for each in ("study", "study/trials/held", "study/trials/stale"))
    for folder in (study, held, stale):
        with RecordWriter(folder) as writer:
            writer.status("RUNNING")
            writer.tags({"klray.state": "running"})
        UploadState(uri, "study", folder.name, parent_dir=None if folder == study else "../..").save(folder)
        upload(folder)

    def states() -> dict[str, str]:
        client = MlflowClient(uri)
        runs = [client.get_run(load_state(each).run_id) for each in (study, held, stale)]  # type: ignore[union-attr]
        return {each.info.run_name: f"{each.info.status} {each.data.tags['klray.state']}" for each in runs}

    with locked(study, ""), locked(held, ""):
        for folder in (study, held, stale):
            upload_all(folder)
    assert set(states().values()) == {"RUNNING running"}
    with locked(held, ""):
        upload_all(study)
    assert states() == {"study": "KILLED killed", "held": "RUNNING running", "stale": "KILLED killed"}
    upload_all(study)
    assert set(states().values()) == {"KILLED killed"}
