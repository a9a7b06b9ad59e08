"""How much of its budget a run has used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from klray.config import Config
from klray.runs.checkpoint import load_latest, read_state
from klray.runs.train_state import Progress


def budget_used(config: Config, progress: Progress) -> float:
    """The fraction of the budget that is used."""
    used = {**asdict(progress), "images": progress.images_seen, "steps": progress.step}[config.budget.unit]
    return used / config.budget.amount


def finished(config: Config, run_dir: Path, warn: Callable[[str], None]) -> bool:
    """Whether the run's newest whole checkpoint has used the budget up.

    Raises:
        CheckpointError: where the run has checkpoints and none is whole.
    """
    latest = load_latest(run_dir, warn)
    return latest is not None and not fits(config, Progress(**read_state(latest)["progress"]))


def fits(config: Config, progress: Progress) -> bool:
    """Whether another step fits into the budget; the first always does. Seconds are used up, not fitted."""
    batch = config.optimizer.batch_size
    cost = {"steps": 1, "images": batch, "network_evals": batch * config.evals_per_image, "seconds": 0}
    used = budget_used(config, progress) + cost[config.budget.unit] / config.budget.amount
    return used < 1 if config.budget.unit == "seconds" else used <= 1 + 1e-12 or progress.step == 0
