"""Learning rates of a comparison: the same ladder for every arm, longer where the best is at an end of it."""

from __future__ import annotations

from collections.abc import Mapping

RUNGS = 5  # the least that every arm tries
MOST = 6  # more than the first ones that an arm may try, before it is said that its best is still at an end


def ladder(centre: float, rungs: int, factor: float) -> list[float]:
    """``rungs`` rates around ``centre``, each ``factor`` times the one before."""
    return [_rate(centre, factor, k - (rungs - 1) // 2) for k in range(rungs)]


def longer(errors: Mapping[float, float], factor: float, rungs: int) -> float | None:
    """The rate to try next: one beyond the best, where that is the lowest or highest tried; else None.

    Args:
        errors: of each rate that was tried, infinite where it diverged.
        rungs: of the first ladder; None comes, too, after ``MOST`` more.
    """
    best = best_rate(errors)
    if best not in (min(errors), max(errors)) or len(errors) >= rungs + MOST:
        return None
    return _rate(best, factor, -1 if best == min(errors) else 1)


def best_rate(errors: Mapping[float, float]) -> float:
    """The rate with the smallest error; the lowest where all diverged."""
    return min(sorted(errors), key=lambda rate: errors[rate])


def _rate(centre: float, factor: float, steps: int) -> float:
    """Four digits, so that a rate is written as it is."""
    return float(f"{centre * factor**steps:.4g}")
