"""The most memory that each part of training takes."""

from __future__ import annotations

import resource

import torch

_GIB = 2**30


class PeakMemory:
    """The most bytes that tensors held on a GPU in each part of training, of all the times that this process did it.

    Of all, as a step that is replayed as a CUDA graph asks for no memory: only its first runs tell what it takes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._peaks: dict[str, int] = {}

    def take(self, part: str = "") -> dict[str, float]:
        """What was done since the last call was ``part``: ``perf/memory_gib`` of training, ``perf/memory_gib.PART`` of
        another. On the CPU the most that the process ever held, without parts: the system counts no others."""
        if self.device.type == "cpu":
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return {} if part else {"perf/memory_gib": resident / _GIB}
        module = torch.get_device_module(self.device)
        self._peaks[part] = max(self._peaks.get(part, 0), module.max_memory_allocated(self.device))
        module.reset_peak_memory_stats(self.device)
        return {f"perf/memory_gib.{part}" if part else "perf/memory_gib": self._peaks[part] / _GIB}
