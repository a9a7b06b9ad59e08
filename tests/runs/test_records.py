"""RUN_DIR/records.jsonl: what is written comes back, once, whatever happens to the process that writes it."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from klray.runs.records import RECORDS_FILE, RecordWriter, end_of_records, history, read_records
from klray.tracking.state import TrackingError, UploadState, load_state, redact, resolve_uri


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record, _ in read_records(run_dir)]


def test_every_kind_comes_back(tmp_path: Path) -> None:
    before = time.time_ns() // 1_000_000
    with RecordWriter(tmp_path / "run") as writer:
        writer.status("RUNNING")
        writer.params({"process.num_terms": 8, "optimizer.lr": 1e-4, "path": Path("a"), "list": (1, 2), "none": None})
        writer.tags({"klray.kind": "train"})
        writer.note("2 non-finite steps skipped")
        writer.metrics(3, {"train/loss": np.float32(0.5)})
        (tmp_path / "run" / "table.txt").write_text("x")
        writer.artifact(tmp_path / "run" / "table.txt", "tables")
    found = records(tmp_path / "run")
    assert all(before <= record.pop("time_ms") <= time.time_ns() // 1_000_000 for record in found)
    assert found == [
        {"kind": "status", "status": "RUNNING"},
        {
            "kind": "params",
            "values": {"process.num_terms": 8, "optimizer.lr": 1e-4, "path": "a", "list": [1, 2], "none": None},
        },
        {"kind": "tags", "values": {"klray.kind": "train"}},
        {"kind": "note", "text": "2 non-finite steps skipped"},
        {"kind": "metrics", "step": 3, "values": {"train/loss": 0.5}},
        {"kind": "artifact", "path": "table.txt", "folder": "tables"},
    ]


def test_nan_and_infinities_survive_in_strict_json(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    with RecordWriter(tmp_path) as writer:
        writer.metrics(0, {"nan": math.nan, "inf": math.inf, "-inf": -math.inf})
        writer.params({"nan": math.nan, "list": [math.inf]})
    for line in (tmp_path / RECORDS_FILE).read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    found = history(tmp_path)
    assert math.isnan(found["nan"][0][1])
    assert found["inf"] == [(0, math.inf)]
    assert found["-inf"] == [(0, -math.inf)]


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.metrics(1, {"loss": 1.0})
        writer.metrics(2, {"loss": 2.0})
    path = tmp_path / RECORDS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert history(tmp_path) == {"loss": [(1, 1.0)]}
    with RecordWriter(tmp_path) as writer:
        writer.metrics(2, {"loss": 2.0})
        writer.metrics(3, {"loss": 3.0})
    assert history(tmp_path) == {"loss": [(1, 1.0), (2, 2.0), (3, 3.0)]}


def test_a_complete_last_line_is_kept(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.metrics(1, {"loss": 1.0})
    before = (tmp_path / RECORDS_FILE).read_bytes()
    RecordWriter(tmp_path).close()
    assert (tmp_path / RECORDS_FILE).read_bytes() == before


@pytest.mark.parametrize("tail", [0, 1, 70_000, 200_000])
def test_the_end_of_the_records_is_after_the_last_newline(tmp_path: Path, tail: int) -> None:
    (tmp_path / RECORDS_FILE).write_bytes(b'{"kind":"status"}\n' + b"x" * tail)
    assert end_of_records(tmp_path) == 18
    (tmp_path / RECORDS_FILE).write_bytes(b"x" * tail)
    assert end_of_records(tmp_path) == 0


def test_a_resumed_run_records_no_step_twice_and_loses_none(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.metrics(step, {"loss": float(step)})
        writer.metrics(30, {"loss_again": 1.0})  # one step may be recorded in parts
        writer.metrics(20, {"eval": 0.5})
    with RecordWriter(tmp_path) as writer:
        for step in (20, 30, 40):
            writer.metrics(step, {"loss": float(step)})
        writer.metrics(30, {"eval": 0.4})  # the killed process did not get to this one
    found = history(tmp_path)
    assert found["loss"] == [(10, 10.0), (20, 20.0), (30, 30.0), (40, 40.0)]
    assert found["eval"] == [(20, 0.5), (30, 0.4)]


def test_images_are_written_once_and_named_after_key_and_step(tmp_path: Path) -> None:
    grey, colour = np.full((4, 6), 9, np.uint8), np.full((4, 6, 3), 7, np.uint8)
    with RecordWriter(tmp_path) as writer:
        writer.image("samples/grid", grey, 5)
        writer.image("samples/grid", colour, 6)
    with RecordWriter(tmp_path) as writer:
        writer.image("samples/grid", grey, 6)
        writer.image("samples/grid", grey, 7)
    names = [record["path"] for record in records(tmp_path)]
    assert names == [f"images/samples_grid_{step:09d}.png" for step in (5, 6, 7)]
    assert np.array_equal(np.asarray(Image.open(tmp_path / names[0])), grey)
    assert np.array_equal(np.asarray(Image.open(tmp_path / names[1])), colour)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [Path(name).name for name in names]


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "run") as writer:
        (tmp_path / "outside").write_text("x")
        with pytest.raises(ValueError, match="has to lie in the run's directory"):
            writer.artifact(tmp_path / "outside")
        (tmp_path / "run" / "inside").write_text("x")
        for folder in ("/abs", "../up", "a/../../b", "a//b", "./a"):
            with pytest.raises(ValueError, match="the folder of an artifact"):
                writer.artifact(tmp_path / "run" / "inside", folder)
        with pytest.raises(FileNotFoundError):
            writer.artifact(tmp_path / "run" / "missing")
        with pytest.raises(ValueError, match="uint8"):
            writer.image("x", np.zeros((4, 4), np.float32), 0)
        with pytest.raises(ValueError, match="RUNNING, FINISHED"):
            writer.status("DONE")
        with pytest.raises((TypeError, ValueError)):
            writer.metrics(0, {"loss": "low"})  # type: ignore[dict-item]
    assert records(tmp_path / "run") == []


def test_a_record_that_does_not_fit_on_the_disk_leaves_no_torn_line(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from klray.runs.records import RecordWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = RecordWriter(sys.argv[1])
writer.metrics(1, {"loss": 1.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
try:
    writer.metrics(2, {"loss": 2.0})
except OSError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    writer.metrics(3, {"loss": 3.0})
    sys.exit(7)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 7
    assert history(tmp_path) == {"loss": [(1, 1.0), (3, 3.0)]}


def test_times_never_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on at a machine whose clock is an hour behind."""
    for step, seconds in enumerate([5000, 1400, 1500, 6000]):
        monkeypatch.setattr("time.time_ns", lambda seconds=seconds: seconds * 10**9)
        with RecordWriter(tmp_path) as writer:
            writer.metrics(step, {"loss": 1.0})
    assert [record["time_ms"] for record in records(tmp_path)] == [5_000_000, 5_000_000, 5_000_000, 6_000_000]


