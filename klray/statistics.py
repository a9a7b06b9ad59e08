"""What repeated measurements say: intervals that every report gives alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def half_width(values: Sequence[float]) -> float | None:
    """Of the 95 % t interval of the mean; None for fewer than two values, or where one is not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values))
