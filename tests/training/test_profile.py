"""The profile of some steps: which are traced, what the table counts, what the run's records say of it."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from klray.parallel.mesh import Mesh
from klray.runs.checkpoint import load_latest
from klray.runs.records import read_records
from klray.training.profile import KERNELS, TRACE, StepProfiler, kernel_table
from klray.training.recorded import train_and_record
from tests.training.test_training import CPU, DATA, config_of, tensors


def profiled(folder: Path, steps: range | None, **changes: object) -> list[dict[str, object]]:
    """A recorded run's records."""
    train_and_record(
        config_of(**changes), DATA, mesh_shape=(1, 1), device=CPU, run_dir=folder, provenance={}, profile=steps
    )
    return [record for record, _ in read_records(folder)]


def traced(folder: Path) -> set[str]:
    """The steps that the trace shows."""
    events = json.loads(gzip.decompress((folder / "profile" / TRACE).read_bytes()))["traceEvents"]
    return {event["name"] for event in events if re.fullmatch(r"step \d+", event.get("name", ""))}


def test_the_steps_are_traced_and_the_records_say_where(tmp_path: Path) -> None:
    records = profiled(tmp_path, range(3, 5))
    assert traced(tmp_path) == {"step 3", "step 4"}
    artifacts = [record for record in records if record["kind"] == "artifact"]
    assert [(a["path"], a["folder"]) for a in artifacts] == [
        (f"profile/{KERNELS}", "profile"),
        (f"profile/{TRACE}", "profile"),
    ]
    notes = [record["text"] for record in records if record["kind"] == "note"]
    assert notes == [f"the profile of steps 3 to 5 on the CPU is in {tmp_path / 'profile'}: {KERNELS}, {TRACE}"]


def test_the_table_counts_what_a_step_does(tmp_path: Path) -> None:
    """Dropout is keyed once a step; the costliest first; shares that add up."""
    profiled(tmp_path, range(2, 6))
    head, _, titles, *rows = (tmp_path / "profile" / KERNELS).read_text().splitlines()
    assert re.fullmatch(r"steps 2 to 6 on the CPU: [\d.]+ ms of wall time a step, [\d.]+ ms in these", head)
    assert titles.split() == ["share", "ms", "a", "step", "calls", "a", "step", "name"]
    cells = [row.split(maxsplit=3) for row in rows]
    calls = {name: float(count) for _, _, count, name in cells}
    assert calls["klray::dropout_keys"] == 1
    shares = [float(share.rstrip("%")) for share, *_ in cells]
    assert shares[:-1] == sorted(shares[:-1], reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares))
    wall, inside = (float(text) for text in re.findall(r"([\d.]+) ms", head))
    assert 0 < inside <= wall


def test_a_profile_changes_nothing_that_is_learned(tmp_path: Path) -> None:
    profiled(tmp_path / "with", range(1, 5))
    profiled(tmp_path / "without", None)
    found, wanted = tensors(tmp_path / "with"), tensors(tmp_path / "without")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_run_that_ends_within_the_range_shows_what_there_was(tmp_path: Path) -> None:
    profiled(tmp_path, range(10, 20))
    assert traced(tmp_path) == {"step 10", "step 11"}
    assert (tmp_path / "profile" / KERNELS).read_text().startswith("steps 10 to 12 on")


def test_a_run_that_ends_before_the_range_says_so(tmp_path: Path) -> None:
    records = profiled(tmp_path, range(12, 20))
    assert not (tmp_path / "profile").exists()
    assert {"kind": "note", "text": "no profile: training ended after 12 steps, before step 12"}.items() <= records[
        -1
    ].items()


def test_a_profile_that_cannot_be_written_does_not_end_training(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    records = profiled(tmp_path, range(2, 4))
    assert any("no profile" in str(record.get("text")) for record in records)
    assert load_latest(tmp_path, pytest.fail) is not None


def test_only_the_first_rank_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mesh, "create", staticmethod(lambda *shape: Mesh(1, 1, rank=1)))
    profiled(tmp_path, range(2, 4))
    assert not (tmp_path / "profile").exists()


def kernel(name: str, start: float, end: float, *, annotation: bool = False) -> FunctionEvent:
    """As a profiler gives it; times in microseconds."""
    where = {"device_type": DeviceType.CUDA, "is_user_annotation": annotation}
    return FunctionEvent(id=0, name=name, thread=0, start_us=start, end_us=end, **where)


def test_a_gpu_is_busy_where_any_stream_works() -> None:
    """Two steps of 100 us in all: [0, 30) and [20, 40) on two streams, [60, 80); an annotation is no kernel."""
    events = [kernel("a", 0, 30), kernel("b", 20, 40), kernel("a", 60, 80)]
    events.append(kernel("step 0", 0, 100, annotation=True))
    table = kernel_table(events, 2, 100e-6, "steps 0 to 2 on a card", on_gpu=True)
    head, _, _, first, second = table.splitlines()
    assert head.endswith("0.050 ms of wall time a step, 0.035 ms in these; the GPU was busy 60.0% of the time")
    assert first.split() == ["71.4%", "0.025", "1.0", "a"]
    assert second.split() == ["28.6%", "0.010", "0.5", "b"]


def test_a_device_is_waited_for_where_the_range_begins_and_ends() -> None:
    profiler = StepProfiler(range(2, 4), CPU, Path(), print, print)
    settled = []
    for _ in range(6):
        settled.append(profiler.settles)
        profiler.done += 1
    assert settled == [False, True, False, True, False, False]
    assert np.count_nonzero(settled) == 2
