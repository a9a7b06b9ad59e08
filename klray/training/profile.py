"""Where a training step's time goes: a trace of some steps, and a table of their costliest kernels."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

TRACE, KERNELS = "trace.json.gz", "kernels.txt"
_MOST_ROWS = 50


class StepProfiler:
    """Traces ``steps``, counted from 0 where this process starts, with what comes between them (a validation), and
    writes FOLDER/trace.json.gz (for Perfetto or chrome://tracing) and FOLDER/kernels.txt.

    A context manager. Where the run ends within the range, the steps that there were are written; an error ends it
    without files. What a step's kernels are is seen also where they are replayed as one CUDA graph.

    Args:
        steps: first and last-but-one.
        device: on a GPU its kernels count, else the CPU's operators.
        say: shows a line to whoever watches.
        written: called with each file.
    """

    def __init__(
        self,
        steps: range,
        device: torch.device,
        folder: Path,
        say: Callable[[str], None],
        written: Callable[[Path], None],
    ) -> None:
        self.steps, self.device, self.folder = steps, device, folder
        self.say, self.written = say, written
        self.done = 0
        self.began = 0.0
        self.trace: profile | None = None

    @property
    def settles(self) -> bool:
        """Whether the device has to be waited for after the step that is being done: the range's time begins or ends
        there, and what was asked of it before belongs to the steps before."""
        return self.done + 1 in (self.steps.start, self.steps.stop)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around every step of the process."""
        if self.done == self.steps.start:
            self._start()
        if self.trace is None:
            yield
        else:
            with record_function(f"step {self.done}"):
                yield
        self.done += 1
        if self.done == self.steps.stop:
            self._finish()

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.trace is not None and error is None:
            self._finish()
        elif self.trace is not None:
            self.trace.stop()
        elif error is None and self.done <= self.steps.start:
            self.say(f"no profile: training ended after {self.done} steps, before step {self.steps.start}")

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        self.trace = profile(activities=activities)
        self.trace.start()
        self._settle()
        self.began = time.perf_counter()

    def _finish(self) -> None:
        assert self.trace is not None
        self._settle()
        seconds, trace, count = time.perf_counter() - self.began, self.trace, self.done - self.steps.start
        trace.stop()
        self.trace = None
        on_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if on_gpu else "the CPU"
        where = f"steps {self.steps.start} to {self.steps.start + count} on {name}"
        table = kernel_table(trace.events(), count, seconds, where, on_gpu=on_gpu)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(self.folder / TRACE))
            (self.folder / KERNELS).write_text(table)
        except OSError as error:
            self.say(f"no profile: {self.folder} cannot be written ({error.strerror}); training goes on")
            return
        self.say(f"the profile of {where} is in {self.folder}: {KERNELS}, {TRACE}")
        for file in (KERNELS, TRACE):
            self.written(self.folder / file)

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def kernel_table(events: Iterable[FunctionEvent], steps: int, seconds: float, where: str, *, on_gpu: bool) -> str:
    """The costliest kernels, the most first: of a GPU by their time there, else the CPU's operators by their own time.

    Args:
        events: of a profiler.
        steps, seconds: how many steps there were, and how long they took in all.
    """
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels = [event for event in events if event.device_type == kind and not event.is_user_annotation]
    total: dict[str, float] = defaultdict(float)  # microseconds
    calls: dict[str, int] = defaultdict(int)
    for event in kernels:
        total[event.name] += event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        calls[event.name] += 1
    everything = sum(total.values())
    head = f"{where}: {seconds / steps * 1e3:.3f} ms of wall time a step, {everything / steps / 1e3:.3f} ms in these"
    if on_gpu:
        head += f"; the GPU was busy {_covered(kernels) / (seconds * 1e6):.1%} of the time"
    lines = [head, "", " share  ms a step  calls a step  name"]
    costliest = sorted(total, key=lambda name: -total[name])
    for name in costliest[:_MOST_ROWS]:
        each = total[name] / steps / 1e3
        lines.append(f"{total[name] / max(everything, 1e-9):6.1%}  {each:9.3f}  {calls[name] / steps:12.1f}  {name}")
    rest = costliest[_MOST_ROWS:]
    if rest:
        each, often = sum(total[name] for name in rest) / steps / 1e3, sum(calls[name] for name in rest) / steps
        lines.append(f"{each * steps * 1e3 / everything:6.1%}  {each:9.3f}  {often:12.1f}  {len(rest)} others")
    return "\n".join(lines) + "\n"


def _covered(kernels: Iterable[FunctionEvent]) -> float:
    """Microseconds in which at least one of them ran: those of several streams overlap."""
    covered, until = 0.0, float("-inf")
    for begin, end in sorted((event.time_range.start, event.time_range.end) for event in kernels):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered
