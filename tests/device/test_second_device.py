"""The second device is to others as a GPU is. Where there is one, it is asked the same."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from klray.core.schedule import VPLinear
from tests.device.second_device import NAME, Counting, Memory

KINDS = [NAME, *(["cuda"] if torch.cuda.is_available() else [])]


class Both:
    """Tensors on the device, and the CPU's beside them."""

    def __init__(self, device: torch.device) -> None:
        self.host = torch.arange(1.0, 7.0).view(2, 3)
        self.there = self.host.to(device)
        self.host_number, self.number = torch.tensor(2.0), torch.tensor(2.0, device=device)
        self.host_places = torch.tensor([1, 0])
        self.places, self.integers = self.host_places.to(device), torch.ones(2, 2, dtype=torch.long, device=device)
        self.mask = self.there > 2
        self.image = torch.ones(1, 2, 4, 4, device=device)
        self.kernel = torch.ones(2, 2, 3, 3, device=device)
        self.pinned = self.host.pin_memory()


REFUSED: dict[str, Callable[[Both], object]] = {
    "a sum with the CPU's": lambda x: x.there + x.host,
    "a sum into the CPU's": lambda x: x.host.add_(x.there),
    "a sum into the CPU's number": lambda x: x.host_number.add_(x.number),
    "a product of matrices": lambda x: x.there @ x.host.T,
    "a layer on the CPU": lambda x: nn.functional.linear(x.there, x.host),
    "a choice of the CPU's": lambda x: torch.where(x.mask, x.there, x.host),
    "the CPU's number in a list": lambda x: torch.stack([x.number, x.host_number]),
    "the CPU's by indices on the device": lambda x: x.host[x.places],
    "the CPU's by a mask on the device": lambda x: x.host[x.mask],
    "the CPU's number as a bound": lambda x: x.there.clamp(min=x.host_number),
    "rows chosen by the CPU's indices": lambda x: torch.index_select(x.there, 0, x.host_places),
    "a search in the CPU's": lambda x: torch.searchsorted(x.host[0], x.there),
    "rows of the CPU's put in": lambda x: x.there.index_put_((x.places,), x.host),
    "several averages of the CPU's": lambda x: torch._foreach_lerp_([x.there], [x.host], 0.5),
    "NumPy": lambda x: x.there.numpy(),
    "a product of integers": lambda x: x.integers @ x.integers,
    "a convolution of two types": lambda x: torch.conv2d(x.image, x.kernel.bfloat16()),
}
FREE: dict[str, Callable[[Both], object]] = {
    "arithmetic": lambda x: x.there * 2 + x.there,
    "the CPU's number in arithmetic": lambda x: x.host_number * x.there - x.there / x.host_number,
    "the CPU's number filled in": lambda x: x.there.fill_(x.host_number),
    "the CPU's number in place of some": lambda x: x.there.masked_fill_(x.mask, x.host_number),
    "several by a number": lambda x: torch._foreach_mul_([x.there], x.number),
    "new tensors": lambda x: [torch.arange(5, device=x.there.device), torch.full_like(x.there, 3.0)],
    "indices on the device": lambda x: x.there[x.places],
    "a slice written to": lambda x: x.there[:1].copy_(x.there[1:]),
    "pinned memory, if asked not to wait": lambda x: x.there.copy_(x.pinned, non_blocking=True),
    "to pinned memory, if asked not to wait": lambda x: x.pinned.copy_(x.there, non_blocking=True),
    "a convolution": lambda x: torch.conv2d(x.image, x.kernel),
}
WAITS: dict[str, Callable[[Both], object]] = {
    "a value": lambda x: x.number.item(),
    "a decision": lambda x: bool((x.there > 0).all()),
    "a copy to the CPU": lambda x: x.there.cpu(),
    "a copy into the CPU's": lambda x: x.host.copy_(x.there),
    "a list": lambda x: x.there.tolist(),
    "equality": lambda x: torch.equal(x.there, x.there),
    "where a mask is set": lambda x: x.mask.nonzero(),
    "what a mask chooses": lambda x: x.there[x.mask],
    "what is put where a mask is set": lambda x: x.there.index_put_((x.mask,), x.number),
    "one place by a number on the device": lambda x: x.there[x.places[0]],
    "a copy of the CPU's": lambda x: x.there.copy_(x.host),
    "a copy of the CPU's, asked not to wait": lambda x: x.there.copy_(x.host, non_blocking=True),
    "a new tensor of Python's numbers": lambda x: torch.tensor([1.0, 2.0], device=x.there.device),
    "the CPU's indices": lambda x: x.there[x.host_places],
}


