"""Is a sharded step the step of one rank? python benchmarks/mesh_check.py --out result.json

Each case trains the digits U-Net for a few steps on one rank and over a mesh, as commands of their own, and compares
losses and weights. On a machine with one GPU the ranks share it, over gloo; without a GPU they are CPU processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

STEPS = 8
LATER = {f"{section}.every_images": 10**12 for section in ("sampling", "validation", "checkpoint")}
BASE = LATER | {
    "tracking.uri": "off",
    "tracking.every_steps": 1,
    "budget.unit": "steps",
    "budget.amount": STEPS,
    "validation.images": 1,
    "sampling.images": 1,
    "sampling.num_steps": 1,
    "precision.amp": "off",
    "optimizer.batch_size": 64,
    "optimizer.warmup_images": 0,
    "network.dropout": 0.1,
}
# With a large eps one step of AdamW moves the weights by minus their gradient.
SLOPE = {"budget.amount": 1, "optimizer.eps": 1e3, "optimizer.lr": 1e3, "optimizer.clip_norm": None}


@dataclass(frozen=True)
class Case:
    """A mesh and the settings that both sides have."""

    data: int
    basis: int
    sets: dict[str, object]


CASES = {
    "2 x 1": Case(2, 1, {}),
    "1 x 2": Case(1, 2, {}),
    "1 x 3, 4 terms": Case(1, 3, {}),
    "2 x 2": Case(2, 2, {}),
    "1 x 2, one term at a time": Case(1, 2, {"loss.term_chunk": 1}),
    "1 x 3, K = 2 of 4": Case(1, 3, {"loss.partial_terms": 2}),
    "2 x 1, wide": Case(2, 1, {"network.architecture": "wide"}),
    "1 x 2, bf16": Case(1, 2, {"precision.amp": "bf16"}),
    "1 x 2, fp16": Case(1, 2, {"precision.amp": "fp16"}),
    "1 x 2, the gradient": Case(1, 2, SLOPE),
    "2 x 1, the gradient": Case(2, 1, SLOPE),
    "1 x 2, the gradient, fp16": Case(1, 2, SLOPE | {"precision.amp": "fp16"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--at-once", type=int, default=2, help="commands beside each other")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    cases = {name: CASES[name] for name in args.cases if on_gpu or "fp16" not in name}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.at_once) as threads:
        alone = {json.dumps(case.sets): case.sets for case in cases.values()}
        ends = {
            key: threads.submit(train, Path(folder), f"alone_{i}", sets) for i, (key, sets) in enumerate(alone.items())
        }
        meshes = {
            name: threads.submit(train, Path(folder), f"mesh_{i}", case.sets, (case.data, case.basis))
            for i, (name, case) in enumerate(cases.items())
        }
        rows = []
        for name, case in cases.items():
            try:
                rows.append({"case": name, **compare(meshes[name].result(), ends[json.dumps(case.sets)].result())})
            except RuntimeError as error:
                rows.append({"case": name, "error": str(error)})
            print(json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        card = torch.cuda.get_device_name() if on_gpu else "CPU"
        args.out.write_text(json.dumps({"device": card, "torch": version("torch"), "rows": rows}, indent=1) + "\n")


def train(runs: Path, name: str, sets: dict[str, object], mesh: tuple[int, int] | None = None) -> Path:
    """The folder of the finished run."""
    launch = [sys.executable, "-m"]
    if mesh is not None:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(mesh[0] * mesh[1]), "-m"]
        sets = sets | {"mesh.data": mesh[0], "mesh.basis": mesh[1]}
    command = [*launch, "klray.train", "--config", "digits", "--runs", str(runs), "--name", name]
    command += ["--runner", "local" if mesh is None else "torchrun"]
    for key, value in (BASE | sets).items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    exact = {"OMP_NUM_THREADS": "1", "NVIDIA_TF32_OVERRIDE": "0"}
    done = subprocess.run(command, env={**os.environ, **exact}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(" ".join((done.stdout + done.stderr).split())[-400:])
    return runs / name


def compare(mesh: Path, alone: Path) -> dict[str, object]:
    """Losses of the first step and of all, and the weights' moves."""
    losses = [np.array([line["train/loss"] for line in records(run) if "train/loss" in line]) for run in (mesh, alone)]
    off = np.abs(losses[0] - losses[1]) / np.abs(losses[1])
    ours, theirs = (weights(run) for run in (mesh, alone))
    return {
        "first_loss": float(off[0]),
        "all_losses": float(off.max()),
        "weights": float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)),
        "skipped": [records(run)[-1].get("train/skipped_steps") for run in (mesh, alone)],
    }


def records(run: Path) -> list[dict[str, float]]:
    """The run's metrics."""
    lines = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    return [line["values"] for line in lines if line["kind"] == "metrics" and "train/loss" in line["values"]]


def weights(run: Path) -> np.ndarray:
    """All of the trained weights, as one vector."""
    tensors = load_file(next(run.glob("checkpoints/*/training.safetensors")))
    return np.concatenate([tensors[name].ravel().astype(np.float64) for name in sorted(tensors) if "network." in name])


if __name__ == "__main__":
    main()
