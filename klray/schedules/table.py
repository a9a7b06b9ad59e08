"""The table of a model's learned schedules against the grids they had to beat."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from klray.cli import columns
from klray.core.timesteps import TIMESTEPS
from klray.schedules.store import StoredSchedule

LD3 = "ld3"


def rows_of(schedules: Sequence[StoredSchedule]) -> list[dict[str, Any]]:
    """solver, nfe, the validation loss on every grid, the best of the fixed ones, and LD3's loss over that one's."""
    rows = []
    for each in sorted(schedules, key=lambda each: (each.solver, sorted(each.options.items()), each.nfe)):
        losses = {name: baseline["loss"] for name, baseline in each.baselines.items()}
        best = best_fixed(each)
        options = "".join(f",{key}={value}" for key, value in each.options.items())
        ratio = each.validation_loss / losses[best] if losses[best] > 0 else 1.0
        row = {"solver": each.solver + options, "nfe": each.nfe, **losses, LD3: each.validation_loss}
        rows.append({**row, "best_fixed": best, "ld3_over_best": ratio})
    return rows


def best_fixed(schedule: StoredSchedule) -> str:
    """The fixed grid with the least validation loss."""
    losses = {name: baseline["loss"] for name, baseline in schedule.baselines.items()}
    return min([name for name in losses if name in TIMESTEPS] or losses, key=lambda name: losses[name])


def text_of(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in columns; a grid that has no loss is -."""
    names = _columns(rows)
    return columns([names, *([_cell(row.get(name)) for name in names] for row in rows)])


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The rows with every digit."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, _columns(rows))
        table.writeheader()
        table.writerows(rows)


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Those of every row, results behind all grids."""
    found = list(dict.fromkeys(column for row in rows for column in row))
    last = [LD3, "best_fixed", "ld3_over_best"]
    return sorted(found, key=lambda column: last.index(column) if column in last else -1)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
