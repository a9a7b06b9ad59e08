"""A study as it goes on: a line when a trial starts or ends, and a table of the running ones from time to time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from klray.cli import duration
from klray.study.space import Space

PATIENCE_S = 120.0  # before it is said that nothing is heard
ENDS = ("finished", "pruned", "failed")


class StudyProgress:
    """Called with (event, trial's number, result); shows lines, the table at most once in ``interval`` seconds."""

    def __init__(self, space: Space, show: Callable[[str], None], interval: float = 20.0) -> None:
        self.space, self.show, self.interval = space, show, interval
        self._running: dict[int, dict[str, Any]] = {}
        self._chosen: dict[int, Mapping[str, Any]] = {}
        self._ended = 0
        self._spent = 0.0  # budgets used by trials that ended since the start
        self._began = time.monotonic()
        self._shown_at = self._heard_at = self._began
        self._patience = PATIENCE_S

    def silent(self, cluster: Callable[[], str]) -> None:
        """Called all the time; a line where trials tell nothing for long, after twice as long the next.

        Args:
            cluster: what of it is free, in words.
        """
        quiet = time.monotonic() - self._heard_at
        if self._running and quiet >= self._patience:
            self._patience *= 2
            numbers = ", ".join(map(str, sorted(self._running)))
            self.show(f"  no look at trials {numbers} for {duration(quiet)}; {cluster()}")

    def __call__(self, event: str, number: int, result: Mapping[str, Any]) -> None:
        self._heard_at, self._patience = time.monotonic(), PATIENCE_S
        if event == "started":
            self._chosen[number] = result["chosen"]
            self._running[number] = {}
            again = ", again with other seeds" if result.get("repeat") else ""
            self.show(f"trial {number} starts: {self._setting(number)}{again}")
            return
        if event == "recovered":
            self.show(f"trial {number} goes on from its checkpoint: {result['error']}")
            return
        if event == "running":
            self._running[number] = dict(result)
        if event in ENDS:
            self._ended += 1
            self._spent += result.get("budget_percent", 0) / 100
            self._running.pop(number, None)
            self.show(f"trial {number} {event}: {self._value(result)}{self._setting(number)}{self._left()}")
        elif time.monotonic() - self._shown_at >= self.interval:
            self._shown_at = time.monotonic()
            for each, latest in sorted(self._running.items()):
                percent = latest.get("budget_percent", 0)
                self.show(f"  trial {each:<3} {percent:3d} %  {self._value(latest)}{self._setting(each)}")

    def _setting(self, number: int) -> str:
        chosen = self._chosen.get(number, {})
        parts = [
            f"{key.rpartition('.')[2]} {value:.3g}" if isinstance(value, float) else f"{key.rpartition('.')[2]} {value}"
            for key, value in chosen.items()
            if key in self.space.shown
        ]
        return ", ".join(parts)

    def _value(self, result: Mapping[str, Any]) -> str:
        if "error" in result:
            return f"{result['error']}  "
        values = [f"{o.metric} {result[o.metric]:.5g}" for o in self.space.objectives if o.metric in result]
        return f"{', '.join(values)}  " if values else ""

    def _left(self) -> str:
        """Time left, if later trials take as long as those that ended since the start."""
        missing = self.space.trials - max(self._chosen, default=0) - 1 + len(self._running)
        elapsed = time.monotonic() - self._began
        return f"  ({missing} to go, about {duration(elapsed / self._ended * missing)})" if missing > 0 else ""
