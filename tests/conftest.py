"""Settings of every test run: one thread, and no silent skips where the system parts are required."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> object:
    """Under KLRAY_REQUIRE_SYSTEM=1 a skipped test is a failure."""
    report = yield
    if report.skipped and os.environ.get("KLRAY_REQUIRE_SYSTEM") == "1" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but KLRAY_REQUIRE_SYSTEM=1 requires it: {report.longrepr}"
    return report


@pytest.fixture
def data_root() -> Callable[[str], Path]:
    """The folder KLRAY_DATA names; skips where it or the file asked for is absent."""

    def find(needed: str) -> Path:
        root = os.environ.get("KLRAY_DATA")
        if not root or not (Path(root) / needed).exists():
            pytest.skip(f"KLRAY_DATA={root} holds no {needed}")
        return Path(root)

    return find
