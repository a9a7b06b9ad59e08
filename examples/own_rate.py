"""A rate schedule of your own: the rate is halved a few times.

From the folder of this file: klray train --config digits --set optimizer.rate=own_rate:halves --set optimizer.times=3
"""

from __future__ import annotations


def halves(share: float, *, times: int = 2) -> float:
    """share of the budget used, 0 to 1 -> a factor on optimizer.lr: 1, then 1/2, ... in ``times`` equal stretches."""
    return 0.5 ** int(times * share)
