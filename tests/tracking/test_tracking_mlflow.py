"""Records reach MLflow, a real database and a real server, each once, through whatever faults there are."""

from __future__ import annotations

import json
import logging
import math
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from klray.runs.records import RecordWriter, end_of_records, history
from klray.tracking.mlflow_upload import TrackingError, Uploader, prepare, resolve_uri, upload
from klray.tracking.state import UploadState, load_state
from klray.upload import main
from tests.tracking.mlflow_server import Server, free_port

pytestmark = pytest.mark.slow
FAST: dict[str, Any] = {"interval": 0.1, "close_timeout": 60.0}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # a busy machine is no fault


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server
    finally:
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = resolve_uri(None, tmp_path_factory.mktemp("database"))
    prepare(uri, "klray")
    return uri


@pytest.fixture(params=["database", "server"])
def uri(request: pytest.FixtureRequest) -> str:
    found = request.getfixturevalue(request.param)
    return found.uri if isinstance(found, Server) else str(found)


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def run_of(run_dir: Path, uri: str) -> Any:
    state = load_state(run_dir)
    assert state is not None
    assert state.uri == uri
    return client(uri).get_run(state.run_id)


def runs_named(uri: str, name: str, experiment: str = "klray") -> list[Any]:
    found = client(uri).get_experiment_by_name(experiment)
    runs = client(uri).search_runs([found.experiment_id]) if found else []
    return [run for run in runs if run.info.run_name == name]


def assert_each_point_once(run_dir: Path, uri: str) -> None:
    run_id = run_of(run_dir, uri).info.run_id
    for key, points in history(run_dir).items():
        stored = client(uri).get_metric_history(run_id, key)
        assert sorted((point.step, point.value) for point in stored) == points, key


def artifacts(run_dir: Path, uri: str, folder: str | None = None) -> list[str]:
    return sorted(item.path for item in client(uri).list_artifacts(run_of(run_dir, uri).info.run_id, folder))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "klray.tracking"]


def wait_for_warning(caplog: pytest.LogCaptureFixture) -> None:
    deadline = time.monotonic() + 60
    while not warnings(caplog):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def write_metrics(run_dir: Path, steps: range, keys: int = 1) -> None:
    with RecordWriter(run_dir) as writer:
        for step in steps:
            writer.metrics(step, {f"train/loss_{key}": step + 0.5 for key in range(keys)})


