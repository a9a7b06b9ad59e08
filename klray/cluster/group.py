"""The process group of Ray workers that train or sample together."""

from __future__ import annotations

import signal
import socket
import threading
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.train.v2._internal.execution.context import get_train_context

_TIMEOUT = timedelta(seconds=600)

Address = tuple[str, int]


_terminated = threading.Event()  # this worker's process got SIGTERM


class _NoGroup(Backend):
    share_cuda_visible_devices = True  # NCCL's ranks on one machine must see each other's GPUs

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Here and not by the workers, as only the main thread of a process may take its signals."""
        worker_group.execute(_take_sigterm)


def _take_sigterm() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: _terminated.set())


def taken_away() -> bool:
    """Whether this worker is about to go: it got SIGTERM, or a node of its group is being drained.

    Ray's public ``ray.train.get_preemption_info`` is a barrier of all workers, too dear to be asked at every step.
    """
    return _terminated.is_set() or get_train_context().preemption_context.preemption_info is not None


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
