"""One thread for every test; on a machine that must have everything, a skipped test is a failed one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def data_root() -> Path:
    """The folder that KLRAY_DATA names; skips where there is none."""
    root = os.environ.get("KLRAY_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip(f"KLRAY_DATA={root} is no folder")
    return Path(root)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """KLRAY_REQUIRE_SYSTEM=1: nothing may be skipped."""
    report: pytest.TestReport = yield
    if os.environ.get("KLRAY_REQUIRE_SYSTEM") == "1" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: KLRAY_REQUIRE_SYSTEM=1 allows no skipped test. {reason}"
    return report
