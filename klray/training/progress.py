"""Progress lines and the closing summary of a run, made from its records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from klray.cli import duration
from klray.runs.records import history, read_records


class ProgressLines:
    """Prints a line for a training record, at most one in ``interval`` seconds, and one for each validation."""

    def __init__(self, show: Callable[[str], None], interval: float = 5.0) -> None:
        self.show, self.interval = show, interval
        self.shown_at = -interval
        self.start: tuple[float, float] | None = None  # wall clock and used budget at the first record

    def __call__(self, record: dict[str, Any]) -> None:
        if record["kind"] == "note":
            self.show(f"note: {record['text']}")
        if record["kind"] != "metrics":
            return
        values, now = record["values"], record["time_ms"] / 1000
        if "val/eps_mse" in values:
            self.show(f"  validation  eps_mse {values['val/eps_mse']:.5f}  loss {values['val/loss']:.5f}")
        if "train/loss" not in values:
            return
        used = values["budget_used"]
        if self.start is None:
            self.start = (now, used)
        if now - self.shown_at < self.interval and used < 1:
            return
        self.shown_at = now
        began, before = self.start
        left = duration((1 - used) * (now - began) / (used - before)) if used > before else "?"
        self.show(
            f"{min(used, 1):4.0%}  step {int(values['step']):,}  {values['images_seen'] / 1000:,.1f}k images  "
            f"{values['network_evals'] / 1000:,.1f}k evals  loss {values['train/loss']:.4f}  "
            f"{values['perf/images_per_s']:,.0f} images/s  data {values['perf/data_wait']:.1%}  "
            f"{values['perf/memory_gib']:.1f} GiB  left {left}"
        )


def summary(run_dir: Path) -> str:
    """What a finished run reached: one line, and where its last sample grid lies."""
    series = history(run_dir)
    reached = [
        f"{int(series['images_seen'][-1][1]):,} images",
        f"{int(series['network_evals'][-1][1]):,} network evals",
    ]
    reached.append(f"{duration(series['seconds'][-1][1])} of training")
    if "val/eps_mse" in series:
        reached.append(f"val/eps_mse {series['val/eps_mse'][-1][1]:.5f}")
    images = [record["path"] for record, _ in read_records(run_dir) if record["kind"] == "image"]
    lines = [" · ".join(reached)]
    if images:
        lines.append(f"samples     {run_dir / images[-1]}")
    lines.append(f"checkpoint  {run_dir}")
    return "\n".join(lines)
