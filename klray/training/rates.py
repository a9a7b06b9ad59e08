"""Rate schedules: functions of the ``share`` of the budget used, 0 to 1, to a factor on ``optimizer.lr``.

The linear warm-up over ``optimizer.warmup_images`` comes before and on top.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field

Share = Annotated[float, Field(ge=0, le=1)]


def constant(share: float) -> float:
    """1 throughout."""
    return 1.0


def cosine(share: float, *, final_share: Share = 0.0) -> float:
    """From 1 along half a cosine to ``final_share`` (arXiv 1608.03983).

    Args:
        final_share: the rate at the end, over ``optimizer.lr``.
    """
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def wsd(share: float, *, decay_share: Share = 0.2, final_share: Share = 0.0) -> float:
    """Warm-up, stable, decay: 1, and over the last ``decay_share`` of the budget linearly to ``final_share``
    (arXiv 2405.18392).

    Args:
        decay_share: of the budget, in which the rate falls.
        final_share: the rate at the end, over ``optimizer.lr``.
    """
    left = min(1.0, max(0.0, 1 - share) / decay_share) if decay_share else 1.0
    return final_share + (1 - final_share) * left


RATES: dict[str, Any] = {"constant": constant, "cosine": cosine, "wsd": wsd}
