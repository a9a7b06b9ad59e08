"""What klray.ld3 is asked to learn, checked before anything starts."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from klray import registry
from klray.config import MOST_STEPS
from klray.core.finish import solve
from klray.core.schedule import Schedule, VPLinear
from klray.core.solver_parameters import SolverParameters
from klray.errors import UserError
from klray.schedules.fit_settings import FitSettings
from klray.schedules.learners import Learner
from klray.schedules.perceptual import DISTANCES
from klray.schedules.teacher import Teacher

FIRST_SEED = 1 << 30  # of the pairs' noises: far from the seeds of the images that are drawn and evaluated
MOST_PAIRS = 1_000_000
EFFICIENTNET, LPIPS = "efficientnet_lite0", "lpips_vgg"
LOSSES = (*DISTANCES, EFFICIENTNET, LPIPS)


class AskError(UserError):
    """A setting of klray.ld3 that is wrong; one line."""


@dataclass(frozen=True)
class Job:
    """One schedule to learn; options are the solver's that differ from its defaults."""

    solver: str
    nfe: int
    options: Mapping[str, Any]
    seed: int = 0  # of the order of the pairs

    @property
    def use(self) -> tuple[str, int, Mapping[str, Any]]:
        """What the schedule is for; jobs of several seeds have one."""
        return self.solver, self.nfe, self.options

    @property
    def name(self) -> str:
        """Also of its folder."""
        picked = "".join(f"-{key}_{value}" for key, value in self.options.items())
        return f"{self.solver}-nfe{self.nfe:03d}{picked}" + (f"-seed{self.seed:03d}" if self.seed else "")


