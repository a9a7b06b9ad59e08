"""What each part of LD3 is worth on a trained model: soft forcing, network times of their own, a perceptual loss.

python benchmarks/ld3_ablation.py --checkpoint runs/mnist_small --out result.json

Every variant changes one part of ``full`` and is fitted with several seeds (the order of the pairs). KID compares
blocks of generated images with the training images, on EfficientNet-Lite0's features.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from klray.core.solver_parameters import SolverParameters
from klray.core.timesteps import TIMESTEPS
from klray.evaluation.cells import Yardstick, describe, evaluate_cells, open_evaluation
from klray.evaluation.feature_maps import efficientnet_maps
from klray.evaluation.job import Cell, Features
from klray.sampling.draw import Drawing, sampling_of
from klray.sampling.model import load_model
from klray.schedules.ask import EFFICIENTNET, FIRST_SEED, teacher_of
from klray.schedules.fit import fit_timesteps
from klray.schedules.fit_settings import FitSettings
from klray.schedules.perceptual import FeatureDistance
from klray.schedules.teacher import load_pairs, save_pairs

FULL = FitSettings(loss=EFFICIENTNET)
VARIANTS = {
    "full": FULL,
    "hard loss": replace(FULL, gamma=0.0),
    "L2 loss": replace(FULL, loss="l2"),
    "no network times": replace(FULL, rounds_theta=FULL.rounds_theta + FULL.rounds_both, rounds_both=0),
}
CPU = torch.device("cpu")


def fit(checkpoint: Path, folder: Path, solver: str, nfe: int, variant: str, seed: int) -> dict[str, Any]:
    """One schedule, in a process of its own."""
    torch.set_num_threads(1)
    model = load_model(checkpoint, CPU)
    pairs = load_pairs(folder, "pairs")
    assert pairs is not None
    settings = replace(VARIANTS[variant], seed=seed)
    distance = FeatureDistance(efficientnet_maps(CPU)) if settings.loss == EFFICIENTNET else None
    learned = fit_timesteps(model.denoiser, model.schedule, solver, nfe, pairs, settings, distance=distance)
    grid = SolverParameters(learned.timesteps, learned.model_timesteps)
    numbers = {"learned": learned.learned, "start": learned.start, **learned.statistics}
    return {"nfe": nfe, "variant": variant, "seed": seed, "grid": grid, "numbers": numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--solver", default="dpm_solver_pp_3m")
    parser.add_argument("--nfe", type=int, nargs="+", default=[4, 5, 6])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = load_model(args.checkpoint.resolve(), CPU)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = teacher_of("unipc_3", 20, "logsnr", model.schedule)
        seeds = range(FIRST_SEED, FIRST_SEED + 100)
        pairs = teacher.pairs(model.denoiser, model.schedule, seeds, model.shape, batch_size=25)
        save_pairs(folder, "pairs", pairs)
        jobs = [(nfe, variant, seed) for nfe in args.nfe for variant in VARIANTS for seed in range(args.seeds)]
        with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(fit, model.folder, folder, args.solver, *job) for job in jobs]
            fits = [future.result() for future in futures]
        yardstick = Yardstick(Features(EFFICIENTNET), ["kid"], args.num_samples, args.repeats)
        cells: dict[tuple[Any, ...], Cell] = {}
        for each in fits:
            asked = sampling_of(model, each["grid"], solver=args.solver, nfe=each["nfe"], timesteps="learned")
            cells[each["nfe"], each["variant"], each["seed"]] = Cell(asked, each["grid"])
        for nfe in args.nfe:
            for grid in TIMESTEPS:
                asked = sampling_of(model, solver=args.solver, nfe=nfe, timesteps=grid)
                cells[nfe, grid, 0] = Cell(asked, None)
        reference = yardstick.images(model, args.workers)
        run = open_evaluation(model, yardstick, reference, root=folder, uri=None, experiment="x", parent=None)
        distinct = list({repr(cell): cell for cell in cells.values()}.values())
        drawing = Drawing(model.folder, 64)
        evaluate_cells(model, distinct, drawing, yardstick, reference, run, workers=args.workers)
        rows = {key: run.row(describe(cell)) for key, cell in cells.items()}
    table = [
        {"nfe": nfe, "variant": variant, "seed": seed, "kid": row["kid"], "sd": row["kid_sd"]}
        for (nfe, variant, seed), row in rows.items()
    ]
    for variant in (*VARIANTS, *TIMESTEPS):
        texts = []
        for nfe in args.nfe:
            found = [row["kid"] for row in table if (row["nfe"], row["variant"]) == (nfe, variant)]
            texts.append(" / ".join(f"{1000 * kid:.1f}" for kid in found))
        print(f"{variant:18s} " + "   ".join(f"{text:>16s}" for text in texts))
    spread = statistics.median(row["sd"] for row in table)
    print(f"1000 x KID at NFE {args.nfe}, a number for each seed; median deviation over blocks {1000 * spread:.1f}")
    if args.out is not None:
        about = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {name: version(name) for name in ("klray", "torch")},
            "model": model.fingerprint,
            "solver": args.solver,
            "images": [args.num_samples, args.repeats],
            "fits": [{key: each[key] for key in ("nfe", "variant", "seed", "numbers")} for each in fits],
            "table": table,
        }
        args.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
