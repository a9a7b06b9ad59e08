"""Sampling speed against diffusers' pipeline with the same network, and what an evaluation of 10,000 images costs.

python benchmarks/sampling.py --out result.json

The arms make the same number of network calls on the same batch and take turns for several rounds; a ratio is the
median over the rounds of the ratio within a round, so that a slow phase of the machine meets both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from klray.build import Sampler, build_network, build_sampler
from klray.config import Config, Sampling, load_config
from klray.core.denoiser import Denoiser
from klray.core.schedule import VPDiscrete
from klray.core.solvers import SOLVERS
from klray.evaluation.features import build_extractor
from klray.evaluation.scores import fid, kid
from klray.evaluation.statistics import Moments
from klray.sampling.draw import sample_images
from klray.sampling.imported import ImportedModel

NFE = 20
PEER = "diffusers DDIMPipeline"


def imported(network: Any, schedule: VPDiscrete) -> Denoiser:
    """The denoiser of a diffusers model that predicts the noise."""
    return ImportedModel(network, schedule, "epsilon", False, 1.0, (1, 16, 16), None).denoiser(False)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def arms_of(config: Config, batch: int, device: torch.device, compiled: bool) -> dict[str, Callable[[], object]]:
    """Each draws ``batch`` images with NFE network calls."""
    network = build_network(config).backbone.to(device).eval().requires_grad_(False)
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    schedule = VPDiscrete(torch.cumprod(1 - betas, 0))
    denoiser = imported(network, schedule)
    pipeline = DDIMPipeline(unet=network, scheduler=DDIMScheduler(clip_sample=False)).to(device)
    pipeline.set_progress_bar_config(disable=True)

    def bare() -> Tensor:
        x, t = torch.randn(batch, *shape, device=device), torch.full((batch,), 500.0, device=device)
        with torch.no_grad():
            for _ in range(NFE):
                x = x + 1e-3 * network(x, t, return_dict=False)[0]
        return x

    def scheduled(scheduler: DPMSolverMultistepScheduler | UniPCMultistepScheduler) -> Tensor:
        x = torch.randn(batch, *shape, device=device)
        scheduler.set_timesteps(NFE, device=device)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t).sample, t, x).prev_sample
        return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    def klray(sampler: Sampler) -> Tensor:
        return sample_images(denoiser, schedule, sampler, range(batch), shape, batch_size=batch, device=device)

    arms: dict[str, Callable[[], object]] = {
        "bare calls of the network": bare,
        PEER: lambda: pipeline(batch_size=batch, num_inference_steps=NFE, output_type="np"),
        "diffusers DPMSolverMultistep": lambda: scheduled(DPMSolverMultistepScheduler()),
        "diffusers UniPCMultistep": lambda: scheduled(UniPCMultistepScheduler()),
    }
    for name in SOLVERS:
        sampler = build_sampler(Sampling(solver=name, nfe=NFE))
        arms[f"klray {name}"] = lambda sampler=sampler: klray(sampler)  # type: ignore[misc]
    if compiled:
        fast = build_network(config).backbone.to(device).eval().requires_grad_(False)
        fast.compile(mode="reduce-overhead" if device.type == "cuda" else None, dynamic=False)
        quick = imported(fast, schedule)
        sampler = build_sampler(Sampling(solver="ddim", nfe=NFE))
        arms["klray ddim, compiled"] = lambda: sample_images(
            quick, schedule, sampler, range(batch), shape, batch_size=batch, device=device
        )
    return arms


def evaluation_seconds(count: int, size: int, channels: int, device: torch.device) -> dict[str, float]:
    """Features of ``count`` images, and the scores of them against as many."""
    extract = build_extractor("efficientnet_lite0", device=device)
    images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8)
    extract(images[:64])
    began = time.perf_counter()
    features = torch.cat([extract(part)["features"] for part in images.split(256)])
    seconds = {"features": time.perf_counter() - began}
    other = features[torch.randperm(count)] + 0.1
    began = time.perf_counter()
    moments = Moments.of(features)
    seconds["moments"] = time.perf_counter() - began
    began = time.perf_counter()
    fid(moments, Moments.of(other))
    seconds["FID"] = time.perf_counter() - began
    began = time.perf_counter()
    kid(features, other)
    seconds["KID"] = time.perf_counter() - began
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--evaluate", type=int, default=10_000, help="images of the evaluation; 0 for none")
    parser.add_argument("--compile", action="store_true", help="one more arm, with the network compiled")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = "cifar10" if device.type == "cuda" else "mnist_small"
    config = load_config(preset, ["process.num_terms=0"])
    arms = arms_of(config, args.batch_size, device, args.compile or device.type == "cuda")
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()
    for _ in range(args.rounds):
        for name, arm in arms.items():
            synchronize(device)
            began = time.perf_counter()
            arm()
            synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    rows = {
        name: {
            "images_per_s": args.batch_size / statistics.median(times),
            "speed_over_peer": statistics.median(peer / own for peer, own in zip(seconds[PEER], times, strict=True)),
        }
        for name, times in seconds.items()
    }
    print(f"{'arm':32s} {'images/s':>10s}  speed / {PEER}")
    for name, row in rows.items():
        print(f"{name:32s} {row['images_per_s']:10.1f}  {row['speed_over_peer']:.2f}")
    result = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "torch-fidelity")},
        "network": preset,
        "batch_size": args.batch_size,
        "nfe": NFE,
        "arms": rows,
        "seconds": seconds,
    }
    if args.evaluate:
        costs = evaluation_seconds(args.evaluate, config.data.image_size, config.data.channels, device)
        print(f"\nevaluation of {args.evaluate:,} images, efficientnet_lite0, without drawing them")
        for name, value in costs.items():
            print(f"{name:32s} {value:10.1f} s")
        result["evaluation"] = {"images": args.evaluate, "seconds": costs}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
