"""Seconds per learned schedule: klray's fit against the published procedure's cost, and one pool worker against two.

python benchmarks/ld3.py --out result.json

The network is the preset's with fresh weights, whose cost is that of trained ones; every arm runs on one thread.
``published`` has what decides the cost of LD3's public code: a validation of all validation pairs after every batch,
and after every round a pass over the validation noises as over the training noises. This fit does not make the
latter: the seconds of one such pass are measured and added. Arms take turns; ratios are medians over the rounds of
the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from klray.build import build_denoiser, build_network, build_process
from klray.config import Config, load_config
from klray.core.schedule import Schedule
from klray.core.timesteps import TIMESTEPS
from klray.schedules.ask import Ask, Job
from klray.schedules.fit import fit_timesteps
from klray.schedules.fit_settings import FitSettings
from klray.schedules.teacher import Teacher, TeacherPairs

SOLVER = "unipc_3"


def teacher_of(schedule: Schedule) -> Teacher:
    return Teacher(SOLVER, TIMESTEPS["logsnr"](schedule, 20).tolist())


def fits(config: Config, nfe: int, rounds: int, base: FitSettings) -> dict[str, list[float]]:
    """Seconds of one fit by each arm, in every round."""
    process = build_process(config)
    network = build_network(config).eval().requires_grad_(False)
    denoiser = build_denoiser(config, network, process)
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    began = time.perf_counter()
    pairs = teacher_of(process).pairs(denoiser, process, range(100), shape, batch_size=25)
    found: dict[str, list[float]] = {"teacher, 100 pairs": [time.perf_counter() - began]}

    def seconds(settings: FitSettings, of: TeacherPairs = pairs) -> float:
        began = time.perf_counter()
        fit_timesteps(denoiser, process, SOLVER, nfe, of, settings)
        return time.perf_counter() - began

    passes = base.rounds_theta + base.rounds_both
    for _ in range(rounds):
        start = seconds(replace(base, rounds_theta=0, rounds_both=0))
        # One soft pass over 50 noises costs a round without validations.
        soft_pass = seconds(replace(base, rounds_theta=1, rounds_both=0, validate_every=10**6)) - start
        arms = {
            "klray": seconds(base),
            "klray, hard": seconds(replace(base, gamma=0.0)),
            "klray, activations kept": seconds(replace(base, recompute=False)),
            "published": seconds(replace(base, validate_every=1)) + passes * soft_pass,
        }
        for arm, value in arms.items():
            found.setdefault(arm, []).append(value)
    return found


def pools(preset: str, nfe: int, rounds: int, fit: FitSettings, jobs: int) -> dict[str, list[float]]:
    """Seconds of as many equal jobs on one worker and on two, each of one thread, from the first report of a job on."""
    from klray.cluster.connect import connect
    from klray.cluster.jobs import JobProgress, run_missing
    from klray.sampling.model import load_model
    from klray.schedules.pool import Ld3Kind
    from klray.schedules.records import Ld3Records
    from klray.schedules.shared_pairs import taught
    from klray.train import main as train

    class Timed(JobProgress):
        """Knows when the first report came: before it, workers are started and load the model."""

        first = math.inf

        def running(self, name: str, cost: float, share: float, text: str) -> None:
            self.first = min(self.first, time.perf_counter())
            super().running(name, cost, share, text)

    found: dict[str, list[float]] = {"1 worker": [], "2 workers": []}
    with tempfile.TemporaryDirectory() as folder:
        where = ["--runner", "local", "--runs", folder, "--name", "m"]
        change = ["--set", "tracking.uri=off", "--set", "budget.unit=images", "--set", "budget.amount=128"]
        assert train(["--config", preset, *where, *change]) == 0
        model = load_model(Path(folder) / "m", torch.device("cpu"))
        ask = Ask(fit, teacher_of(model.schedule), 20, "logsnr", 100, model.clip_x0)
        connect()
        pairs, costs = taught(Path(folder) / "pairs", model, ask, workers=2, show=lambda line: None)
        todo = [Job(SOLVER, nfe, {}, seed) for seed in range(jobs)]
        for turn in range(rounds):
            for workers in (1, 2):
                home = Path(folder) / f"{turn}_{workers}"
                records = Ld3Records(home / "trials", {})
                kind = Ld3Kind(model, home, ask, {}, pairs, costs, records, workers, cpus_per_worker=1)
                progress = Timed(lambda line: None, [nfe] * jobs)
                assert not run_missing(kind, todo, progress)
                found["1 worker" if workers == 1 else "2 workers"].append(time.perf_counter() - progress.first)
    return found


def ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    config = load_config(args.config)
    base = FitSettings()
    found = fits(config, args.nfe, args.rounds, base) | pools(args.config, args.nfe, args.rounds, base, args.jobs)
    ratios = {
        "published / klray": ratio(found["published"], found["klray"]),
        "activations kept / recomputed": ratio(found["klray, activations kept"], found["klray"]),
        "1 worker / 2 workers": ratio(found["1 worker"], found["2 workers"]),
    }
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "ray")},
        "preset": args.config,
        "solver": SOLVER,
        "nfe": args.nfe,
        "jobs": args.jobs,
        "seconds": found,
        "ratios": ratios,
    }
    for arm, values in found.items():
        print(f"{arm:30s} {statistics.median(values):8.2f} s")
    for name, value in ratios.items():
        print(f"{name:30s} {value:8.2f}")
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits")
    parser.add_argument("--nfe", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=4, help="of each pool")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    main(args)
