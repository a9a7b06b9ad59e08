"""A comparison as it goes on: a line when a run ends, and lines of the running ones from time to time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from klray.cli import duration


class ComparisonProgress:
    """Called with (run's name, what became of it, its latest metrics); ``planned`` counts the runs known so far."""

    def __init__(self, planned: int, show: Callable[[str], None], interval: float = 20.0) -> None:
        self.planned, self.show, self.interval = planned, show, interval
        self.ended = 0  # here, not by an earlier command
        self._latest: dict[str, Mapping[str, float]] = {}
        self._began = self._shown_at = time.monotonic()

    def __call__(self, name: str, state: str, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        if state == "running":
            self._latest[name] = metrics
            if now - self._shown_at >= self.interval:
                self._shown_at = now
                for each, latest in self._latest.items():
                    self.show(f"  {each}  {latest['budget_percent']:.0f} %  {_error(latest)}")
            return
        self.ended += 1
        last = self._latest.pop(name, {})
        left = self.planned - self.ended
        hint = f"  ({left} to go, about {duration((now - self._began) / self.ended * left)})" if left > 0 else ""
        self.show(f"{name} {state}  {_error(last)}{hint}")


def _error(metrics: Mapping[str, float]) -> str:
    return f"val/eps_mse {metrics['val/eps_mse']:.5g}" if "val/eps_mse" in metrics else ""
