"""Connecting to Ray: the cluster that RAY_ADDRESS names, or a private one on this machine."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

import yaml

# Set before ray is imported; each can be overridden from outside.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how often the controller looks at its workers; 2 s delays each report
    # How long places are waited for before they are counted again: a machine that died is missing by then.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # a machine may be gone 30 s after its notice
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # of CSV, JSON and TensorBoard: a run keeps its own records
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own tables; a study shows its own
    "RAY_worker_niceness": "0",  # at the default of 15 any other process starves training, whose seconds are measured
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def connect() -> None:
    """Connects once; later calls do nothing. A private cluster listens on loopback only.

    Its dashboard is needed: Ray's own helpers ask it which processes are alive.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import ray
    from ray._private import ray_constants

    if ray.is_initialized():
        return
    runtime_env: dict[str, Any] = {
        "env_vars": {key: os.environ[key] for key in _ENVIRONMENT},
        "worker_process_setup_hook": f"{__name__}.{name_own_cluster.__name__}",
    }
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env=runtime_env, log_to_driver=False)
        return
    logging.getLogger("ray").setLevel(logging.WARNING)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it tells that token auth is on
    ray_constants.ENABLE_RAY_CLUSTER = False  # as on macOS and Windows: this machine is then 127.0.0.1 to Ray
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    runtime_env["env_vars"] |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), loopback)
    ray.init(
        address="local",
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        runtime_env=runtime_env,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )


def name_own_cluster() -> None:
    """Called in every process that Ray starts, so that what looks for a cluster there finds its own.

    Ray's helpers would else look through the machine's processes, and die where another Ray runs beside this one.
    """
    import ray

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def cluster_size() -> tuple[int, int]:
    """(CPUs, GPUs) of the connected cluster, with the machines that its autoscaler may still bring."""
    there, may_be = _resources(), _may_be()
    return max(there[0], may_be[0]), max(there[1], may_be[1])


def may_grow() -> bool:
    """Whether machines may still come."""
    return cluster_size() != _resources()


def _may_be() -> tuple[int, int]:
    """(CPUs, GPUs) of all machines that ``ray up`` may start; Ray tells it nowhere but in the file on the head."""
    import ray

    file = Path("~/ray_bootstrap_config.yaml").expanduser()
    if ray.util.get_node_ip_address().startswith("127.") or not file.exists():
        return 0, 0
    config = yaml.safe_load(file.read_text())
    cpus = gpus = 0
    for name, kind in config["available_node_types"].items():
        count = 1 if name == config["head_node_type"] else min(kind["max_workers"], config["max_workers"])
        cpus += count * kind["resources"].get("CPU", 0)
        gpus += count * kind["resources"].get("GPU", 0)
    return cpus, gpus


def _resources() -> tuple[int, int]:
    """(CPUs, GPUs) that are there."""
    import ray

    resources = ray.cluster_resources()
    return int(resources.get("CPU", 0)), int(resources.get("GPU", 0))


def free_in_words() -> str:
    """What of the cluster is free: 1 of 4 CPUs, 0 of 2 GPUs are free."""
    import ray

    free, whole = ray.available_resources(), ray.cluster_resources()
    parts = [f"{free.get(name, 0):g} of {whole[name]:g} {name}s" for name in ("CPU", "GPU") if whole.get(name)]
    return f"{', '.join(parts)} are free"


def cpu_share(workers: int) -> float:
    """The most CPUs that each of so many workers can have, none of them on two nodes; a part where CPUs are fewer.

    In a cluster with GPUs only its machines with GPUs count; one CPU while none of them is there yet.
    """
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if cluster_size()[1]:
        alive = [resources for resources in alive if resources.get("GPU")] or [{"CPU": workers}]
    nodes = [int(resources.get("CPU", 0)) for resources in alive]
    for share in range(max(nodes), 0, -1):
        if sum(cpus // share for cpus in nodes) >= workers:
            return share
    return int(1000 * sum(nodes) / workers) / 1000


def default_workers() -> int:
    """One worker for each GPU that is there, of the cluster that RAY_ADDRESS names or of this machine; at least one."""
    if os.environ.get("RAY_ADDRESS"):
        connect()
        return max(1, _resources()[1])
    import torch

    return max(1, torch.cuda.device_count())
