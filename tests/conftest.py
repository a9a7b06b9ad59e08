"""One thread for every test; on a machine that must have everything, a skipped test is a failed one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def data_root() -> Callable[[str], Path]:
    """The folder that KLRAY_DATA names, asked for by a file in it; skips where that is absent."""

    def find(needed: str) -> Path:
        root = os.environ.get("KLRAY_DATA")
        if not root or not (Path(root) / needed).exists():
            pytest.skip(f"KLRAY_DATA={root} holds no {needed}")
        return Path(root)

    return find


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray cluster for all tests that ask for it, in this process."""
    os.environ["RAY_TMPDIR"] = "/tmp"
    import ray

    from klray.cluster.connect import connect

    connect()
    yield
    ray.shutdown()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on Ray's cluster come last, so that it does not idle beside others."""
    items.sort(key=lambda item: "ray_cluster" in getattr(item, "fixturenames", ()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """KLRAY_REQUIRE_SYSTEM=1: nothing may be skipped."""
    report: pytest.TestReport = yield
    if os.environ.get("KLRAY_REQUIRE_SYSTEM") == "1" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: KLRAY_REQUIRE_SYSTEM=1 allows no skipped test. {reason}"
    return report
