"""Seconds of a training step on 1, 2 and 4 gloo processes, and the model behind ``--dry-run`` fitted to them.

python benchmarks/scaling.py --out result.json

Every mesh trains the digits U-Net with KL, M = 4, one thread a process. The constants of klray/training/step_time.py
are fitted by least squares of relative errors; the table shows what the model says beside what was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scipy.optimize import least_squares
from train_step import klray_step, repeat, timed

from klray.build import build_network
from klray.config import load_config
from klray.parallel.mesh import Mesh
from klray.training.cost import cost_of, step_work
from klray.training.step_time import Machine, convolution_rate, step_time

MESHES = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]
BATCHES = [16, 64]
CPU = torch.device("cpu")


def worker(rank: int, data: int, basis: int, preset: str, steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    if data * basis > 1:
        meeting = f"file://{folder}/init_{data}_{basis}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=data * basis)
    mesh = Mesh.create(data, basis, "cpu")
    config = load_config(preset)
    shape = (512, config.data.channels, config.data.image_size, config.data.image_size)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    found = []
    for batch in BATCHES:
        run = repeat(klray_step(config.model_dump(), {"optimizer.batch_size": batch}, images, CPU, mesh))
        run(3)
        found.append(statistics.median(timed(run, steps, CPU) for _ in range(3)))
    if rank == 0:
        Path(folder, f"{data}_{basis}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


def main(args: argparse.Namespace) -> None:
    config = load_config(args.config)
    work = step_work(config, cost_of(config, build_network(config)))
    rate = convolution_rate(CPU)
    cells, measured = [], []
    with tempfile.TemporaryDirectory() as folder:
        for data, basis in MESHES:
            mp.spawn(worker, (data, basis, args.config, args.steps, folder), nprocs=data * basis)
            cells += [(replace(work, images=batch), data, basis) for batch in BATCHES]
            measured += json.loads(Path(folder, f"{data}_{basis}.json").read_text())

    def machine(logs: np.ndarray) -> Machine:
        share, full_speed, fixed, latency, bandwidth = np.exp(logs)
        return Machine(share * rate, full_speed, fixed, latency, bandwidth)

    def errors(logs: np.ndarray) -> list[float]:
        said = [step_time(of, machine(logs), *mesh).total for of, *mesh in cells]
        return [math.log(s / m) for s, m in zip(said, measured, strict=True)]

    start, low, high = [0.5, 1.5, 5e-3, 3e-3, 1e9], [0.01, 1, 1e-5, 1e-5, 1e7], [2, 64, 1, 1, 1e11]
    best = least_squares(errors, np.log(start), bounds=(np.log(low), np.log(high)))
    rows = []
    for (of, data, basis), seconds in zip(cells, measured, strict=True):
        said = step_time(of, machine(best.x), data, basis).total
        alone = measured[BATCHES.index(of.images)]
        row = {"mesh": f"{data} x {basis}", "batch": of.images, "seconds": seconds, "model": said}
        rows.append(row | {"efficiency": alone / seconds / (data * basis)})
        texts = "{mesh}  batch {batch:3d}  {seconds:.4f} s  model {model:.4f} s  efficiency {efficiency:.2f}"
        print(texts.format(**rows[-1]))
    names = ("unet_share", "full_speed", "fixed", "latency", "bandwidth")
    constants = dict(zip(names, np.exp(best.x).tolist(), strict=True))
    print(constants, "rms of log errors", round(float(np.sqrt(np.mean(best.fun**2))), 3))
    if args.out is not None:
        about = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"torch": version("torch")},
            "preset": args.config,
            "convolution_flops_per_s": rate,
            "constants": constants,
            "rows": rows,
        }
        args.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    main(parser.parse_args())
