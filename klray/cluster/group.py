"""The process group of Ray workers that train or sample together."""

from __future__ import annotations

import socket
from datetime import timedelta

import ray
import torch
import torch.distributed as dist
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

_TIMEOUT = timedelta(seconds=600)

Address = tuple[str, int]


class _NoGroup(Backend):
    share_cuda_visible_devices = True  # NCCL's ranks on one machine must see each other's GPUs


class JoinedByWorkers(TorchConfig):
    """Ray Train leaves the process group to its workers: its own store would listen on every address of a machine."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _NoGroup


def open_store(size: int) -> tuple[dist.TCPStore, Address]:
    """The store through which ``size`` processes meet, on the address by which the cluster knows this machine."""
    host = ray.util.get_node_ip_address()
    listening = socket.create_server((host, 0), backlog=max(128, size))
    port = listening.getsockname()[1]
    # PyTorch would listen on all addresses; the socket is its own from here on.
    store = dist.TCPStore(host, port, size, True, _TIMEOUT, wait_for_workers=False, master_listen_fd=listening.detach())
    return store, (host, port)


def join_group(rank: int, size: int, device: torch.device, store: dist.TCPStore | Address, backend: str) -> None:
    """Makes torch.distributed's default process group; each of ``size`` ranks calls it.

    Args:
        store: rank 0's own, or its address.
        backend: ``nccl`` or ``gloo``.
    """
    dist.init_process_group(
        backend,
        store=store if isinstance(store, dist.TCPStore) else dist.TCPStore(*store, size, False, _TIMEOUT),
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
        device_id=device if backend == "nccl" else None,
    )
