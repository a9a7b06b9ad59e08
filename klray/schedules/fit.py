"""LD3 (Tong et al., arXiv 2405.15506): the time grid with which few steps of a solver best repeat a teacher of many."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from klray import registry
from klray.core.denoiser import Denoiser
from klray.core.learned_timesteps import LearnedTimesteps
from klray.core.schedule import Schedule
from klray.core.timesteps import TIMESTEPS
from klray.schedules.fit_loop import FitLoop, Grids, Report
from klray.schedules.fit_settings import FitSettings
from klray.schedules.learned_schedule import LearnedSchedule
from klray.schedules.perceptual import DISTANCES, Distance
from klray.schedules.student import Student
from klray.schedules.teacher import TeacherPairs


def fit_timesteps(
    denoiser: Denoiser,
    schedule: Schedule,
    solver: str,
    nfe: int,
    pairs: TeacherPairs,
    settings: FitSettings,
    report: Report = lambda iteration, numbers: None,
    *,
    options: Mapping[str, Any] | None = None,
    starts: Grids | None = None,
    distance: Distance | None = None,
) -> LearnedSchedule:
    """One LD3 job: min over theta, xi of E_z min_{|z' - z| <= r} d(student(z'), teacher(z)),  r = gamma C H W / NFE^2.

    The last ``settings.validation_pairs`` pairs are never trained on and their noises never move; they alone choose the
    best of the parameters visited. These replace the start only if they are also better over all pairs, at their own
    noises, by more than ``settings.margin`` standard errors of the paired differences. The start is the best of
    ``starts`` over all pairs.

    Args:
        denoiser: x [B, C, H, W], t 0-dim float64 -> x0_hat, in evaluation mode, its own weights frozen.
        solver, nfe, options: a name in SOLVERS, a budget it can spend, and keywords of its ``sample``.
        pairs: the teacher's, on the device of the denoiser. Every solve is in their dtype, coefficients in float64.
        report: called after each validation with train_loss, validation_loss, best_loss (as ``distance`` gives them),
            accepted, moved and lr.
        starts: grids to start from, of any number of steps; None: all of TIMESTEPS.
        distance: in place of the one that ``settings.loss`` names; ``settings.loss`` then only names it.

    Raises:
        ValueError: for an unknown solver or loss, an NFE it cannot spend, too few pairs, a start that is no grid, and
            when every start's loss is not finite.
    """
    began = time.perf_counter()
    if distance is None and settings.loss not in DISTANCES:
        raise ValueError(f"loss must be one of {', '.join(DISTANCES)}, got {settings.loss!r}; others as a distance")
    method = registry.entry("solver", solver)
    if len(pairs) <= settings.validation_pairs:
        raise ValueError(f"{settings.validation_pairs} validation pairs leave none of {len(pairs)} to train on")
    num_steps, orders = method.plan(nfe)
    times = LearnedTimesteps(schedule, num_steps, settings.space, output_scale=settings.output_scale)
    times = times.to(pairs.noise.device)
    options = dict(options or {})
    student = Student(
        denoiser,
        schedule,
        method,
        {**options, **orders},
        times,
        settings.recompute,
        settings.final,
    )
    loop = FitLoop(student, pairs, settings, distance or DISTANCES[settings.loss], nfe, report)
    if starts is None:
        starts = {name: grid(schedule, num_steps) for name, grid in TIMESTEPS.items()}
    start, start_losses = loop.choose_start(starts)
    learned = loop.learn()
    timesteps, model_timesteps = loop.grid()
    return LearnedSchedule(
        solver=solver,
        nfe=nfe,
        options=options,
        timesteps=timesteps.tolist(),
        model_timesteps=model_timesteps.tolist(),
        lam=schedule.lam(timesteps).tolist(),
        scale=None if times.scale is None else times.scale.tolist(),
        start=start,
        learned=learned,
        validation_loss=float(loop.best.mean()),
        start_losses=start_losses,
        statistics={**loop.statistics(), "seconds": time.perf_counter() - began},
        settings=asdict(settings),
    )
