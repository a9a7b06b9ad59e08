"""A process group for tensors on the second device: each collective goes through the host's memory and gloo.

As NCCL does for GPUs, it refuses tensors of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future

from tests.device.second_device import NAME

BACKEND = f"{NAME}_gloo"


class SecondDeviceGroup(dist.ProcessGroup):
    """The collectives that data parallelism and klray's mesh need."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._name = ""

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> dist.Work:  # type: ignore[override]
        """The sum, or what ``options`` say."""
        options = options or dist.AllreduceOptions()
        return self._through_host(tensors, lambda host: self._gloo.allreduce(host, options))

    def broadcast(self, tensors: list[Tensor], options: Any = None) -> dist.Work:  # type: ignore[override]
        """The root's values everywhere."""
        options = options or dist.BroadcastOptions()
        return self._through_host(tensors, lambda host: self._gloo.broadcast(host, options))

    def allgather(  # type: ignore[override]
        self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any = None
    ) -> dist.Work:
        """Every rank's value in its place."""
        (places,), (mine,) = outputs, inputs
        return self._through_host(places, lambda host: self._gloo.allgather([host], [_on_host(mine)]))

    def barrier(self, options: Any = None) -> dist.Work:
        """When all are here."""
        work: dist.Work = self._gloo.barrier()
        return work

    def getBackendName(self) -> str:
        """As it is registered."""
        return BACKEND

    def setGroupName(self, name: str) -> None:
        """Given by torch."""
        self._name = name

    def getGroupName(self) -> str:
        """As it was given."""
        return self._name

    def _through_host(self, tensors: list[Tensor], collective: Callable[[list[Tensor]], dist.Work]) -> dist.Work:
        host = [_on_host(tensor) for tensor in tensors]
        collective(host).wait()
        with torch.no_grad():
            for tensor, value in zip(tensors, host, strict=True):
                tensor.copy_(value)
        done: torch.futures.Future[list[Tensor]] = torch.futures.Future(devices=[torch.device(NAME, 0)])
        done.set_result(tensors)
        return _create_work_from_future(done)


def _on_host(tensor: Tensor) -> Tensor:
    if tensor.device.type != NAME:
        raise RuntimeError(f"{BACKEND} has no collectives for tensors on {tensor.device}")
    return tensor.cpu()


def register() -> None:
    """Makes the backend known to this process, as ``BACKEND``."""
    dist.Backend.register_backend(BACKEND, SecondDeviceGroup, devices=[NAME])
