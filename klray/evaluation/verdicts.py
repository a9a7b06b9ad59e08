"""Learned grids against fixed ones by the quality of their images: who is ahead, and whether it can be told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

LEARNED = "learned"
LEVEL = 0.05  # of the two-sided test


def solver_of(row: Mapping[str, Any]) -> str:
    """The solver's name with what else tells its rows apart: options, noise that is kept, a precision asked for."""
    kept = {key: row[key] for key in ("final", "amp") if row.get(key) not in (None, "denoise")}
    return row["solver"] + "".join(
        f",{key}={value}" for key, value in sorted({**row.get("options", {}), **kept}.items())
    )


def quality_rows(measured: Sequence[Mapping[str, Any]], score: str, repeats: int) -> list[dict[str, Any]]:
    """One row for each solver and NFE: the score of every grid with its deviation over blocks of seeds, and a verdict.

    The verdict holds the learned grid against the best of the others that need no learning of times, by Welch's t-test
    over the blocks: ``ahead``, ``behind`` or ``not separable``; with one block, whose spread is unknown, the last.

    Args:
        measured: with ``solver``, ``timesteps``, ``nfe``, ``options``, the score (less is better) and ``<score>_sd``.
        repeats: blocks behind each score.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for each in measured:
        key = (solver_of(each), each["nfe"])
        row = rows.setdefault(key, {"solver": key[0], "nfe": key[1]})
        row[each["timesteps"]] = each[score]
        if f"{score}_sd" in each:
            row[f"{each['timesteps']}_sd"] = each[f"{score}_sd"]
    for row in rows.values():
        grids = [name for name in row if name not in ("solver", "nfe", LEARNED) and not name.endswith("_sd")]
        if LEARNED not in row or not grids:
            continue
        best = min(grids, key=lambda name: row[name])
        row |= {"best_other": best, "verdict": _verdict(row, best, repeats)}
    return [rows[key] for key in sorted(rows)]


def _verdict(row: Mapping[str, Any], other: str, repeats: int) -> str:
    from scipy.stats import ttest_ind_from_stats

    if repeats < 2:
        return "not separable"
    blocks = [(row[name], row[f"{name}_sd"], repeats) for name in (LEARNED, other)]
    if row[LEARNED] == row[other]:
        return "not separable"
    p = float(ttest_ind_from_stats(*blocks[0], *blocks[1], equal_var=False).pvalue)
    if math.isnan(p) or p >= LEVEL:  # nan: where no deviation is known
        return "not separable"
    return "ahead" if row[LEARNED] < row[other] else "behind"


def quality_lines(rows: Sequence[Mapping[str, Any]], factor: float = 1000.0) -> list[list[str]]:
    """The rows as lines of texts, the header first; scores times ``factor``, with their deviations."""
    grids = list(dict.fromkeys(name for row in rows for name in row if f"{name}_sd" in row or name == LEARNED))
    grids = [*(name for name in grids if name != LEARNED), LEARNED]
    ends = ("best_other", "verdict")
    lines = [["solver", "nfe", *grids, *ends]]
    for row in rows:
        texts = []
        for name in grids:
            deviation = f" ± {factor * row[f'{name}_sd']:.2g}" if f"{name}_sd" in row else ""
            texts.append(f"{factor * row[name]:.3g}{deviation}" if name in row else "-")
        lines.append([row["solver"], str(row["nfe"]), *texts, *(str(row.get(end, "-")) for end in ends)])
    return lines
