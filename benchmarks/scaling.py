"""Seconds of a training step on 1, 2 and 4 gloo processes, and the model behind ``--dry-run`` fitted to them.

python benchmarks/scaling.py --out result.json

Every mesh trains the digits U-Net with KL, M = 4, one thread a process. The constants of klray/training/step_time.py
are fitted by least squares of relative errors; the table shows what the model says beside what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
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
from klray.config import load_config, override
from klray.parallel.mesh import Mesh
from klray.training.cost import step_work
from klray.training.step_time import Machine, convolution_rate, step_time

MESHES = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]
CPU = torch.device("cpu")


def worker(rank: int, data: int, basis: int, preset: str, steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    if data * basis > 1:
        meeting = f"file://{folder}/init_{data}_{basis}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=data * basis)
    config = load_config(preset)
    shape = (512, config.data.channels, config.data.image_size, config.data.image_size)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    run = repeat(klray_step(config.model_dump(), {}, images, CPU, Mesh.create(data, basis, "cpu")))
    run(3)
    seconds = [timed(run, steps, CPU) for _ in range(3)]
    if rank == 0:
        Path(folder, f"{data}_{basis}.json").write_text(json.dumps(statistics.median(seconds)))
    if dist.is_initialized():
        dist.destroy_process_group()


def main(args: argparse.Namespace) -> None:
    config = override(load_config(args.config).model_dump(), ())
    work = step_work(config, build_network(config))
    rate = convolution_rate(CPU)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for data, basis in MESHES:
            mp.spawn(worker, (data, basis, args.config, args.steps, folder), nprocs=data * basis)
            measured.append(json.loads(Path(folder, f"{data}_{basis}.json").read_text()))
    cores = os.cpu_count() or 1

    def machine(logs: np.ndarray) -> Machine:
        share, fixed, latency, bandwidth = np.exp(logs)
        return Machine(share * rate, cores, fixed, latency, bandwidth)

    def errors(logs: np.ndarray) -> list[float]:
        said = [step_time(work, machine(logs), *mesh).total for mesh in MESHES]
        return [np.log(s / m) for s, m in zip(said, measured, strict=True)]

    best = least_squares(
        errors, np.log([0.5, 5e-3, 3e-3, 1e9]), bounds=(np.log([0.01, 1e-4, 1e-5, 1e7]), np.log([2, 1, 1, 1e11]))
    )
    fitted = machine(best.x)
    rows = []
    for mesh, seconds in zip(MESHES, measured, strict=True):
        said = step_time(work, fitted, *mesh).total
        efficiency = measured[0] / seconds / (mesh[0] * mesh[1])
        rows.append({"mesh": f"{mesh[0]} x {mesh[1]}", "seconds": seconds, "model": said, "efficiency": efficiency})
        print(
            f"{rows[-1]['mesh']}   {1000 * seconds:7.1f} ms   model {1000 * said:7.1f} ms   efficiency {efficiency:.2f}"
        )
    constants = dict(zip(("unet_share", "fixed", "latency", "bandwidth"), np.exp(best.x).tolist(), strict=True))
    print(constants)
    if args.out is not None:
        about = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {cores} cores",
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
