"""Verdicts on learned grids: the test behind them, and what is said where it cannot tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_ind

from klray.evaluation.verdicts import quality_lines, quality_rows


def measured(timesteps: str, kid: float, sd: float | None = None, **changes: Any) -> dict[str, Any]:
    row = {"solver": "ddim", "timesteps": timesteps, "nfe": 4, "options": {}, "kid": kid, "fid": 1.0}
    return {**row, **({} if sd is None else {"kid_sd": sd}), **changes}


def verdict(learned: tuple[float, float], best: tuple[float, float], repeats: int = 3) -> str:
    cells = [measured("learned", *learned), measured("edm", *best), measured("logsnr", 9.0, 0.1)]
    (row,) = quality_rows(cells, "kid", repeats)
    assert row["best_other"] == "edm"
    return str(row["verdict"])


def test_the_verdict_is_welchs_test_over_blocks() -> None:
    generator = np.random.default_rng(0)
    seen = set()
    for shift in (-3.0, -1.0, 0.0, 1.0, 3.0):
        for _ in range(10):
            ours, theirs = generator.normal(shift, 1.0, 4), generator.normal(0.0, 0.5, 4)
            p = ttest_ind(ours, theirs, equal_var=False).pvalue
            expected = "not separable" if p >= 0.05 else "ahead" if ours.mean() < theirs.mean() else "behind"
            blocks = [(float(each.mean()), float(each.std(ddof=1))) for each in (ours, theirs)]
            assert verdict(blocks[0], blocks[1], 4) == expected
            seen.add(expected)
    assert seen == {"ahead", "behind", "not separable"}


def test_one_block_or_one_grid_tell_nothing() -> None:
    assert verdict((1.0, 0.0), (5.0, 0.0), repeats=1) == "not separable"
    assert verdict((1.0, 0.0), (1.0, 0.0)) == "not separable"
    assert verdict((1.0, 0.0), (5.0, 0.0)) == "ahead"
    (row,) = quality_rows([measured("learned", 1.0)], "kid", 3)
    assert "verdict" not in row


def test_a_row_for_each_solver_with_its_options_and_nfe() -> None:
    cells = [measured(grid, 0.1, 0.01, nfe=nfe) for nfe in (6, 4) for grid in ("edm", "learned")]
    cells.append(measured("learned", 0.05, options={"variant": "bh2"}, solver="unipc_3"))
    rows = quality_rows(cells, "kid", 3)
    assert [(row["solver"], row["nfe"]) for row in rows] == [("ddim", 4), ("ddim", 6), ("unipc_3,variant=bh2", 4)]
    lines = quality_lines(rows)
    assert lines[0] == ["solver", "nfe", "edm", "learned", "best_other", "verdict"]
    assert lines[1] == ["ddim", "4", "100 ± 10", "100 ± 10", "edm", "not separable"]
    assert lines[3] == ["unipc_3,variant=bh2", "4", "-", "50", "-", "-"]


@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_scores_are_shown_times_a_factor(factor: float) -> None:
    (_, line) = quality_lines(quality_rows([measured("edm", 0.25, 0.125)], "kid", 2), factor)
    assert line[2] == f"{0.25 * factor:.3g} ± {0.125 * factor:.2g}"
