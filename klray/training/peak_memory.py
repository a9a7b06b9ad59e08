"""The most memory that each part of training takes."""

from __future__ import annotations

import resource

import torch

_GIB = 2**30


def take_peak(device: torch.device, part: str = "") -> dict[str, float]:
    """``perf/memory_gib`` of training, ``perf/memory_gib.PART`` of another part: the most that tensors held on a GPU
    since the last call. On the CPU the most that the process ever held, without parts: the system counts no others.
    """
    if device.type == "cpu":
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {} if part else {"perf/memory_gib": resident / _GIB}
    module = torch.get_device_module(device)
    peak = module.max_memory_allocated(device)
    module.reset_peak_memory_stats(device)
    return {f"perf/memory_gib.{part}" if part else "perf/memory_gib": peak / _GIB}
