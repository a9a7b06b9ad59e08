"""On one machine nothing listens but on loopback: neither Ray, nor the workers' process group, nor the dashboard."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from klray.config import override
from klray.data.sources import load_images
from klray.runs.records import history
from klray.training.job import SharedImages, run_on_ray

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

SETTINGS: dict[str, Any] = {
    "preset": "doors",
    "process": {"num_terms": 2},
    "network": {"kind": "mlp", "width": 32},
    "optimizer": {"batch_size": 8},
    "budget": {"unit": "steps", "amount": 1500},
    "tracking": {"every_steps": 10, "uri": "off"},
}


def listening() -> dict[str, str]:
    """Addresses on which this process and all that it started listen, and who does."""
    mine = {process.pid for process in psutil.Process().children(recursive=True)} | {psutil.Process().pid}
    found = {}
    for connection in psutil.net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN and connection.pid in mine:
            found[f"{connection.laddr.ip}:{connection.laddr.port}"] = psutil.Process(connection.pid).name()
    return found


def test_a_run_of_two_workers_listens_on_loopback_only(tmp_path: Path) -> None:
    config = override(SETTINGS, ())
    images = SharedImages.of(load_images("digits", image_size=8))
    arguments = {"mesh_shape": (2, 1), "run_dir": tmp_path, "provenance": {}}
    run = threading.Thread(target=lambda: run_on_ray(config, images, **arguments), daemon=True)
    run.start()
    seen: dict[str, str] = {}
    while run.is_alive():
        seen |= listening()
        run.join(0.5)
    assert history(tmp_path)["perf/workers"][-1][1] == 2
    owners = set(seen.values())
    assert {"raylet", "gcs_server"} <= owners and any("RayTrainWorker" in owner for owner in owners), owners
    loopback = ("127.", "::1", "::ffff:127.")
    outside = {address: owner for address, owner in seen.items() if not address.startswith(loopback)}
    assert outside == {}
