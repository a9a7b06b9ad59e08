"""What LD3 gains on data whose denoiser is exact, against the best of the five fixed grids, on noises never seen.

python benchmarks/ld3_mixtures.py --out result.json

Gaussian mixtures of 8 components in 16 dimensions (means N(0, 1), stds 0.05 to 0.35); the teacher is dpm_solver_pp_2m
with 200 steps on logsnr. The error of a grid is the mean squared difference to the teacher over 1000 noises; z is the
difference to the best fixed grid, chosen on those same noises, in standard errors of the paired differences.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klray.core.analytic import MixtureDenoiser
from klray.core.schedule import VPLinear
from klray.core.solvers import SOLVERS
from klray.core.timesteps import TIMESTEPS
from klray.schedules.fit import fit_timesteps
from klray.schedules.fit_settings import FitSettings
from klray.schedules.learners import ADAM
from klray.schedules.perceptual import l2
from klray.schedules.teacher import Teacher, TeacherPairs

SCHEDULE = VPLinear()
TRAIN, UNSEEN, SHAPE = 1000, 1000, (1, 4, 4)
RADIUS = 0.0035 * 4**2 / 4  # gamma whose ball is to the length of the noise as CIFAR10's at the same NFE: 0.35 % at 4
# Name -> settings, pairs.
ARMS: dict[str, tuple[FitSettings, int]] = {
    "ld3_hard_100": (FitSettings(gamma=0.0, recompute=False), 100),
    "ld3_soft_100": (FitSettings(gamma=RADIUS, recompute=False), 100),
    "ld3_soft_wide_100": (FitSettings(gamma=10 * RADIUS, recompute=False), 100),
    "ld3_hard_50_and_450": (FitSettings(gamma=0.0, recompute=False, validation_pairs=450, validate_every=25), 500),
    "adam_100": (replace(ADAM, recompute=False, validation_pairs=50, batch_size=50, rounds_both=200), 100),
    "adam_1000": (replace(ADAM, recompute=False), 1000),
}


def mixture(number: int) -> MixtureDenoiser:
    means = torch.randn(8, 16, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return MixtureDenoiser(SCHEDULE, means, torch.linspace(0.05, 0.35, 8, dtype=torch.float64))


def fixed_errors(denoiser: MixtureDenoiser, solver: str, nfe: int, pairs: TeacherPairs) -> dict[str, Tensor]:
    """Name of a fixed grid -> its error for each pair, [n]."""
    x = SCHEDULE.prior_std * pairs.noise
    grids = {name: grid(SCHEDULE, nfe) for name, grid in TIMESTEPS.items()}
    sample = SOLVERS[solver].sample
    return {name: l2(sample(denoiser, SCHEDULE, x, grid), pairs.images) for name, grid in grids.items()}


def cell(denoiser: MixtureDenoiser, solver: str, nfe: int, pairs: TeacherPairs, arms: list[str]) -> dict[str, Any]:
    unseen = pairs[TRAIN:]
    fixed = fixed_errors(denoiser, solver, nfe, unseen)
    best = min(fixed, key=lambda name: float(fixed[name].mean()))
    result: dict[str, Any] = {"best_fixed": best, "fixed": {name: float(e.mean()) for name, e in fixed.items()}}
    for arm in arms:
        settings, count = ARMS[arm]
        began = time.perf_counter()
        trained: dict[str, float] = {}
        learned = fit_timesteps(
            denoiser,
            SCHEDULE,
            solver,
            nfe,
            pairs[:count],
            settings,
            lambda iteration, numbers, trained=trained: trained.update(numbers),  # type: ignore[misc]
        )
        seconds = time.perf_counter() - began
        error = l2(learned.sample(denoiser, SCHEDULE, unseen.noise), unseen.images)
        difference = error - fixed[best]
        spread = float(difference.std()) / UNSEEN**0.5
        result[arm] = {
            "error": float(error.mean()),
            "ratio": float(error.mean() / fixed[best].mean()),
            "z": float(difference.mean()) / spread if learned.learned or learned.start != best else 0.0,
            "start": learned.start,
            "learned": learned.learned,
            "accepted": learned.statistics["accepted"],
            "moved": learned.statistics["moved"],
            "radius": learned.statistics["radius"],
            "seconds": seconds,
            "timesteps": learned.timesteps,
            "model_timesteps": learned.model_timesteps,
        }
    return result


def worse_starts(denoiser: MixtureDenoiser, solver: str, nfe: int, pairs: TeacherPairs, count: int) -> float:
    """How often the best fixed grid of ``count`` pairs alone is worse, on noises never seen, by 2 standard errors.

    What no learning can mend that has only these pairs to choose its start by. Of all disjoint draws that there are.
    """
    errors = torch.stack(list(fixed_errors(denoiser, solver, nfe, pairs).values()))
    unseen = errors[:, -UNSEEN:]
    best = int(unseen.mean(1).argmin())
    draws = errors[:, : errors.shape[1] - UNSEEN].split(count, dim=1)
    worse = 0
    for draw in draws:
        difference = unseen[int(draw.mean(1).argmin())] - unseen[best]
        worse += float(difference.mean()) > 2 * float(difference.std()) / UNSEEN**0.5
    return worse / len(draws)


def summary(cells: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    found = [each[arm] for each in cells]
    return {
        "cells": len(found),
        "learned": sum(each["learned"] for each in found),
        "median_ratio": statistics.median(each["ratio"] for each in found),
        "worst_ratio": max(each["ratio"] for each in found),
        "better_by_2_errors": sum(each["z"] < -2 for each in found),
        "worse_by_2_errors": sum(each["z"] > 2 for each in found),
        "of_these_the_start_itself": sum(each["z"] > 2 and not each["learned"] for each in found),
        "accepted": statistics.mean(each["accepted"] for each in found),
        "seconds": statistics.mean(each["seconds"] for each in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ld3_mixtures_cpu.json")
    parser.add_argument("--mixtures", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--quick", action="store_true", help="one mixture, two solvers, NFE 4")
    given = parser.parse_args()
    solvers, budgets = ["ddim", "dpm_solver_pp_2m", "dpm_solver_pp_3m", "unipc_3", "ipndm_3"], [4, 6, 8]
    if given.quick:
        given.mixtures, solvers, budgets = given.mixtures[:1], ["ddim", "unipc_3"], [4]
    teacher = Teacher("dpm_solver_pp_2m", TIMESTEPS["logsnr"](SCHEDULE, 200).tolist())
    cells: list[dict[str, Any]] = []
    for number in given.mixtures:
        denoiser = mixture(number)
        seeds = range(TRAIN + UNSEEN)
        many = teacher.pairs(denoiser, SCHEDULE, range(3 * TRAIN + UNSEEN), SHAPE, batch_size=1000, dtype=torch.float64)
        pairs = teacher.pairs(denoiser, SCHEDULE, seeds, SHAPE, batch_size=1000, dtype=torch.float64)
        for solver in solvers:
            for nfe in budgets:
                row = cell(denoiser, solver, nfe, pairs, given.arms)
                row["worse_starts_100"] = worse_starts(denoiser, solver, nfe, many, 100)
                row["worse_starts_500"] = worse_starts(denoiser, solver, nfe, many, 500)
                cells.append({"mixture": number, "solver": solver, "nfe": nfe, **row})
                ratios = "  ".join(f"{row[arm]['ratio']:.2f} ({row[arm]['z']:+.1f})" for arm in given.arms)
                print(f"{number} {solver:17s} {nfe}  {row['best_fixed']:14s} {ratios}", flush=True)
        summaries = {arm: summary(cells, arm) for arm in given.arms}
        described = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread",
            "torch": torch.__version__,
            "teacher": {"solver": teacher.solver, "steps": 200, "grid": "logsnr"},
            "settings": {arm: {"pairs": ARMS[arm][1], **asdict(ARMS[arm][0])} for arm in given.arms},
            "summary": summaries,
            "cells_expected_worse_by_the_start_alone": {
                count: sum(each[f"worse_starts_{count}"] for each in cells) for count in (100, 500)
            },
            "cells": cells,
        }
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(described, indent=1) + "\n")
    expected = described["cells_expected_worse_by_the_start_alone"]
    print(f"\nbest fixed grid by the pairs alone, cells worse by 2 errors to be expected: {expected}")
    print(f"{'arm':22s} cells learned  median  worst  better>2se  worse>2se (the start)  accepted  s/fit")
    for arm, each in summaries.items():
        print(
            f"{arm:22s} {each['cells']:5d} {each['learned']:7d} {each['median_ratio']:7.3f} {each['worst_ratio']:6.2f} "
            f"{each['better_by_2_errors']:11d} {each['worse_by_2_errors']:10d} {each['of_these_the_start_itself']:11d} "
            f"{each['accepted']:9.2f} {each['seconds']:6.1f}"
        )


if __name__ == "__main__":
    main()