def test_all_kinds_of_records_arrive(tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = tmp_path / "run"
    seen: list[dict[str, Any]] = []
    name = f"all kinds {tmp_path.name}"
    with (
        Uploader(run_dir, uri, "klray", name, {"klray.kind": "train"}, on_record=seen.append, **FAST) as uploader,
        RecordWriter(run_dir) as writer,
    ):
        writer.status("RUNNING")
        writer.params({f"group.param_{index}": index for index in range(130)} | {"long": "x" * 9000, "empty": ""})
        writer.tags({"klray.git": "abc"})
        for step in range(1200):
            writer.metrics(step, {"train/loss": 1 / (step + 1), "perf/images_per_s": float(step)})
        writer.metrics(1200, {"odd/nan": math.nan, "odd/inf": math.inf, "odd/-inf": -math.inf})
        writer.image("samples/grid", np.full((8, 8, 3), 7, np.uint8), 5)
        (run_dir / "plots").mkdir()
        (run_dir / "plots" / "a.txt").write_text("a")
        writer.artifact(run_dir / "plots" / "a.txt", "tables")
        writer.artifact(run_dir / "plots")
        writer.params({"group.param_1": 1, "group.param_2": "changed", "new": True})
        assert uploader.run_id(60) is not None
        writer.status("FINISHED")
    run = run_of(run_dir, uri)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == name
    assert run.data.tags["klray.kind"] == "train"
    assert run.data.tags["klray.git"] == "abc"
    assert len(run.data.params) == 133
    assert run.data.params["group.param_129"] == "129"
    assert run.data.params["group.param_2"] == "2"
    assert run.data.params["new"] == "True"
    assert run.data.params["long"] == "x" * 6000
    for key in ("train/loss", "perf/images_per_s"):
        stored = client(uri).get_metric_history(run.info.run_id, key)
        assert [(point.step, point.value) for point in stored] == history(run_dir)[key]
    assert math.isnan(run.data.metrics["odd/nan"])
    assert run.data.metrics["odd/inf"] > 1e308
    assert run.data.metrics["odd/-inf"] < -1e308
    assert artifacts(run_dir, uri) == ["images", "plots", "tables"]
    assert artifacts(run_dir, uri, "images") == ["images/samples_grid_000000005.png"]
    assert artifacts(run_dir, uri, "tables") == ["tables/a.txt"]
    assert [record["kind"] for record in seen].count("metrics") == 1201
    assert seen[-1]["status"] == "FINISHED"
    assert len(warnings(caplog)) == 1  # the changed parameter keeps its first value
    assert "'group.param_2'" in warnings(caplog)[0]
    assert upload(run_dir) == 0


def test_a_restarted_command_goes_on_in_the_same_run(tmp_path: Path, database: str) -> None:
    for steps, status in ((range(10), "FAILED"), (range(5, 20), "FINISHED")):
        with Uploader(tmp_path, database, run_name="restarted", **FAST), RecordWriter(tmp_path) as writer:
            writer.status("RUNNING")
            for step in steps:
                writer.metrics(step, {"loss": float(step)})
            writer.status(status)
    (run,) = runs_named(database, "restarted")
    assert run.info.status == "FINISHED"
    assert_each_point_once(tmp_path, database)


def test_nested_runs_are_found_by_their_parent(tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    study, by_id, by_folder = tmp_path / "study", tmp_path / "study" / "a", tmp_path / "study" / "b"
    for folder in (study, by_id, by_folder):
        write_metrics(folder, range(2))
    with Uploader(by_folder, uri, "nested", parent_dir=study, interval=0.1, close_timeout=1):
        wait_for_warning(caplog)  # the parent is not there yet
    with pytest.raises(TrackingError, match=f"python -m klray.upload {study}"):
        upload(by_folder)
    with Uploader(study, uri, "nested", tags={"klray.kind": "sweep"}, **FAST) as parent:
        parent_id = parent.run_id(60)
        with Uploader(by_id, uri, "nested", parent_run_id=parent_id, **FAST):
            pass
    assert upload(by_folder) == 2
    experiment = client(uri).get_experiment_by_name("nested").experiment_id
    children = client(uri).search_runs([experiment], f"tags.mlflow.parentRunId = '{parent_id}'")
    assert {run.info.run_name for run in children} == {"a", "b"}


def test_a_killed_uploader_leaves_each_point_once(tmp_path: Path, server: Server) -> None:
    write_metrics(tmp_path, range(500), keys=12)
    with RecordWriter(tmp_path) as writer:
        writer.status("FINISHED")
    code = "import sys; from klray.tracking.mlflow_upload import upload; upload(sys.argv[1], sys.argv[2])"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), server.uri])
    while not (state := load_state(tmp_path)) or state.offset == 0:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = load_state(tmp_path)
    assert state is not None
    assert 0 < state.offset < end_of_records(tmp_path)
    # As if it had been killed between sending and noting it, and even before it knew the run's id.
    replace(state, offset=0, run_id=None).save(tmp_path)
    assert upload(tmp_path) == 501
    assert run_of(tmp_path, server.uri).info.run_id == state.run_id
    assert len(runs_named(server.uri, tmp_path.name)) == 1
    assert_each_point_once(tmp_path, server.uri)
    assert run_of(tmp_path, server.uri).info.status == "FINISHED"


