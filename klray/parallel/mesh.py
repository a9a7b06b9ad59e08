"""The data x basis mesh: ranks along `data` hold different images, ranks along `basis` different terms of the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from klray.errors import UserError


class MeshError(UserError):
    """The mesh does not fit the workers or the batch."""


def resolve_mesh(
    workers: int, *, data: int | None, basis: int | str, terms_per_step: int, batch_size: int
) -> tuple[int, int]:
    """(data, basis) sizes whose product is ``workers``.

    ``auto`` takes for the basis axis the largest divisor of the workers that is <= the terms of a step.

    Raises:
        MeshError: where no such mesh exists or the batch does not split over the data axis.
    """
    if basis == "auto":
        basis = max(d for d in range(1, workers + 1) if workers % d == 0 and d <= max(1, terms_per_step))
    basis = int(basis)
    if data is None:
        if workers % basis:
            divisors = ", ".join(str(d) for d in range(1, workers + 1) if workers % d == 0)
            raise MeshError(f"mesh.basis must divide the number of workers, {workers}, got {basis}; choose {divisors}")
        data = workers // basis
    if data * basis != workers:
        raise MeshError(
            f"mesh.data x mesh.basis must be the number of workers, {workers}, got {data} x {basis}; "
            f"use --workers {data * basis}"
        )
    if batch_size % data:
        near = max(data, round(batch_size / data) * data)
        raise MeshError(f"optimizer.batch_size must be a multiple of mesh.data = {data}, got {batch_size}; try {near}")
    return data, basis


def collective_backend(choice: str, device: torch.device, *, shared_gpu: bool) -> str:
    """``nccl`` or ``gloo`` for a ``mesh.backend``. NCCL refuses several ranks on one GPU, gloo goes through the CPU.

    Raises:
        MeshError: for nccl where it cannot work.
    """
    fits = device.type == "cuda" and not shared_gpu
    if choice == "nccl" and not fits:
        there = "several workers share one" if shared_gpu else f"they train on {device.type}"
        raise MeshError(f"mesh.backend nccl needs a GPU for each worker, and {there}; use auto or gloo")
    return choice if choice != "auto" else "nccl" if fits else "gloo"


@dataclass(frozen=True)
class Mesh:
    """This rank's place. Ranks are numbered data-major: rank = data_rank * basis_size + basis_rank."""

    data_size: int = 1
    basis_size: int = 1
    rank: int = 0
    basis_group: dist.ProcessGroup | None = None

    @staticmethod
    def create(data_size: int, basis_size: int, device_type: str) -> Mesh:
        """The mesh over the initialised process group, or 1 x 1 without one."""
        if not dist.is_initialized():
            return Mesh()
        names = ("data", "basis")
        mesh = dist.device_mesh.init_device_mesh(device_type, (data_size, basis_size), mesh_dim_names=names)
        return Mesh(data_size, basis_size, dist.get_rank(), mesh.get_group("basis"))

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.data_size * self.basis_size

    def local_positions(self, batch_size: int) -> range:
        """The positions in the global batch that this rank trains on; the same along the basis axis.

        Where the batch does not split evenly, as may be after workers were lost, some ranks have one more.
        """
        place = self.rank // self.basis_size
        return range(batch_size * place // self.data_size, batch_size * (place + 1) // self.data_size)

    def local_terms(self, terms: Tensor) -> Tensor:
        """This rank's terms of the step's [K]: at most ceil(K / basis_size), none where K is smaller than the axis."""
        return terms[self.rank % self.basis_size :: self.basis_size]

    def sum_over_basis(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks that hold the same images, outside of autograd."""
        if self.basis_size > 1:
            dist.all_reduce(tensor, group=self.basis_group)
        return tensor

    def sum_over_all(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_first(self, tensor: Tensor) -> Tensor:
        """Rank 0's value on every rank."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def share(self, count: int) -> range:
        """This rank's part of ``count`` independent pieces of work."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)
