"""Training on the second device: it resumes with the same bits, and the host never waits for a step."""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from klray.config import Config, preset_names
from klray.training.peak_memory import PeakMemory
from tests.device.runs import Reported, moved, relative_error, shrunk, state_of, trained
from tests.device.second_device import Counting

# Between them, all that a step can do: precisions, layouts, dropout, chunks, couplings, micro-batches, scarce averages.
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "chunks, dropout, flips, channels_last, bf16": ("cifar10", {"loss__term_chunk": 1}),
    "offsets in time, fp16": ("paper_mnist", {"ema__every": 2}),
    "the network as it is, channels_last, attention": (
        "cifar10",
        {"loss__term_chunk": None, "precision__fused": "off"},
    ),
    "baseline, float32": ("digits", {"process__num_terms": 0, "precision__amp": "off"}),
    "some terms, separable, micro-batches": (
        "digits",
        {"loss__partial_terms": 2, "loss__coupling": "separable", "optimizer__micro_batch": 3},
    ),
    "wide, coefficients": ("digits", {"network__architecture": "wide", "loss__prediction": "coefficient"}),
    "mlp, shares": ("digits", {"network__kind": "mlp", "network__dropout": 0.1, "loss__prediction": "share"}),
    "truncated": ("digits", {"process__kind": "vp_truncated"}),
    "ensemble": ("digits", {"process__kind": "vp_ensemble"}),
}
# Kernels of a step of cifar10's own depth and number of terms; they do not depend on its width and its batch.
LAUNCHES: dict[str, tuple[int, dict[str, Any]]] = {
    "one term at a time": (12_000, {"loss__term_chunk": 1}),
    "all terms at once": (1_100, {"loss__term_chunk": None}),
    "baseline": (900, {"process__num_terms": 0, "loss__term_chunk": None}),
}


@dataclass(frozen=True)
class Run:
    """Four steps, with checkpoints after the second and the fourth, validation and a preview at the end."""

    config: Config
    folder: Path
    reported: Reported


@pytest.fixture(scope="module", params=preset_names())
def run(request: pytest.FixtureRequest, device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Run:
    batch = shrunk(request.param).optimizer.batch_size
    config = shrunk(request.param, budget__amount=4, checkpoint__every_images=2 * batch)
    folder = tmp_path_factory.mktemp(request.param)
    return Run(config, folder, trained(config, folder, device))


def test_a_preset_trains_validates_and_draws(run: Run) -> None:
    assert {"train/loss", "val/loss", "val/eps_mse"} <= run.reported.metrics.keys()
    assert all(math.isfinite(value) for value in run.reported.metrics.values())
    assert run.reported.metrics["train/skipped_steps"] < 4  # float16 begins with a scale that is too large
    assert run.reported.previews == 1


def test_a_preset_resumes_with_the_same_bits(run: Run, tmp_path: Path, device: torch.device) -> None:
    shutil.copytree(run.folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(max((tmp_path / "checkpoints").iterdir()))  # as if the run had died before it
    trained(run.config, tmp_path, device)
    found, wanted = state_of(tmp_path), state_of(run.folder)
    assert found.keys() == wanted.keys()
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]


def test_nothing_takes_more_memory_than_a_training_step(run: Run) -> None:
    peaks = run.reported.peaks
    assert peaks["validation"] <= peaks["training"], peaks
    assert peaks["sampling"] <= peaks["training"], peaks


def test_each_part_reports_its_own_peak(tmp_path: Path, device: torch.device) -> None:
    """A preview of many more images than a batch takes more than training, whose own peak it leaves as it was."""
    peaks = {}
    for images in (1, 4096):
        gc.collect()  # the run before
        batch = shrunk("digits").optimizer.batch_size
        often = {"sampling__every_images": 2 * batch, "sampling__images": images, "validation__every_images": 10**9}
        peaks[images] = trained(shrunk("digits", budget__amount=4, **often), tmp_path / str(images), device).peaks
    assert peaks[4096]["sampling"] > peaks[4096]["training"] > 0
    assert peaks[4096]["training"] == peaks[1]["training"]
    assert peaks[1]["sampling"] < peaks[1]["training"]
    assert 0 < peaks[1]["validation"] < peaks[1]["training"]


def test_the_network_in_few_kernels_learns_as_it_does_plain(tmp_path: Path, device: torch.device) -> None:
    """Over steps whose gradients are added up and clipped; with an eps for which rounding errors decide nothing."""
    found = {}
    for fused in ("on", "off"):
        plain = {"precision__amp": "off", "precision__fused": fused, "optimizer__eps": 1e-3, "loss__term_chunk": 1}
        config = shrunk("digits", budget__amount=3, optimizer__warmup_images=0, **plain)
        trained(config, tmp_path / fused, device)
        found[fused] = moved(config, tmp_path / fused)
    assert relative_error(found["on"], found["off"]) < 1e-3


def test_a_part_that_asks_for_no_memory_again_keeps_its_peak(device: torch.device) -> None:
    """As a step that is replayed; another part's memory is not its."""
    memory = PeakMemory(device)
    memory.take("before")
    held = torch.zeros(2**20, dtype=torch.uint8, device=device)
    del held
    first = memory.take()["perf/memory_gib"]
    held = torch.zeros(2**22, dtype=torch.uint8, device=device)
    del held
    assert memory.take("sampling")["perf/memory_gib.sampling"] - first == pytest.approx(3 * 2**20 / 2**30)
    assert memory.take()["perf/memory_gib"] == first


@pytest.mark.parametrize("case", STEPS)
def test_the_host_never_waits_for_a_training_step(case: str, tmp_path: Path, device: torch.device) -> None:
    """Nor for the loop around it."""
    preset, changes = STEPS[case]
    more, spent = difference(1, 3, preset, changes, tmp_path, device)
    assert more.beyond(spent, 2, "read", "upload") == {}


@pytest.mark.parametrize("case", LAUNCHES)
def test_a_training_step_launches_no_more_kernels_than_it_did(
    case: str, tmp_path: Path, device: torch.device, record_property: Callable[[str, object], None]
) -> None:
    most, changes = LAUNCHES[case]
    changes = {"process__num_terms": 8, "network__layers_per_block": 2, "optimizer__batch_size": 2, **changes}
    more, spent = difference(1, 2, "cifar10", changes, tmp_path, device)
    launches = more.launches - spent.launches
    record_property("kernels of a training step", launches)
    assert launches <= most, list(more.beyond(spent, 1, "launch").items())[:20]


def difference(
    few: int, many: int, preset: str, changes: dict[str, Any], folder: Path, device: torch.device
) -> tuple[Counting, Counting]:
    """What whole runs of ``many`` and of ``few`` steps do: between them, all that is done once cancels."""
    once = {"validation__images": 2, "sampling__images": 1, "sampling__num_steps": 1, "tracking__every_steps": 100}
    found = []
    for steps in (many, few):
        with Counting() as counts:
            trained(shrunk(preset, budget__amount=steps, **once, **changes), folder / str(steps), device)
        found.append(counts)
    return found[0], found[1]
