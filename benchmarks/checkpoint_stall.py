"""What checkpoints cost training: the seconds in which it stands still for one, and how much slower it is beside one.

python benchmarks/checkpoint_stall.py --out result.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from statistics import median

import torch

from klray.build import build_network, build_process
from klray.config import load_config
from klray.data.sources import images_of
from klray.data.stream import ImageStream
from klray.parallel.mesh import Mesh
from klray.runs.checkpoint import save_checkpoint
from klray.runs.state_copy import StateCopy
from klray.runs.train_state import new_state
from klray.training.step import TrainStep

EVERY_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="mnist_small")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = measure(args.preset, args.set, args.rounds)
    for key, value in found.items():
        print(f"{key:45} {value}")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


def measure(preset: str, changes: list[str], rounds: int) -> dict[str, float | str]:
    """Medians over rounds; each times a checkpoint that training waits for, one beside training, and steps alone."""
    config = load_config(preset, changes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = new_state(config, build_network(config), device)
    images = ImageStream(images_of(config.data).train, config.seed, config.data.flip, device)
    step = TrainStep(config, build_process(config), state, images, Mesh(), device)
    state.network.train()

    def step_seconds() -> float:
        began = time.perf_counter()
        step()
        settle()
        return time.perf_counter() - began

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def one_round(run_dir: Path) -> dict[str, float]:
        alone = median(step_seconds() for _ in range(8))
        began = time.perf_counter()
        copied.take(state)
        copied.wait()
        save_checkpoint(run_dir, copied, config, {}, 1)
        waited_for = time.perf_counter() - began
        state.progress.images_seen += 1  # a checkpoint of its own
        began, beside = time.perf_counter(), []
        copied.take(state)
        settle()
        copying = time.perf_counter() - began
        written = thread.submit(save_checkpoint, run_dir, copied, config, {}, 1)
        while not written.done():
            beside.append(step_seconds())
        writing = time.perf_counter() - began - copying
        slower = sum(beside) - len(beside) * alone
        return {
            "s a step alone": alone,
            "s standing still, training waiting for the disk": waited_for,
            "s standing still, the disk beside training": copying,
            "s of writing beside training": writing,
            "s lost to slower steps meanwhile": slower,
        }

    copied = StateCopy()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder, ThreadPoolExecutor(1) as thread:
        for _ in range(4):  # the first steps and the first copy are not training's pace
            step()
        copied.take(state)
        results = [one_round(Path(folder)) for _ in range(rounds)]
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    found: dict[str, float | str] = {key: median(each[key] for each in results) for key in results[0]}
    waited_for, copying, _, slower = (float(value) for key, value in list(found.items())[1:])
    return {
        "date": str(date.today()),
        "machine": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()} {os.cpu_count()} cores",
        "torch": torch.__version__,
        "preset": preset,
        "checkpoint, MiB": size / 2**20,
        **found,
        f"share at one every {EVERY_S:g} s, waiting": waited_for / EVERY_S,
        f"share at one every {EVERY_S:g} s, beside": (copying + slower) / EVERY_S,
        f"of it standing still, at one every {EVERY_S:g} s": copying / EVERY_S,
    }


if __name__ == "__main__":
    main()
