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


def kept(run_dir: Path, warn: Callable[[str], None]) -> Progress | None:
    """How far the run's newest whole checkpoint is; None where there is none yet.

    Raises:
        CheckpointError: where the run has checkpoints and none is whole.
    """
    latest = load_latest(run_dir, warn)
    return None if latest is None else Progress(**read_state(latest)["progress"])


def finished(config: Config, run_dir: Path, warn: Callable[[str], None]) -> bool:
    """Whether what is kept has used the budget up; raises as ``kept``."""
    progress = kept(run_dir, warn)
    return progress is not None and not fits(config, progress)


def _step_cost(config: Config) -> float:
    """Of the budget, in its unit; 0 where that is seconds."""
    batch = config.optimizer.batch_size
    return {"steps": 1, "images": batch, "network_evals": batch * config.evals_per_image, "seconds": 0}[
        config.budget.unit
    ]


def steps_of(config: Config) -> int:
    """How many steps a budget that is not in seconds pays for."""
    return max(1, int(config.budget.amount / _step_cost(config) + 1e-9))


def fits(config: Config, progress: Progress) -> bool:
    """Whether another step fits into the budget; the first always does. Seconds are used up, not fitted."""
    used = budget_used(config, progress) + _step_cost(config) / config.budget.amount
    return used < 1 if config.budget.unit == "seconds" else used <= 1 + 1e-12 or progress.step == 0
