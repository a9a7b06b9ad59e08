"""What LD3 learns from: pairs of unit noise and the image that a solver of many steps makes of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from klray import registry
from klray.core.denoiser import Denoiser
from klray.core.finish import solve
from klray.core.schedule import Schedule
from klray.core.solver_parameters import SolverParameters
from klray.errors import UserError
from klray.parallel.random import Purpose, normal

FORMAT = 1


class TeacherError(UserError):
    """Stored pairs that are missing, torn, altered, or of another teacher."""


@dataclass(frozen=True)
class TeacherPairs:
    """noise and images [n, C, H, W]: images[i] is what the teacher makes of the unit noise noise[i]."""

    noise: Tensor
    images: Tensor

    def __post_init__(self) -> None:
        if self.noise.shape != self.images.shape or self.noise.dim() < 2:
            shapes = f"{list(self.noise.shape)} and {list(self.images.shape)}"
            raise ValueError(f"noise and images must have one shape [n, C, H, W], got {shapes}")

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, part: slice) -> TeacherPairs:
        return TeacherPairs(self.noise[part], self.images[part])

    def to(self, device: torch.device | str) -> TeacherPairs:
        """The pairs on a device."""
        return TeacherPairs(self.noise.to(device), self.images.to(device))

    @staticmethod
    def cat(parts: Sequence[TeacherPairs]) -> TeacherPairs:
        """Pairs that were made in parts, in the order given."""
        return TeacherPairs(torch.cat([p.noise for p in parts]), torch.cat([p.images for p in parts]))


@dataclass(frozen=True)
class Teacher:
    """How pairs are made; plain values, so that it travels to workers.

    Attributes:
        solver: a name in SOLVERS.
        timesteps: [N + 1], of many steps.
        options: keywords of the solver.
        final: what becomes of the noise that is left, see ``solve``.
    """

    solver: str
    timesteps: list[float]
    options: Mapping[str, Any] = field(default_factory=dict)
    final: str = "denoise"

    def key(self, model: str, seeds: Sequence[int], shape: Sequence[int]) -> str:
        """16 hex digits of everything that decides the pairs; ``model`` is a fingerprint of the denoiser."""
        described = {"format": FORMAT, "model": model, **asdict(self), "seeds": list(seeds), "shape": list(shape)}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]

    @torch.no_grad()
    def pairs(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        seeds: Sequence[int],
        shape: tuple[int, ...],
        *,
        batch_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> TeacherPairs:
        """One pair for each seed, on the CPU.

        The noise is the one that sampling draws for that seed. The network always sees ``batch_size`` images (the last
        batch is padded), so that pairs are bit-equal however the seeds are spread over workers.

        Raises:
            ValueError: for no seeds at all.
        """
        if not seeds:
            raise ValueError("a teacher needs at least one seed")
        many = SolverParameters(self.timesteps).to(torch.device(device))
        parts = []
        for first in range(0, len(seeds), batch_size):
            batch = list(seeds[first : first + batch_size])
            padded = torch.tensor(batch + batch[:1] * (batch_size - len(batch)), device=device)
            noise = normal(0, 0, Purpose.SAMPLE, padded, shape).to(dtype)
            solver = registry.entry("solver", self.solver)
            images = solve(solver, denoiser, schedule, noise, many, options=self.options, final=self.final)
            parts.append(TeacherPairs(noise[: len(batch)].cpu(), images[: len(batch)].cpu()))
        return TeacherPairs.cat(parts)


def save_pairs(folder: Path, key: str, pairs: TeacherPairs) -> Path:
    """Writes pairs_KEY.safetensors and, after it, pairs_KEY.json with its sha256; each aside, then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, described = _files(folder, key)
    aside = tensors.with_name(f".writing_{os.getpid()}_{tensors.name}")
    save_file({"noise": pairs.noise.contiguous(), "images": pairs.images.contiguous()}, aside)
    content = {"format": FORMAT, "key": key, "count": len(pairs), "shape": list(pairs.noise.shape[1:])}
    content["sha256"] = hashlib.sha256(aside.read_bytes()).hexdigest()
    aside.rename(tensors)
    aside.write_text(json.dumps(content, indent=1))
    aside.rename(described)
    return tensors


def load_pairs(folder: Path, key: str) -> TeacherPairs | None:
    """The pairs stored under ``key``; None where there are none yet.

    Raises:
        TeacherError: for files that are torn or altered.
    """
    tensors, described = _files(folder, key)
    if not described.is_file():
        return None
    try:
        content = json.loads(described.read_text())
        if content["format"] != FORMAT or content["key"] != key:
            raise ValueError(f"it is of format {content['format']} and key {content['key']}")
        if hashlib.sha256(tensors.read_bytes()).hexdigest() != content["sha256"]:
            raise ValueError("its sha256 differs from the one written down")
        loaded = load_file(tensors)
        return TeacherPairs(loaded["noise"], loaded["images"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TeacherError(
            f"{tensors} is no whole set of teacher pairs ({reason}); delete it to make them again"
        ) from error


def _files(folder: Path, key: str) -> tuple[Path, Path]:
    return folder / f"pairs_{key}.safetensors", folder / f"pairs_{key}.json"