def test_a_damaged_line_does_not_hide_the_others(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.metrics(1, {"loss": 1.0})
    with (tmp_path / RECORDS_FILE).open("a") as file:
        file.write("\0\0\n[]\n")
    with RecordWriter(tmp_path) as writer:
        writer.metrics(2, {"loss": 2.0})
    assert [record["kind"] for record in records(tmp_path)] == ["metrics", "unreadable", "unreadable", "metrics"]
    assert history(tmp_path) == {"loss": [(1, 1.0), (2, 2.0)]}


def test_reading_goes_on_at_an_offset(tmp_path: Path) -> None:
    assert list(read_records(tmp_path)) == []
    with RecordWriter(tmp_path) as writer:
        writer.metrics(1, {"loss": 1.0})
        (_, offset), *_ = read_records(tmp_path)
        assert list(read_records(tmp_path, offset)) == []
        writer.metrics(2, {"loss": 2.0})
    assert [record["step"] for record, _ in read_records(tmp_path, offset)] == [2]


def _write(run_dir: Path, count: int) -> None:
    with RecordWriter(run_dir) as writer:
        for step in range(count):
            writer.metrics(step, {f"key_{index}_{'x' * 200}": float(step) for index in range(50)})  # longer than a page


def test_a_concurrent_reader_sees_complete_records_only(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_write, args=(tmp_path, 1500))
    process.start()
    steps: list[int] = []
    offset = 0
    while process.is_alive() or len(steps) < 1500:
        assert process.exitcode in (None, 0)
        for record, end in read_records(tmp_path, offset):
            assert record["kind"] == "metrics"
            assert len(record["values"]) == 50
            steps.append(record["step"])
            offset = end
    process.join()
    assert steps == list(range(1500))


def test_a_killed_writer_leaves_a_file_that_goes_on(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_write, args=(tmp_path, 10**6))
    process.start()
    while end_of_records(tmp_path) == 0:
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    _write(tmp_path, 1000)
    for points in history(tmp_path).values():
        assert [step for step, _ in points] == list(range(len(points)))
    assert "unreadable" not in {record["kind"] for record in records(tmp_path)}


def test_tracking_uris_mean_the_same_everywhere(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    assert resolve_uri(None, tmp_path) == f"sqlite:///{root}/mlflow.db"
    assert resolve_uri("sqlite:///sub/x.db", tmp_path) == f"sqlite:///{root}/sub/x.db"
    assert resolve_uri(f"sqlite:///{root}/x.db", Path("/elsewhere")) == f"sqlite:///{root}/x.db"
    for uri in ("http://127.0.0.1:5000", "https://mlflow.example/x", "postgresql+psycopg2://user:word@host/db"):
        assert resolve_uri(uri, tmp_path) == uri
    for uri in (
        "mlruns",
        "./mlruns",
        "/abs/mlruns",
        "file:./x",
        "file:///abs",
        "sqlite:///:memory:",
        "sqlite://",
        "ftp://x",
        "",
    ):
        with pytest.raises(TrackingError, match="or a server"):
            resolve_uri(uri, tmp_path)
    assert redact("http://user:word@host:5000/x") == "http://user:***@host:5000/x"
    assert redact("http://host:5000") == "http://host:5000"


def test_the_upload_state_continues_the_same_target_only(tmp_path: Path) -> None:
    state = UploadState("http://a:1", "study", "name", run_id="r", offset=7, artifact_offset=5)
    state.save(tmp_path)
    assert load_state(tmp_path) == state
    again = UploadState("http://a:1", "study", "name").continued(tmp_path)
    assert (again.run_id, again.offset, again.artifact_offset, again.run_key) == ("r", 7, 5, state.run_key)
    other = UploadState("http://b:1", "study", "name").continued(tmp_path)
    assert (other.run_id, other.offset, other.artifact_offset, other.run_key) == (None, 0, 0, state.run_key)
    (tmp_path / "mlflow.json").write_text("{")
    with pytest.raises(TrackingError, match="remove it"):
        load_state(tmp_path)


def test_tracking_imports_without_mlflow() -> None:
    code = "import sys, klray.upload, klray.tracking.mlflow_upload; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
