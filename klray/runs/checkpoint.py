"""Checkpoints: safetensors and JSON with a manifest of sha256 sums, written aside and renamed. Nothing is pickled."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from klray.build import build_network
from klray.config import Config, saved_config
from klray.errors import RunError, UserError
from klray.networks.terms import TermNetwork
from klray.runs.state_copy import StateCopy
from klray.runs.train_state import Progress, TrainState, ema_network

FORMAT = 1
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PREFIX = "checkpoint_"


class CheckpointError(UserError):
    """A checkpoint that is missing, torn, altered, or of another model."""


class DiskFullError(RunError):
    """No room for a checkpoint. Those from before are whole."""


def save_checkpoint(run_dir: Path, state: StateCopy, config: Config, provenance: dict[str, Any], keep: int) -> Path:
    """Writes RUN_DIR/checkpoints/checkpoint_<images>; the newest ``keep`` stay. Only rank 0 calls it.

    The averaged weights lie in ``network/`` in diffusers' format, everything else in ``training.safetensors``.

    Raises:
        DiskFullError: where it does not fit; nothing of it stays.
    """
    target = run_dir / "checkpoints" / f"{_PREFIX}{state.counters['progress']['images_seen']:012d}"
    try:
        _write(
            target,
            state.network,
            {"config": config.model_dump(mode="json"), **state.counters, **provenance},
            state.tensors,
        )
    except (OSError, SafetensorError) as error:
        if not any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            raise
        shutil.rmtree(_aside(target))
        raise DiskFullError(
            f"the disk of {target.parent} is full; make room, then the same command goes on from the last checkpoint"
        ) from error
    for old in _checkpoints(run_dir)[keep:]:
        shutil.rmtree(old)
    return target


def save_snapshot(run_dir: Path, state: TrainState, config: Config) -> Path:
    """Writes RUN_DIR/snapshots/snapshot_<images>, the averaged network alone, to be evaluated. Only rank 0 calls it."""
    target = run_dir / "snapshots" / f"snapshot_{state.progress.images_seen:012d}"
    described = {"config": config.model_dump(mode="json"), "progress": asdict(state.progress)}
    _write(target, ema_network(state).backbone, described)
    return target


def _write(target: Path, network: Any, described: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
    """The network in diffusers' format; ``tensors`` where training is to go on from it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(target)
    for old in target.parent.glob(".writing_*"):
        shutil.rmtree(old)
    aside.mkdir()
    _save_backbone(network, aside / "network")
    if tensors is not None:
        save_file(tensors, aside / "training.safetensors")
    (aside / "state.json").write_text(json.dumps({"format": FORMAT, **described}, indent=1))
    files = sorted(p for p in aside.rglob("*") if p.is_file())
    manifest = {str(p.relative_to(aside)): file_digest(p) for p in files}
    (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in (*files, aside / "manifest.json", aside / "network", aside):
        _to_disk(path)
    if target.exists():
        shutil.rmtree(target)
    aside.rename(target)
    _to_disk(target.parent)


def _aside(target: Path) -> Path:
    return target.with_name(f".writing_{target.name}")


def load_latest(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of a run, None for a run without any. Torn and altered ones are warned of, skipped.

    Raises:
        CheckpointError: where there are checkpoints and none is whole.
    """
    found = _checkpoints(run_dir)
    for path in found:
        try:
            read_state(path)
        except CheckpointError as error:
            warn(f"{error}; trying the checkpoint before it")
        else:
            return path
    if found:
        raise CheckpointError(f"no checkpoint under {run_dir / 'checkpoints'} is whole; remove them to start anew")
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The verified state.json of a checkpoint.

    Raises:
        CheckpointError: where a file is missing, differs from the manifest, or the format is unknown.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, digest in manifest.items():
            if file_digest(path / name) != digest:
                raise CheckpointError(f"checkpoint file {path / name} is altered or torn (its sha256 differs)")
        state = json.loads((path / "state.json").read_text())
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is torn or no checkpoint: {error}") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {state.get('format')}, this klray reads {FORMAT}")
    return state


def restore(path: Path, state: TrainState) -> dict[str, Any]:
    """Loads a verified checkpoint into ``state``; returns its state.json.

    Raises:
        CheckpointError: where the tensors are another model's.
    """
    described = read_state(path)
    tensors = load_file(path / "training.safetensors")
    try:
        _load_network(path, ema_network(state))
        state.network.load_state_dict(_part(tensors, "network."))
        optimizer = state.optimizer.state_dict()
        moments: dict[int, dict[str, Any]] = {}
        for name, tensor in _part(tensors, "optimizer.").items():
            index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensor
        counts = described.get("optimizer", {"state": {}, "groups": []})
        for index, values in counts["state"].items():
            moments.setdefault(int(index), {}).update(values)
        for group, values in zip(optimizer["param_groups"], counts["groups"], strict=False):
            group.update(values)
        state.optimizer.load_state_dict({"state": moments, "param_groups": optimizer["param_groups"]})
        _match_layout(state.optimizer)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path} is of another model: {' '.join(str(error).split())[:200]}") from error
    state.ema.updates = int(tensors["n_averaged"])
    state.nonfinite.copy_(tensors["nonfinite"])
    state.scaler.load_state_dict(described["scaler"])
    state.progress = Progress(**described["progress"])
    return described


def whole_checkpoint(path: Path) -> Path:
    """``path`` if it is a checkpoint, else the newest whole one of the run that it is the folder of.

    Raises:
        CheckpointError: where there is none.
    """
    if not (path / "manifest.json").exists() and (path / "checkpoints").is_dir():
        latest = load_latest(path, warn=lambda message: None)
        if latest is None:
            raise CheckpointError(f"run {path} has no checkpoint yet")
        return latest
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}; give a run's folder or a checkpoint's")
    return path


def load_network(path: Path) -> tuple[Config, TermNetwork]:
    """A checkpoint's configuration and averaged network, in evaluation mode. ``path``: as for ``whole_checkpoint``.

    Raises:
        CheckpointError: where there is no whole checkpoint.
    """
    path = whole_checkpoint(path)
    config = saved_config(read_state(path)["config"])
    network = build_network(config)
    _load_network(path, network)
    return config, network.eval()


def _load_network(path: Path, network: TermNetwork) -> None:
    file = path / "network" / _WEIGHTS
    try:
        network.backbone.load_state_dict(load_file(file))
    except (RuntimeError, SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is of another model: {' '.join(str(error).split())[:200]}") from error


def _match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Moments in the memory format of their parameters: the fused optimiser walks both by address, not by index."""
    for parameter, moments in optimizer.state.items():
        for key, moment in moments.items():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                moments[key] = torch.empty_like(parameter).copy_(moment)


def _checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob(f"{_PREFIX}*"), reverse=True)


def _save_backbone(backbone: Any, folder: Path) -> None:
    """As diffusers does, which reads it if the class is one of its own."""
    if hasattr(backbone, "save_pretrained"):
        backbone.save_pretrained(folder)
        return
    folder.mkdir()
    save_file({name: each.contiguous() for name, each in backbone.state_dict().items()}, folder / _WEIGHTS)
    (folder / "config.json").write_text(json.dumps({"_class_name": type(backbone).__name__}))


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """A rename may reach the disk before the data it names; fsync puts the data first."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
