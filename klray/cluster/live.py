"""The machines of a running cluster, as its control store knows them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from klray.cluster.connect import connect


@dataclass(frozen=True)
class Machine:
    """One that is alive: its address, what it lends, and the versions of Python, Ray, klray and torch on it."""

    address: str
    cpus: float
    gpus: float
    versions: tuple[str, ...]

    def texts(self) -> list[str]:
        return [self.address, f"{self.cpus:g}", f"{self.gpus:g}", *self.versions]


def wait_for_nodes(count: int, seconds: float) -> list[Machine]:
    """Those that are there once ``count`` are, or after so many seconds.

    ``ray up`` succeeds before its workers join, and where they never do; ``ray status`` may count dead ones.
    """
    connect()
    give_up = time.monotonic() + seconds
    while len(alive := [node for node in ray.nodes() if node["Alive"]]) < count and time.monotonic() < give_up:
        time.sleep(1)
    asked = [
        _versions.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in alive
    ]
    return [
        Machine(
            node["NodeManagerAddress"], node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0), ray.get(ref)
        )
        for node, ref in zip(alive, asked, strict=True)
    ]


@ray.remote(num_cpus=0)
def _versions() -> tuple[Any, ...]:
    import platform
    from importlib.metadata import version

    return platform.python_version(), *(version(package) for package in ("ray", "klray", "torch"))
