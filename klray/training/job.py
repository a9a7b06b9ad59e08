"""A training run on Ray Train: one worker for each place of the data x basis mesh."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer, get_device

from klray.cluster.connect import cluster_size, cpu_share
from klray.cluster.group import JoinedByWorkers, join_group, open_store, taken_away
from klray.cluster.jobs import not_shared
from klray.config import Config
from klray.data.sources import ImageData
from klray.errors import RunError, StoppedError, UserError
from klray.parallel.mesh import collective_backend
from klray.runs.records import RecordWriter
from klray.training.meter import NonFiniteError
from klray.training.recorded import train_and_record
from klray.training.stop import MovedError, Request, StopFile

_LOOK_FOR_WORKERS_S = 10.0  # how often a run that lost workers looks for places; taking them in repeats unsaved steps

_WAITS = 240  # of 15 s, an hour, for machines that are to come

_BEFORE_RESTART_S = 2.0  # far more than Ray takes to end a controller


class WorkersError(UserError):
    """The cluster cannot hold the workers that were asked for."""


class TrainingError(RunError):
    """Training failed for a reason that a restart does not mend, or more often than is allowed."""


class DivergedError(TrainingError):
    """Gradients stopped being finite: the settings are bad, not the machine."""


@dataclass(frozen=True)
class SharedImages:
    """Images in Ray's object store: one copy a node, read in place by every worker."""

    arrays: ray.ObjectRef
    fingerprint: str

    @staticmethod
    def of(data: ImageData) -> SharedImages:
        """Puts them there."""
        return SharedImages(ray.put({"train": data.train, "held_out": data.held_out}), data.fingerprint)

    def array(self, name: str) -> np.ndarray:
        """The ``train`` or the ``held_out`` ones, uint8 [N, C, H, W]."""
        array: np.ndarray = ray.get(self.arrays)[name]
        return array


def run_on_ray(
    config: Config,
    images: SharedImages,
    *,
    mesh_shape: tuple[int, int],
    run_dir: Path,
    provenance: dict[str, Any],
    least: int | None = None,
    max_failures: int = 10,
    cpus_per_worker: float | None = None,
    gpus_per_worker: float = 1,
    callbacks: list[Any] | None = None,
    profile: range | None = None,
) -> None:
    """Trains on a worker group; a lost worker restarts the group from the last whole checkpoint. A group of which a
    worker got SIGTERM, or is on a node that Ray drains, writes a checkpoint first, and another group goes on.

    klray's own checkpoints in RUN_DIR are the ones resumed from, so that every runner continues every other's run;
    Ray gets metrics after each validation.

    Args:
        least: workers that training goes on with where not all have a place, then along the data axis; it takes in more
            when they come. None: it waits for all.
        cpus_per_worker: where other runs share the cluster; None: an equal share of all.
        gpus_per_worker: where there are any; below 1 several workers are on one GPU.
        callbacks: of Ray Train.
        profile: steps of a worker group that rank 0 traces.

    Raises:
        WorkersError: where the cluster has too few GPUs.
        StoppedError: where RUN_DIR/stop asked for it.
        DivergedError, TrainingError: where training failed for good.
    """
    workers = mesh_shape[0] * mesh_shape[1]
    _, gpus = cluster_size()
    use_gpu = gpus > 0
    if use_gpu and workers > _gpu_places(gpus, gpus_per_worker):
        raise WorkersError(f"--workers must be at most {_gpus_in_words(gpus, gpus_per_worker)}, got {workers}")
    share = cpu_share(workers) if cpus_per_worker is None else cpus_per_worker

    def fit() -> dict[str, Any]:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "config": config,
                "images": images,
                "basis_size": mesh_shape[1],
                "threads": max(1, int(share)),
                "shared_gpu": gpus_per_worker < 1,
                "run_dir": run_dir,
                "provenance": provenance,
                "profile": profile,
            },
            torch_config=JoinedByWorkers(),
            scaling_config=ScalingConfig(
                num_workers=workers if least is None else (least, workers),
                use_gpu=use_gpu,
                resources_per_worker={"CPU": share, **({"GPU": gpus_per_worker} if use_gpu else {})},
                elastic_resize_monitor_interval_s=_LOOK_FOR_WORKERS_S,
            ),
            # A name of its own for each attempt: Ray would otherwise resume from its own snapshot of the one before.
            run_config=RunConfig(
                name=f"attempt_{time.time_ns()}",
                storage_path=str(run_dir / "ray"),
                failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=_WAITS),
                callbacks=[_Patience(), *(callbacks or [])],
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            _record(run_dir, "FAILED")
            raise TrainingError(f"the workers failed more than {max_failures} times: {_last_line(error)}") from error
        except (KeyboardInterrupt, SystemExit) as stop:  # Ray answers Ctrl-C with sys.exit
            _record(run_dir, "KILLED")
            raise KeyboardInterrupt from stop
        return result.return_value or {}

    outcome = fit()
    while "moved" in outcome:
        outcome = fit()
    if "stopped" in outcome:
        raise StoppedError(outcome["stopped"])
    if "error" in outcome:
        raise (DivergedError if outcome["diverged"] else TrainingError)(outcome["error"])


