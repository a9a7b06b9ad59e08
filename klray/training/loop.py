"""The training loop: step, log, validate, sample, checkpoint. It runs alone, under torchrun and under Ray alike."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from klray.build import build_denoiser, build_encoder, build_network, build_process, build_sampler
from klray.config import Config
from klray.data.sources import ImageData
from klray.data.stream import ImageStream
from klray.errors import StoppedError
from klray.networks.half import amp_dtype, in_precision
from klray.parallel.mesh import Mesh
from klray.runs.checkpoint import DiskFullError, load_latest, restore, save_snapshot
from klray.runs.checkpoint_writer import CheckpointWriter
from klray.runs.progress import fits
from klray.runs.train_state import Progress, TrainState, ema_network, new_state
from klray.sampling.draw import image_grid, sample_images
from klray.training.initialise import initialise
from klray.training.meter import Meter
from klray.training.profile import StepProfiler
from klray.training.step import TrainStep, call_size
from klray.training.stop import MovedError, Request, agreed
from klray.training.validate import validate

# (progress, metrics, images): called on every rank with the same metrics; images [h, w, 3] uint8 on rank 0 alone.
Report = Callable[[Progress, dict[str, float], dict[str, np.ndarray]], None]


def train(
    config: Config,
    data: ImageData,
    *,
    mesh: Mesh,
    device: torch.device,
    run_dir: Path,
    report: Report,
    provenance: Callable[[], dict[str, Any]] = dict,
    warn: Callable[[str], None] = lambda message: None,
    profiler: StepProfiler | None = None,
    asked: Callable[[], Request] = lambda: Request.NONE,
) -> Progress:
    """Trains until the budget is used, from the newest whole checkpoint of ``run_dir`` on.

    ``asked``: what this rank is asked for, looked up after each step. One rank's request stops all of them: alone after
    this step, several at the next report.

    Raises:
        StoppedError: where that was granted.
        NonFiniteError: after ``optimizer.max_nonfinite`` steps in a row without a finite gradient.
        CheckpointError: where the run has checkpoints and none is whole.
        DiskFullError: where a checkpoint does not fit on the disk; told at the next one, or at the end.
    """
    process = build_process(config)
    network = build_network(config)
    latest = load_latest(run_dir, warn)
    if latest is None:
        initialise(config, network, warn)
    state = new_state(config, network, device)
    kept = restore(latest, state) if latest is not None else {}
    images = ImageStream(data.train, config.seed, config.data.flip, device, build_encoder(config))
    held_out = torch.from_numpy(np.ascontiguousarray(data.held_out))
    network.train()
    step = TrainStep(config, process, state, images, mesh, device, warn)
    meter = Meter(config, state, mesh, device, kept.get("unreported_losses", ()) if mesh.size == 1 else ())
    progress = state.progress
    done = not fits(config, progress)
    with CheckpointWriter(run_dir, config) as writer:
        while not done:
            with profiler.step() if profiler else nullcontext():
                meter.start()
                meter.losses.append(step())
                # A first step holds the compilation, which is not training time.
                counts = not (meter.first and (config.precision.compile or device.type == "cuda"))
                meter.stop(counts, settle=profiler is not None and profiler.settles)
            done = not fits(config, progress)
            due = {
                section: getattr(config, section).every_images > 0
                and (done or _due(getattr(config, section).every_images, config, progress))
                for section in ("validation", "sampling", "checkpoint", "evaluation")
            }
            # Before anything else takes the device's time, what training took is settled.
            reporting = any(due.values()) or progress.step % config.tracking.every_steps == 0
            if reporting:
                report(progress, meter.metrics(step), {})
            request = Request.NONE if done else agreed(asked(), mesh, device, reporting=reporting)
            if due["validation"]:
                errors = validate(config, process, ema_network(state), held_out, mesh, device)
                report(progress, {**errors, **meter.memory.take("validation")}, {})
            if due["sampling"]:
                grid = _sample_grid(config, state, data, mesh, device)
                report(progress, meter.memory.take("sampling"), grid)
            if due["evaluation"] and mesh.rank == 0:
                save_snapshot(run_dir, state, config)  # another process evaluates it; nobody waits
            if due["checkpoint"] or request:
                report(progress, {}, {})  # whoever lost the run to others learns it before writing
                _settle(writer, mesh, device)
                unreported = {"unreported_losses": meter.unreported()} if request else {}
                if mesh.rank == 0:
                    writer.save(state, {"data_fingerprint": data.fingerprint, **unreported, **provenance()})
            if request:
                _settle(writer, mesh, device)
                raise MovedError() if request is Request.MOVE else StoppedError("stopped by SIGTERM")
        _settle(writer, mesh, device)
    return progress


def _settle(writer: CheckpointWriter, mesh: Mesh, device: torch.device) -> None:
    """Waits for the checkpoint that is being written; where it does not fit on the disk, nobody goes on."""
    full = None
    try:
        writer.wait()
    except DiskFullError as error:
        full = error
    failed = mesh.sum_over_all(torch.tensor(float(full is not None), device=device))
    if failed:
        raise full or DiskFullError("rank 0 found no room for a checkpoint")


def _due(every_images: int, config: Config, progress: Progress) -> bool:
    return progress.step % max(1, every_images // config.optimizer.batch_size) == 0


def _sample_grid(
    config: Config, state: TrainState, data: ImageData, mesh: Mesh, device: torch.device
) -> dict[str, np.ndarray]:
    """A grid of images from seeds 0, 1, ...; batches are spread over the ranks."""
    process = build_process(config)
    sampler = build_sampler(config.sampling)
    images, terms = call_size(config, mesh)
    # No more rows at once than a training step's.
    count, size = config.sampling.images, min(config.sampling.batch_size, images * terms)
    predict = in_precision(ema_network(state), amp_dtype(config.precision.amp, device))
    denoiser = build_denoiser(config, predict, process, term_chunk=max(terms, images * terms // size))
    batches = mesh.share(-(-count // size))
    seeds = range(min(count, batches.start * size), min(count, batches.stop * size))
    drawn = torch.zeros(count, *data.train.shape[1:], device=device)
    if len(seeds):
        how: dict[str, Any] = {"batch_size": size, "device": device, "encoder": build_encoder(config)}
        mine = sample_images(denoiser, process, sampler, seeds, data.train.shape[1:], **how)
        drawn[seeds.start : seeds.stop] = mine.to(drawn)
    total = mesh.sum_over_all(drawn).to(torch.uint8).cpu()
    return {"samples": image_grid(total)} if mesh.rank == 0 else {}
