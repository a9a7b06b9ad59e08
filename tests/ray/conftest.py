"""One Ray cluster for all tests in this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    os.environ["RAY_TMPDIR"] = "/tmp"
    import ray

    from klray.cluster.connect import connect

    connect()
    yield
    ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/ray" in str(item.path):
            item.add_marker(pytest.mark.slow)
