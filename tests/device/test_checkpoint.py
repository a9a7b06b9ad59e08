"""A checkpoint's copy of the state on the second device: what it holds; the disk's thread leaves the device alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from klray.build import build_network
from klray.runs.checkpoint import load_latest, restore
from klray.runs.checkpoint_writer import CheckpointWriter
from klray.runs.state_copy import StateCopy
from klray.runs.train_state import TrainState, ema_network, new_state
from tests.device.runs import shrunk
from tests.device.second_device import Counting

CONFIG = shrunk("cifar10")


def state_on(device: torch.device) -> TrainState:
    """One whose optimiser has moments."""
    state = new_state(CONFIG, build_network(CONFIG), device)
    for parameter in state.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    state.ema.update()
    return state


def values(state: TrainState) -> list[torch.Tensor]:
    """All that training changes."""
    weights = list(state.network.parameters())
    moments = [tensor for weight in weights for _, tensor in sorted(state.optimizer.state[weight].items())]
    return [*weights, *ema_network(state).parameters(), *moments, state.nonfinite]


def test_the_disks_thread_asks_nothing_of_the_device(tmp_path: Path, device: torch.device) -> None:
    copied, state = StateCopy(), state_on(device)
    copied.take(state)
    with Counting() as counts, CheckpointWriter(tmp_path, CONFIG) as writer:
        writer._copy = copied
        writer._write({})
    assert counts.lines == {}


def test_a_copy_is_read_once_a_tensor(device: torch.device) -> None:
    """Each costs one copy to the host; a layout that differs from the host's does not cost two."""
    copied, state = StateCopy(), state_on(device)
    with Counting() as first:
        copied.take(state)
    with Counting() as again:
        copied.take(state)
    held = len(copied.tensors) + len(dict(copied.network.named_parameters())) - 1  # the count of averages is the host's
    assert first.reads == again.reads <= held


def test_what_is_written_is_the_state_at_its_step(tmp_path: Path, device: torch.device) -> None:
    """Though the state is overwritten at once; and a second checkpoint from the same memory holds the second state."""
    for number in (1, 2):
        state = state_on(device)
        with torch.no_grad():
            for tensor in values(state):
                tensor.mul_(number)
        wanted = [tensor.detach().cpu().clone() for tensor in values(state)]
        with CheckpointWriter(tmp_path / str(number), CONFIG) as writer:
            writer.save(state_on(device), {})  # fills the memory first
            state.progress.images_seen = 64
            writer.save(state, {})
            with torch.no_grad():
                for tensor in values(state):
                    tensor.zero_()
        resumed, latest = state_on(device), load_latest(tmp_path / str(number), pytest.fail)
        assert latest is not None
        restore(latest, resumed)
        assert all(torch.equal(found.cpu(), want) for found, want in zip(values(resumed), wanted, strict=True))
