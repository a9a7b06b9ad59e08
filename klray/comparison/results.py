"""What a comparison found: an arm's curves against every cost, read from the records of its runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from klray.build import build_network
from klray.comparison.arms import Arm, caveat
from klray.comparison.curves import Curves, Interval, Verdict, compare, cost_ratio
from klray.config import Config
from klray.training.cost import cost_of

METRIC = "val/eps_mse"
AXES = {"images": "images", "network_evals": "network evaluations", "flops": "training FLOPs", "seconds": "seconds"}
History = Mapping[str, Sequence[tuple[int, float]]]  # (images seen, value) of every recorded metric


@dataclass(frozen=True)
class ArmResult:
    """An arm at its best learning rate.

    Attributes:
        config: of its runs, but for the seed.
        tried: the error of every learning rate, infinite where it diverged.
        curves: of the seeds that were trained to the end, for each of ``AXES``; empty where none was.
        lost: seeds that diverged or failed.
        parameters, flops: of the network; of the training of one image.
    """

    arm: Arm
    config: Config
    tried: Mapping[float, float]
    curves: Mapping[str, Curves]
    lost: int
    parameters: int
    flops: float

    @property
    def note(self) -> str | None:
        """What the result has to be read with."""
        return caveat(self.config)

    @property
    def rate_at_end(self) -> bool:
        """Whether the best learning rate is the lowest or highest that was tried."""
        return self.config.optimizer.lr in (min(self.tried), max(self.tried))


def arm_result(arm: Arm, config: Config, tried: Mapping[float, float], runs: Sequence[History], lost: int) -> ArmResult:
    """From the records of the runs that were trained to the end, one for each seed."""
    cost = cost_of(config, build_network(config))
    flops = cost["cost.train_flops_per_image"]
    curves = curves_of(runs, flops) if runs else {}
    return ArmResult(arm, config, tried, curves, lost, cost["cost.parameters"], flops)


def curves_of(runs: Sequence[History], flops_per_image: float) -> dict[str, Curves]:
    """``METRIC`` against every axis, [S, P] over the looks that all runs have; a resumed run's looks count once."""
    values = [{key: dict(run[key]) for key in (METRIC, "network_evals", "seconds")} for run in runs]
    looks = sorted(set.intersection(*(set(run[METRIC]) for run in values)))
    errors = np.array([[run[METRIC][look] for look in looks] for run in values])
    images = np.array([looks] * len(runs), dtype=np.float64)
    costs = {
        "images": images,
        "network_evals": np.array([[run["network_evals"][look] for look in looks] for run in values]),
        "flops": images * flops_per_image,
        "seconds": np.array([[run["seconds"][look] for look in looks] for run in values]),
    }
    return {axis: Curves(cost, errors) for axis, cost in costs.items()}


def final_error(run: History | None) -> float:
    """The last look's error; infinite for a run that diverged."""
    value = math.inf if run is None else run[METRIC][-1][1]
    return value if math.isfinite(value) else math.inf


def verdicts(results: Sequence[ArmResult]) -> dict[str, dict[str, Verdict]]:
    """Every arm but the first against the first: name -> axis -> verdict. Arms without a whole run are left out."""
    baseline, *others = results
    return {
        result.arm.name: {axis: compare(result.curves[axis], baseline.curves[axis]) for axis in AXES}
        for result in others
        if result.curves and baseline.curves
    }


def common_quality(results: Sequence[ArmResult]) -> float:
    """An error that every arm comes down to: a little more than the largest of the arms' final ones, so that most
    resamples of its seeds come down to it too."""
    finals = [np.log(result.curves["images"].errors[:, -1]).mean() for result in results if result.curves]
    return float(1.05 * np.exp(max(finals))) if finals else math.nan


def cost_ratios(results: Sequence[ArmResult], quality: float) -> dict[str, dict[str, Interval]]:
    """What every arm pays for ``quality``, over what the first pays: name -> axis -> ratio."""
    baseline, *others = results
    return {
        result.arm.name: {axis: cost_ratio(result.curves[axis], baseline.curves[axis], quality) for axis in AXES}
        for result in others
        if result.curves and baseline.curves
    }