def runs_at_once(workers: int, budget_unit: str, gpus_per_worker: float = 1) -> int:
    """How many runs of so many workers fit beside each other; one without GPUs where the budget is in seconds, as
    runs that share cores would take each other's.

    Raises:
        WorkersError: where none does, or where runs whose budget is in seconds would share a GPU.
    """
    cpus, gpus = cluster_size()
    if gpus and gpus_per_worker < 1 and budget_unit == "seconds":
        raise WorkersError(
            f"--gpus-per-worker must be 1 for a budget in seconds, got {gpus_per_worker:g}: runs on one GPU would take "
            "each other's; set budget.unit to images or network_evals"
        )
    if gpus:
        fit, what = _gpu_places(gpus, gpus_per_worker) // workers, _gpus_in_words(gpus, gpus_per_worker)
    else:
        fit, what = max(cpus // workers, int(workers <= 2 * cpus)), f"the cluster's CPUs, {cpus}"
    if fit < 1:
        raise WorkersError(f"--workers must be at most {what}, got {workers}")
    return 1 if budget_unit == "seconds" and not gpus else fit


def _gpu_places(gpus: int, each: float) -> int:
    """A worker's part is never of two GPUs."""
    return gpus * int(1 / each + 1e-9)


def _gpus_in_words(gpus: int, each: float) -> str:
    shared = f" at --gpus-per-worker {each:g}, {_gpu_places(gpus, each)} places" if each < 1 else ""
    return f"the cluster's GPUs, {gpus}{shared}"


def train_in_worker(
    config: Config,
    images: SharedImages,
    *,
    mesh_shape: tuple[int, int],
    device: torch.device,
    threads: int,
    run_dir: Path,
    provenance: dict[str, Any],
    on_validation: Callable[[dict[str, float]], None],
    profile: range | None = None,
    asked: Callable[[], Request] = lambda: Request.NONE,
) -> dict[str, Any]:
    """Trains in this process.

    Returns:
        {}; {"moved"} or {"stopped": why} where a request that ``asked`` told of was granted; {"error", "diverged"} for
        what every rank and every restart would meet.
    """
    torch.set_num_threads(threads)
    arrays = ray.get(images.arrays)

    def report(metrics: dict[str, float]) -> None:
        if "val/eps_mse" in metrics:
            # Rounded up: a look at the last step within 80 % counts as one at 80 %.
            on_validation({**metrics, "budget_percent": math.ceil(100 * metrics["budget_used"] - 1e-6)})

    try:
        train_and_record(
            config,
            ImageData(arrays["train"], arrays["held_out"], images.fingerprint),
            mesh_shape=mesh_shape,
            device=device,
            run_dir=run_dir,
            provenance=provenance,
            on_metrics=report,
            profile=profile,
            asked=asked,
        )
    except MovedError:
        return {"moved": True}
    except StoppedError as stopped:
        return {"stopped": str(stopped)}
    except (UserError, RunError) as error:
        return {"error": str(error), "diverged": isinstance(error, NonFiniteError)}
    return {}


class _Patience(UserCallback):
    """Waits before a worker group is begun anew.

    Where a trial is stopped, Ray ends its workers before their controller. A controller that took this for their
    failure would begin another group in its last moment, whose places nobody would ever free.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """In the controller's process, which can be ended meanwhile."""
        time.sleep(_BEFORE_RESTART_S)


def _worker(settings: dict[str, Any]) -> dict[str, Any]:
    basis_size, shared_gpu = settings.pop("basis_size"), settings.pop("shared_gpu")
    context, device = ray.train.get_context(), get_device()
    rank, size = context.get_world_rank(), context.get_world_size()
    if size > 1:
        store, address = open_store(size) if rank == 0 else (None, None)
        address = broadcast_from_rank_zero(address)
        backend = collective_backend(settings["config"].mesh.backend, device, shared_gpu=shared_gpu)
        join_group(rank, size, device, address if store is None else store, backend)
    stop_file = StopFile(settings["run_dir"])

    def asked() -> Request:
        if rank == 0 and stop_file.asked():
            return Request.STOP
        return Request.MOVE if taken_away() else Request.NONE

    try:
        blind = _blind_machines(settings["run_dir"], size)
        if blind:
            return {
                "error": not_shared(settings["run_dir"], blind, "--runs or --studies"),
                "diverged": False,
            }
        mesh_shape = (size // basis_size, basis_size)
        return train_in_worker(
            mesh_shape=mesh_shape, device=device, on_validation=ray.train.report, asked=asked, **settings
        )
    finally:
        if size > 1:
            dist.destroy_process_group()


def _blind_machines(run_dir: Path, size: int) -> list[str]:
    """Addresses of the machines on which the run's folder, which the driver has made, is not."""
    mine = "" if run_dir.exists() else ray.util.get_node_ip_address()
    found = [mine] * size
    if size > 1:
        dist.all_gather_object(found, mine)
    return sorted(set(found) - {""})


def _record(run_dir: Path, status: str) -> None:
    """The status of a run whose workers could not write it any more."""
    with RecordWriter(run_dir) as writer:
        writer.status(status)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
