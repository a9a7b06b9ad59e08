"""The second device, for the tests of this folder."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

# Whatever defines operators of klray, before they are taken.
import klray.networks.dropout
import klray.networks.fused
import klray.parallel.random  # noqa: F401
from tests.device.second_device import BuildError, NoCompilerError, second_device, take_klrays_operators

# Here and not in the fixture: autograd counts the devices of a process once, at its first backward pass, which may be
# another folder's test.
with suppress(BuildError, NoCompilerError):
    second_device()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Skips where there is no compiler to build it with."""
    try:
        built = second_device()
    except NoCompilerError as error:
        pytest.skip(str(error))
    take_klrays_operators()
    return built