@dataclass(frozen=True)
class Ask:
    """How every job of a pool is learned.

    Attributes:
        fit: the settings of each fit.
        teacher: which makes the pairs. teacher_nfe, teacher_grid: what it spends, and the name of its grid.
        pairs: how many.
        clip_x0: whether the model clamps x0_hat.
        warm_start: whether a job also starts from what is learned at other NFE.
        lpips_weights: the files of VGG16's and LPIPS' weights, for that loss.
    """

    fit: FitSettings
    teacher: Teacher
    teacher_nfe: int
    teacher_grid: str
    pairs: int
    clip_x0: bool
    warm_start: bool = False
    lpips_weights: tuple[Path, Path] | None = None

    @property
    def seeds(self) -> range:
        """Of the pairs' noises; the last ones are the validation pairs."""
        return range(FIRST_SEED, FIRST_SEED + self.pairs)

    @property
    def iterations(self) -> int:
        """Of one fit."""
        rounds = self.fit.rounds_theta + self.fit.rounds_both
        return rounds * -(-(self.pairs - self.fit.validation_pairs) // self.fit.batch_size)

    def described(self) -> dict[str, Any]:
        """Everything that decides what is learned of a model, but for the seed of a job; plain values."""
        settings: dict[str, Any] = asdict(self)
        del settings["teacher"]["timesteps"]  # which the grid's name and the model settle
        del settings["fit"]["seed"]
        files = settings.pop("lpips_weights")
        return settings if files is None else {**settings, "lpips_weights": [_sha256(file) for file in files]}

    def name(self, model: str) -> str:
        """Of a pool that learns this for the model of a fingerprint."""
        text = json.dumps({"model": model, **self.described()}, sort_keys=True)
        return f"ld3-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def fit_settings(optimizer: str, changes: Sequence[str], **chosen: Any) -> FitSettings:
    """LD3's settings or Adam's, with ``chosen`` ones that are not None and KEY=VALUE texts put in.

    Raises:
        AskError: for an unknown optimiser or key, or a wrong value.
    """
    base = replace(learner_of(optimizer).settings, optimizer=optimizer)
    values = {key: value for key, value in chosen.items() if value is not None}
    kinds = {field.name: type(getattr(base, field.name)) for field in fields(base) if field.name != "optimizer"}
    for text in changes:
        key, equals, given = (part.strip() for part in text.partition("="))
        if not equals:
            raise AskError(f"--set takes KEY=VALUE, got {text!r}; for example lr=1e-2")
        if key not in kinds:
            close = difflib.get_close_matches(key, kinds, n=1, cutoff=0.0)[0]
            raise AskError(f"--set knows no {key!r}; did you mean {close}?")
        values[key] = _value(key, given, kinds[key])
    try:
        return replace(base, **values)
    except ValueError as error:
        raise AskError(f"--set {error}") from error


def learner_of(optimizer: str) -> Learner:
    """The entry of --optimizer; raises AskError."""
    try:
        found: Learner = registry.entry("learner", optimizer, "--optimizer")
    except registry.RegistryError as error:
        raise AskError(str(error)) from error
    return found


def teacher_of(solver: str, nfe: int, timesteps: str, schedule: Schedule, final: str = "denoise") -> Teacher:
    """A teacher that spends ``nfe`` evaluations an image on a named grid of the schedule.

    Raises:
        AskError: for an unknown solver or grid, or an NFE that the solver cannot spend.
    """
    try:
        method = registry.entry("solver", solver, "--teacher-solver")
        grid = registry.entry("time grid", timesteps, "--teacher-timesteps")
    except registry.RegistryError as error:
        raise AskError(str(error)) from error
    if nfe > MOST_STEPS:
        raise AskError(f"--teacher-nfe must be at most {MOST_STEPS}, got {nfe}")
    try:
        num_steps, orders = method.plan(nfe)
    except ValueError as error:
        raise AskError(f"--teacher-nfe: {error}") from error
    return Teacher(solver, grid(schedule, num_steps).tolist(), orders, final)


def plan_text(ask: Ask, jobs: Sequence[Job], missing: Sequence[Job], evals: int) -> str:
    """What would be done and what it costs; ``evals``: network evaluations of one score evaluation."""
    grids = f"{ask.teacher.solver}, {ask.teacher_grid}, {ask.teacher_nfe} NFE"
    lines = [
        f"teacher     {ask.pairs} pairs by {grids}; {ask.fit.validation_pairs} of them validate",
        f"fit         {ask.fit.optimizer}, {ask.fit.loss}, {ask.fit.space}, {ask.iterations} iterations",
    ]
    passes = 4 if ask.fit.gamma > 0 else 3  # forwards, recomputed and backwards; the moved noises forwards
    images = ask.iterations * passes * ask.fit.batch_size
    images += ask.iterations // ask.fit.validate_every * ask.fit.validation_pairs
    for job in jobs:
        cost = f"to learn, about {images * job.nfe * evals:,} network evaluations"
        lines.append(f"{job.name}  {cost if job in missing else 'is learned'}")
    return "\n".join(lines)


def check_ask(ask: Ask, jobs: Sequence[Job]) -> None:
    """Refuses what would fail, or could teach nothing.

    Raises:
        AskError: for too few pairs, jobs asked for twice, and a job that spends as much as its teacher.
    """
    least = ask.fit.validation_pairs + 1
    if ask.pairs < least:
        raise AskError(
            f"--pairs must be >= {least}, got {ask.pairs}: {ask.fit.validation_pairs} of them only validate; "
            f"give more, or --set validation_pairs={max(1, ask.pairs // 2)}"
        )
    if ask.pairs > MOST_PAIRS:
        raise AskError(f"--pairs must be at most {MOST_PAIRS}, got {ask.pairs}: they are held in memory")
    if ask.fit.loss not in LOSSES:
        close = difflib.get_close_matches(ask.fit.loss, LOSSES, n=1, cutoff=0.0)[0]
        raise AskError(f"--loss must be one of {', '.join(LOSSES)}, got {ask.fit.loss!r}; the nearest is {close}")
    if (ask.fit.loss == LPIPS) != (ask.lpips_weights is not None):
        files = "VGG16.pth LPIPS.pth, torchvision's and LPIPS' own,"
        raise AskError(f"--loss {LPIPS} and --lpips-weights {files} go together; without them: --loss {EFFICIENTNET}")
    for file in ask.lpips_weights or ():
        if not file.is_file():
            raise AskError(f"--lpips-weights: no file {file}")
    for job in jobs:
        if jobs.count(job) > 1:
            again = f" with seed {job.seed}" if job.seed else ""
            raise AskError(f"{job.solver} at {job.nfe} NFE{again} is asked for twice")
        try:
            blank = torch.zeros(1, 1, 1, 1)
            once = registry.entry("time grid", "logsnr")(VPLinear(), 1)
            solve(
                registry.entry("solver", job.solver),
                lambda x, t: x,
                VPLinear(),
                blank,
                SolverParameters(once),
                options=job.options,
            )
        except ValueError as error:
            raise AskError(f"{job.solver}: {error}") from error
        if job.nfe >= ask.teacher_nfe:
            raise AskError(f"--teacher-nfe must be above every --nfe, got {ask.teacher_nfe} for {job.nfe}")


@cache
def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _value(key: str, text: str, kind: type) -> Any:
    try:
        value = kind(text) if kind in (int, float, str) else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        value = None
    if not isinstance(value, kind):
        words = {int: "an integer", float: "a number", bool: "true or false"}
        raise AskError(f"--set {key} must be {words[kind]}, got {text!r}")
    return value
