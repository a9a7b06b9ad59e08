"""How long a training step should take on a data x basis mesh, and which mesh would be the fastest.

A model with six numbers. With B images a step, K terms in q passes through the network, P parameters, D x S ranks, of
which C compute at full speed beside each other, and images of n numbers:

    compute    (ceil(B / D) ceil(K / S) FLOPs / rate + fixed + (q - 1) again) x max(1, D S / C)
    gradients  latency + 2 (D S - 1) / (D S) 4 P / bandwidth        one ring all-reduce, not hidden behind compute
    basis      latency + 2 (S - 1) / S 4 n B / D / bandwidth         only where the loss couples the terms
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

import torch
from torch import nn

_CHANNELS, _SIZE, _IMAGES = 64, 16, 8


@dataclass(frozen=True)
class Machine:
    """One rank's rate in FLOPs/s, the ranks that reach it together, and the links between them."""

    rate: float
    full_speed: float
    fixed: float  # seconds a step whatever the batch: optimiser, averages, launches
    latency: float  # seconds a collective
    bandwidth: float  # bytes/s each rank
    again: float = 0.0  # seconds of each pass through the network after the first: what does not grow with the batch
    caution: str | None = None  # what was not measured


@dataclass(frozen=True)
class StepTime:
    """Seconds."""

    compute: float
    gradients: float
    basis: float

    @property
    def total(self) -> float:
        return self.compute + self.gradients + self.basis


@dataclass(frozen=True)
class StepWork:
    """One step of a configuration."""

    images: int
    terms: int
    flops_per_eval: float  # forward and backward, of one image and term
    parameters: int
    numbers: int  # of an image
    coupled: bool  # the joint loss sums over all terms
    passes: int = 1  # of one rank with all terms: the chunks


def step_time(work: StepWork, machine: Machine, data: int, basis: int) -> StepTime:
    """On data x basis ranks."""
    ranks = data * basis
    images = math.ceil(work.images / data)
    evals = images * math.ceil(work.terms / basis)
    crowd = max(1.0, ranks / machine.full_speed)
    passes = math.ceil(work.passes / basis)
    return StepTime(
        (evals * work.flops_per_eval / machine.rate + machine.fixed + (passes - 1) * machine.again) * crowd,
        _all_reduce(4 * work.parameters, ranks, machine),
        _all_reduce(4 * work.numbers * images, basis, machine) if work.coupled else 0.0,
    )


def meshes_by_time(work: StepWork, machine: Machine, ranks: int) -> list[tuple[int, int, StepTime]]:
    """Every (data, basis) of so many ranks that leaves none without images or terms, the fastest first."""
    fitting = [
        (ranks // basis, basis)
        for basis in range(1, ranks + 1)
        if ranks % basis == 0 and basis <= work.terms and work.images % (ranks // basis) == 0
    ]
    timed = [(data, basis, step_time(work, machine, data, basis)) for data, basis in fitting]
    return sorted(timed, key=lambda each: each[2].total)


def expected_lines(work: StepWork, machine: Machine, data: int, basis: int) -> list[str]:
    """What to expect of a mesh, in words, and which other one would be faster."""
    expected, ranks = step_time(work, machine, data, basis), data * basis
    parts = {"compute": expected.compute, "gradients": expected.gradients, "basis sums": expected.basis}
    shares = ", ".join(f"{name} {seconds / expected.total:.0%}" for name, seconds in parts.items() if seconds)
    lines = [f"step        about {expected.total:.3g} s, {work.images / expected.total:.3g} images/s ({shares})"]
    if machine.caution is not None:
        lines.append(f"            {machine.caution}")
    if ranks == 1:
        return lines
    efficiency = step_time(work, machine, 1, 1).total / ranks / expected.total
    lines.append(f"efficiency  about {efficiency:.0%} of {ranks} workers")
    best_data, best_basis, best = meshes_by_time(work, machine, ranks)[0]
    if best.total < 0.95 * expected.total:
        lines.append(f"faster      {best_data} (data) x {best_basis} (basis): about {best.total:.3g} s a step")
    elif basis == 1 and work.terms > 1:
        lines.append("basis axis  for networks whose terms do not fit into memory: it cuts activations, not seconds")
    return lines


def _all_reduce(size: float, ranks: int, machine: Machine) -> float:
    if ranks == 1:
        return 0.0
    return machine.latency + 2 * (ranks - 1) / ranks * size / machine.bandwidth


# CPU: fitted by benchmarks/scaling.py, a U-Net's FLOPs/s over those of the convolution that ``this_machine`` times, and
# gloo on one machine, whose bandwidth a small network left open. GPU: fitted to the steps of the cifar10 net on an H200
# (benchmarks/results/gpu_h200.jsonl: batch 128 and 16, whole and in chunks, within 8 %); its links are a guess, of
# NVLink's order of magnitude.
UNET_SHARE = {"cpu": 0.68, "cuda": 0.58}
CORES_SHARE = 0.9  # of a CPU's cores, those that compute as if they were alone
_LINKS = {"cpu": (0.025, 0.0056, 1e9), "cuda": (4.3e-3, 5e-5, 1e11)}  # fixed, latency, bandwidth
_AGAIN = {"cpu": 0.0, "cuda": 4.3e-3}


def this_machine() -> Machine:
    """With a rate from half a second of convolutions, on one thread a rank or on the GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = UNET_SHARE[device.type] * convolution_rate(device)
    full_speed = torch.cuda.device_count() if device.type == "cuda" else CORES_SHARE * (os.cpu_count() or 1)
    fixed, latency, bandwidth = _LINKS[device.type]
    caution = None
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        caution = "calibrated on one H200 with the cifar10 net in bf16; sums between GPUs are not calibrated"
        if "H200" not in card:
            caution = f"not calibrated for {card}: {caution}"
    return Machine(rate, full_speed, fixed, latency, bandwidth, _AGAIN[device.type], caution)


def convolution_rate(device: torch.device, seconds: float = 0.5) -> float:
    """FLOPs/s of a 3 x 3 convolution: on a CPU forward and backward on one thread; on a GPU forward in bf16, queued up
    as training queues its work."""
    if device.type == "cuda":
        return _queued_rate(device, seconds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        layer = nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1)
        x = torch.randn(_IMAGES, _CHANNELS, _SIZE, _SIZE, requires_grad=True)
        layer(x).sum().backward()
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            layer(x).sum().backward()
            count += 1
        elapsed = time.perf_counter() - began
    finally:
        torch.set_num_threads(threads)
    return count * 3 * 2 * 9 * _CHANNELS**2 * _IMAGES * _SIZE**2 / elapsed


@torch.no_grad()
def _queued_rate(device: torch.device, seconds: float) -> float:
    channels, images = 256, 128
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(device, torch.bfloat16)
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(images, channels, _SIZE, _SIZE, device=device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    layer(x)
    torch.cuda.synchronize(device)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(20):
            layer(x)
        torch.cuda.synchronize(device)
        count += 20
    return count * 2 * 9 * channels**2 * images * _SIZE**2 / (time.perf_counter() - began)
