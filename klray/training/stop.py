"""Requests to stop after a step: SIGTERM, a driver's word to its workers, a machine that is being taken away."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch

from klray.errors import StoppedError
from klray.parallel.mesh import Mesh

_LOOK_S = 1.0


class Request(IntEnum):
    """What a rank is asked for; the larger number wins."""

    NONE = 0
    MOVE = 1  # end this group of workers, the run goes on with another
    STOP = 2


class MovedError(StoppedError):
    """Granted to a group of workers; the run goes on with another one."""


@contextmanager
def on_sigterm(ask: Callable[[], None]) -> Iterator[None]:
    """Within it the first SIGTERM calls ``ask``; a second one does what it did before. For a process's main thread."""
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        ask()

    signal.signal(signal.SIGTERM, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopFile:
    """RUN_DIR/stop, by which a driver asks workers, who may be on other machines, to stop."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / "stop"
        self._next_look = 0.0
        self._asked = False

    def clear(self) -> None:
        """To be called before any worker looks."""
        self._file.write_text("")

    def ask(self) -> None:
        """From here on ``asked`` says so."""
        self._file.write_text("asked")

    def asked(self) -> bool:
        """Looked up once a second at most, by reading: a shared folder may know late that a file has come to be."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + _LOOK_S
            self._asked = self._file.exists() and self._file.read_text() != ""
        return self._asked


def agreed(mine: Request, mesh: Mesh, device: torch.device, *, reporting: bool) -> Request:
    """What all ranks do after the same step: at once where one trains alone, else where they report and the device is
    waited for anyway."""
    if mesh.size == 1 or not reporting:
        return mine if mesh.size == 1 else Request.NONE
    asked = torch.tensor([float(mine == request) for request in Request], device=device)
    return max(request for request, count in zip(Request, mesh.sum_over_all(asked).tolist(), strict=True) if count)