@pytest.mark.parametrize("kind", ["nobody listens", "nobody answers"])
def test_without_a_server_the_run_goes_on_and_is_sent_later(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    seen: list[dict[str, Any]] = []
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if kind == "nobody answers":
            silent.listen()
        dead = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        with (
            Uploader(
                tmp_path,
                dead,
                "study",
                f"late {kind}",
                {"a": "b"},
                on_record=seen.append,
                interval=0.1,
                close_timeout=1,
            ),
            RecordWriter(tmp_path) as writer,
        ):
            for step in range(100):
                writer.metrics(step, {"loss": float(step)})
            writer.status("FINISHED")
            if kind == "nobody listens":
                wait_for_warning(caplog)
        assert time.monotonic() - start < 90
        assert len(seen) == 101
        assert len(history(tmp_path)["loss"]) == 100
        assert sum("does not take the records" in text for text in warnings(caplog)) <= 1
        assert warnings(caplog)[-1].endswith(f"python -m klray.upload {tmp_path}")
        if kind == "nobody listens":
            assert len(warnings(caplog)) == 2
            with pytest.raises(TrackingError) as error:
                upload(tmp_path)
            assert "\n" not in str(error.value)
    assert upload(tmp_path, server.uri) == 101
    assert_each_point_once(tmp_path, server.uri)
    (run,) = runs_named(server.uri, f"late {kind}", "study")
    assert run.data.tags["a"] == "b"
    assert run.info.status == "FINISHED"


def test_a_server_that_dies_and_comes_back_misses_nothing(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with Uploader(tmp_path, server.uri, run_name="survivor", **FAST) as uploader:
        write_metrics(tmp_path, range(100), keys=5)
        assert uploader.run_id(60) is not None
        server.stop(signal.SIGKILL)
        try:
            write_metrics(tmp_path, range(100, 200), keys=5)
            wait_for_warning(caplog)
        finally:
            server.start()
        write_metrics(tmp_path, range(200, 300), keys=5)
    assert_each_point_once(tmp_path, server.uri)
    assert len(runs_named(server.uri, "survivor")) == 1
    assert len(warnings(caplog)) == 2
    assert warnings(caplog)[1].endswith("again")


def test_a_broken_artifact_store_does_not_hold_up_the_numbers(
    tmp_path: Path, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir, store = tmp_path / "run", tmp_path / "store"
    prepare(database, "broken store", artifact_root=store)
    store.write_text("a file, not a folder")
    with (
        Uploader(run_dir, database, "broken store", interval=0.1, close_timeout=1),
        RecordWriter(run_dir) as writer,
    ):
        writer.image("grid", np.zeros((8, 8), np.uint8), 0)
        for step in range(10):
            writer.metrics(step, {"loss": float(step)})
        writer.status("FINISHED")
        wait_for_warning(caplog)
    assert_each_point_once(run_dir, database)
    assert run_of(run_dir, database).info.status == "FINISHED"
    assert len(warnings(caplog)) == 2
    with pytest.raises(TrackingError, match="does not take the records"):
        upload(run_dir)
    store.unlink()
    assert upload(run_dir) == 1
    assert artifacts(run_dir, database, "images") == ["images/grid_000000000.png"]


def test_a_file_that_is_gone_or_refused_holds_up_nothing(
    tmp_path: Path, database: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import requests
    from mlflow import MlflowClient

    def behind_a_proxy(self: Any, run_id: str, path: str, folder: str | None = None) -> None:
        if Path(path).name == "too large":
            answer = requests.Response()
            answer.status_code = 413
            raise requests.HTTPError("413 Content Too Large", response=answer)
        send(self, run_id, path, folder)

    send = MlflowClient.log_artifact
    monkeypatch.setattr(MlflowClient, "log_artifact", behind_a_proxy)
    with RecordWriter(tmp_path) as writer:
        for name in ("gone", "too large", "kept"):
            (tmp_path / name).write_text(name)
            writer.artifact(tmp_path / name)
        writer.metrics(0, {"loss": 1.0, "a (bad) name": 1.0})
    (tmp_path / "gone").unlink()
    assert upload(tmp_path, database) == 4
    assert artifacts(tmp_path, database) == ["kept"]
    assert run_of(tmp_path, database).data.metrics == {"loss": 1.0}
    assert len(warnings(caplog)) == 3


def test_a_run_deleted_at_mlflow_is_sent_anew(tmp_path: Path, database: str) -> None:
    write_metrics(tmp_path, range(10))
    assert upload(tmp_path, database) == 10
    first = run_of(tmp_path, database).info.run_id
    assert upload(tmp_path) == 0
    client(database).delete_run(first)
    assert upload(tmp_path) == 10
    assert run_of(tmp_path, database).info.run_id != first
    assert_each_point_once(tmp_path, database)


def test_a_run_sent_to_another_place_is_not_doubled_at_the_first(tmp_path: Path, database: str, server: Server) -> None:
    write_metrics(tmp_path, range(10))
    for target in (database, server.uri, database):
        assert upload(tmp_path, target) == 10
        assert_each_point_once(tmp_path, target)
        assert len(runs_named(target, tmp_path.name)) == 1


def test_processes_may_create_one_database_together(tmp_path: Path) -> None:
    code = "import sys; from klray.tracking.mlflow_upload import prepare; prepare(sys.argv[1], 'klray')"
    uri = resolve_uri(None, tmp_path)
    processes = [subprocess.Popen([sys.executable, "-c", code, uri]) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert (
        client(uri).get_experiment_by_name("klray").artifact_location == (tmp_path / "mlartifacts").resolve().as_uri()
    )


def test_mlflow_is_optional(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    write_metrics(tmp_path, range(5))
    with Uploader(tmp_path, None, on_record=seen.append, interval=0.05) as uploader:
        write_metrics(tmp_path, range(10))
        assert uploader.run_id(1) is None
    assert [record["step"] for record in seen] == [5, 6, 7, 8, 9]
    assert load_state(tmp_path) is None


def test_a_failing_on_record_stops_nothing(tmp_path: Path, database: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(record: dict[str, Any]) -> None:
        raise KeyError("no such field")

    with Uploader(tmp_path, database, on_record=fail, **FAST):
        write_metrics(tmp_path, range(10))
    assert_each_point_once(tmp_path, database)
    assert len(warnings(caplog)) == 1


def test_a_database_that_cannot_be_opened_is_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database" * 100)
    with pytest.raises(TrackingError, match="file is not a database"):
        prepare(resolve_uri(None, tmp_path), "klray")
    with pytest.raises(TrackingError, match="does not answer"):
        prepare(f"http://127.0.0.1:{free_port()}", "klray")


def test_a_deleted_experiment_is_named(tmp_path: Path, database: str) -> None:
    prepare(database, "deleted")
    client(database).delete_experiment(client(database).get_experiment_by_name("deleted").experiment_id)
    with pytest.raises(TrackingError, match="mlflow experiments restore"):
        prepare(database, "deleted")


def test_the_command_sends_and_says_where(tmp_path: Path, database: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(tmp_path, range(10))
    about = {"name": "from run.json", "experiment": "study of M", "tracking_uri": database}
    (tmp_path / "run.json").write_text(json.dumps(about))
    assert main([str(tmp_path)]) == 0
    assert f"10 records sent to {database}, experiment study of M" in capsys.readouterr().out
    assert main([str(tmp_path)]) == 0
    assert "nothing left to send" in capsys.readouterr().out
    assert len(runs_named(database, "from run.json", "study of M")) == 1


def test_the_command_refuses_bad_input_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(tmp_path / "run", range(1))
    write_metrics(tmp_path / "broken", range(1))
    (tmp_path / "broken" / "run.json").write_text("{")
    UploadState("http://127.0.0.1:1", "klray", "dead").save(tmp_path / "run")
    for arguments, text in (
        ([str(tmp_path / "missing")], "holds no records"),
        ([str(tmp_path / "run"), "--tracking-uri", str(tmp_path)], "give sqlite:///"),
        ([str(tmp_path / "broken")], "run.json cannot be read"),
        ([str(tmp_path / "run")], "does not take the records"),
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert text in captured.err


def test_help_needs_no_mlflow() -> None:
    done = subprocess.run([sys.executable, "-m", "klray.upload", "--help"], check=True, capture_output=True, text=True)
    assert "RUN_DIR" in done.stdout
    assert logging.getLogger("klray.tracking").handlers == []
