"""What a comparison trains: every arm under the same budget, looked at and warmed up at the same shares of it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from klray.comparison.arms import Arm
from klray.comparison.results import METRIC
from klray.config import Config, ConfigError, override
from klray.tracking.view import View

LOOKS = 24  # divisible by most M, so that an arm's end falls on a look of the baseline's on every axis
TUNING_SEED = 1000  # beyond the seeds that results are made of


def matched(arm: Arm, base: Config, looks: int = LOOKS) -> Config:
    """An arm's configuration under the budget of ``base``.

    The warm-up takes the share of the arm's images that it takes of the base's, validation comes ``looks`` times, the
    sample grid at the end. A budget in seconds has no number of images: those settings are then left as they are.

    Raises:
        ConfigError: for a budget in steps, which are no cost.
    """
    if base.budget.unit == "steps":
        raise ConfigError("budget.unit must be network_evals, images or seconds to compare arms, got steps")
    config = arm.config(base)
    images, of_base = budget_images(config), budget_images(base)
    if images is None or of_base is None:
        return config
    changes: dict[str, Any] = {
        "optimizer.warmup_images": round(base.optimizer.warmup_images * images / of_base),
        "validation.every_images": max(1, int(images / looks)),
        "sampling.every_images": max(1, int(images)),
    }
    return arm.config(base, **changes)


def budget_images(config: Config) -> float | None:
    """How many images the budget buys; None where it is in seconds."""
    per_image = {"images": 1, "network_evals": config.evals_per_image}.get(config.budget.unit)
    return None if per_image is None else config.budget.amount / per_image


@dataclass(frozen=True)
class PlannedRun:
    """One training run of an arm; ``stage`` is tuning or result."""

    arm: str
    stage: str
    config: Config

    @property
    def name(self) -> str:
        """A folder's name."""
        slug = re.sub(r"[^A-Za-z0-9._-]+", "_", self.arm)
        return f"{slug}-lr{self.config.optimizer.lr:.4g}-seed{self.config.seed}"


def view_of(arms: Collection[Arm]) -> View:
    """How MLflow's pages show the arms' runs."""
    names, changed = [arm.name for arm in arms], dict.fromkeys(key for arm in arms for key, _ in arm.changes)
    return View(
        heading=f"{' against '.join(names)}, each at learning rates of its own.",
        params=[*changed, "optimizer.lr"],
        metrics=[METRIC],
        tags=["klray.arm", "klray.stage"],
    )


def planned(arm: Arm, config: Config, rate: float, stage: str, seed: int) -> PlannedRun:
    """The run of an arm's matched configuration with a learning rate and a seed."""
    changed = override(config.model_dump(mode="json"), [("optimizer.lr", rate), ("seed", config.seed + seed)])
    return PlannedRun(arm.name, stage, changed)