@pytest.fixture(params=KINDS)
def both(request: pytest.FixtureRequest, device: torch.device) -> Both:
    return Both(device if request.param == NAME else torch.device(request.param, 0))


@pytest.mark.parametrize("case", REFUSED)
def test_it_refuses_what_a_gpu_refuses(case: str, both: Both) -> None:
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
        REFUSED[case](both)


@pytest.mark.parametrize("case", FREE)
def test_the_host_waits_for_nothing_that_a_gpu_does_alone(case: str, both: Both) -> None:
    assert not waits(FREE[case], both)


@pytest.mark.parametrize("case", WAITS)
def test_the_host_waits_where_it_does_for_a_gpu(case: str, both: Both) -> None:
    if case == "equality" and both.there.device.type == "cuda":
        pytest.skip("CUDA's debug mode does not tell of this wait")
    assert waits(WAITS[case], both)


def waits(what: Callable[[Both], object], both: Both) -> bool:
    if both.there.device.type == NAME:
        with Counting() as counts:
            what(both)
        return counts.reads + counts.uploads > 0
    what(both)  # the first use of a kernel waits for its loading
    torch.cuda.set_sync_debug_mode("error")
    try:
        what(both)
    except RuntimeError as error:
        assert "synchroniz" in str(error)
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def test_reads_uploads_and_kernels_are_told_apart_with_klrays_lines(device: torch.device) -> None:
    x, t = torch.zeros(3), torch.full((), 0.5, dtype=torch.float64, device=device)
    with Counting() as counts:
        y = (x.to(device) + 1)[1:].view(2, 1)  # views are no kernels
        y.cpu()
        VPLinear().alpha(t)
    assert (counts.reads, counts.uploads) == (1, 1)
    lines = {line for kind, op, line in counts.lines if kind == "launch" and op == "aten::exp"}
    assert len(lines) == 1 and lines.pop().startswith("klray/core/schedule.py:")
    assert counts.lines["launch", "aten::add", "no line of klray"] == 1
    with Counting() as more:
        y.sum().item()
        y.sum().item()
    assert more.beyond(Counting(), 2, "read") == {"read aten::item no line of klray": 1.0}


def test_it_counts_the_bytes_that_tensors_hold(device: torch.device) -> None:
    before = Memory.now()
    Memory.take_peak()
    x = torch.zeros(1000, device=device)
    view = x[10:]
    assert Memory.now() - before == 4000
    y = x + 1
    del y
    assert (Memory.now() - before, Memory.take_peak() - before) == (4000, 8000)
    del x, view
    assert Memory.now() == before


def test_what_was_never_written_is_not_a_number(device: torch.device) -> None:
    assert bool(torch.empty(5, device=device).isnan().all())


def test_a_network_learns_as_on_the_cpu(device: torch.device) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 1)
    reference, images = nn.Sequential(*layers), torch.randn(3, 2, 4, 4)
    network = copy.deepcopy(reference).to(device)
    twin = copy.deepcopy(network)
    found, wanted = (steps(each, images) for each in (network, reference))
    torch.testing.assert_close(found, wanted)
    assert torch.equal(steps(twin, images), found)


def steps(network: nn.Sequential, images: Tensor) -> Tensor:
    """The weights after three of them."""
    images = images.to(next(network.parameters()).device)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    for _ in range(3):
        network(images).square().mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten().cpu() for p in network.parameters()])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_and_loss_scaling_work(low: torch.dtype, device: torch.device) -> None:
    network = nn.Conv2d(2, 4, 3).to(device)
    optimizer, scaler = torch.optim.AdamW(network.parameters(), fused=True), torch.amp.GradScaler(NAME)
    with torch.autocast(NAME, dtype=low):
        out = network(torch.ones(1, 2, 4, 4, device=device))
        assert (out.dtype, out.softmax(1).dtype) == (low, torch.float32)
    with Counting() as counts:
        scaler.scale(out.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert counts.reads == 0
    assert network.weight.dtype == torch.float32
