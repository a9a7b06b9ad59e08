"""Seconds and memory of one training step, as ratios within one run: python benchmarks/train_step.py --out result.json

The arms share the images, the batch, the precision and, but for lucidrains' own net, the U-Net. They take turns for
several rounds, and a ratio is the median over the rounds of the ratio within a round, so that a slow phase of the
machine meets both sides.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from klray.build import build_network, build_process
from klray.config import Config, override
from klray.data.stream import ImageStream
from klray.networks.half import amp_dtype
from klray.parallel.mesh import Mesh
from klray.runs.train_state import new_state
from klray.training.step import TrainStep

SMALL = {
    "data": {"image_size": 16, "channels": 1},
    "network": {"channels": [16, 32, 32], "attention": [False, False, False]},
    "optimizer": {"batch_size": 32},
    "precision": {"amp": "off"},
}
CIFAR10 = {
    "data": {"image_size": 32, "channels": 3},
    "network": {
        "channels": [128, 256, 256, 256],
        "attention": [False, True, False, False],
        "layers_per_block": 2,
        "norm_groups": 32,
        "dropout": 0.1,
    },
    "optimizer": {"batch_size": 128},
    "precision": {"amp": "bf16", "compile": True, "channels_last": True},
}
ARMS: dict[str, dict[str, Any]] = {
    "klray VP": {"process.num_terms": 0},
    "klray KL-8 wide": {"process.num_terms": 8, "network.architecture": "wide"},
    "klray KL-8 partial K = 1": {"process.num_terms": 8, "loss.partial_terms": 1},
    "klray KL-8 repeated, one chunk": {"process.num_terms": 8},
    "klray KL-8 repeated, term_chunk 1": {"process.num_terms": 8, "loss.term_chunk": 1},
}
RATIOS = {  # name: (numerator, denominator, target for the ratio of seconds)
    "our VP step / bare loop": ("klray VP", "bare loop", "<= 1.05 on a CPU"),
    "wide KL-8 / VP": ("klray KL-8 wide", "klray VP", "<= 1.10"),
    "partial K = 1 / VP": ("klray KL-8 partial K = 1", "klray VP", ""),
    "repeated KL-8 / VP": ("klray KL-8 repeated, one chunk", "klray VP", ""),
    "chunked / unchunked joint": (
        "klray KL-8 repeated, term_chunk 1",
        "klray KL-8 repeated, one chunk",
        "4/3 in FLOPs",
    ),
    "lucidrains, same U-Net / our VP": ("lucidrains, same U-Net", "klray VP", ">= 2 on a GPU"),
    "lucidrains, own net / our VP": ("lucidrains, own net", "klray VP", ""),
}


def klray_step(
    settings: dict[str, Any], changes: dict[str, Any], images: np.ndarray, device: torch.device, mesh: Mesh
) -> TrainStep:
    config = override(settings, changes.items())
    state = new_state(config, build_network(config), device)
    stream = ImageStream(images, 0, False, device)
    state.network.train()
    return TrainStep(config, build_process(config), state, stream, mesh, device)


def bare_loop(settings: dict[str, Any], images: np.ndarray, device: torch.device) -> Callable[[], None]:
    """What one would write for VP training without any of this."""
    config = override(settings, [("process.num_terms", 0), ("network.dropout", 0.0)])
    net = build_network(config).backbone.to(device)
    if config.precision.channels_last:
        net.to(memory_format=torch.channels_last)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = settings["network"].get("dropout", 0.0)
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    data = torch.from_numpy(images).to(device)
    amp, batch = amp_dtype(config.precision.amp, device), config.optimizer.batch_size
    net.train()
    if config.precision.compile:
        net.compile()

    def step() -> None:
        x0 = data[torch.randint(len(data), (batch,), device=device)].float() / 127.5 - 1
        t = torch.rand(batch, device=device)
        log_alpha = -0.25 * 19.9 * t**2 - 0.05 * t
        alpha = log_alpha.exp().view(-1, 1, 1, 1)
        eps = torch.randn_like(x0)
        x_t = alpha * x0 + (1 - alpha**2).sqrt() * eps
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            output = net(x_t, 1000 * t - 1).sample
        loss = (output.float() - eps).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(net)

    return step


class _SameUNet(nn.Module):
    """Our U-Net behind the interface that GaussianDiffusion expects."""

    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.net = build_network(config).backbone
        self.channels = self.out_dim = config.data.channels

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.net(x, t).sample


def lucidrains(settings: dict[str, Any], own_net: bool, folder: Path, device: torch.device) -> Callable[[int], None]:
    """denoising-diffusion-pytorch's Trainer: runs the given number of its steps."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

    config = override(settings, [("process.num_terms", 0), ("network.dropout", 0.0), ("precision.compile", False)])
    size, channels = config.data.image_size, config.data.channels
    if own_net:
        # Its README's widths; the first width gives about our parameters.
        dim = 64 if size == 32 else 16
        net: nn.Module = Unet(
            dim=dim, dim_mults=(1, 2, 4, 8) if size == 32 else (1, 2, 2), channels=channels, flash_attn=False
        )
    else:
        net = _SameUNet(config)
    diffusion = GaussianDiffusion(net, image_size=size, objective="pred_noise", beta_schedule="linear")
    trainer = Trainer(
        diffusion,
        str(folder),
        train_batch_size=config.optimizer.batch_size,
        train_num_steps=0,
        save_and_sample_every=10**9,
        results_folder=str(folder.parent / "results"),
        amp=device.type == "cuda",
        mixed_precision_type="bf16",
        calculate_fid=False,
        convert_image_to="L" if channels == 1 else "RGB",
    )

    def steps(count: int) -> None:
        trainer.train_num_steps = trainer.step + count
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            trainer.train()

    steps.parameters = sum(p.numel() for p in net.parameters())  # type: ignore[attr-defined]
    return steps


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Peak bytes: allocated on a GPU; on a CPU what autograd holds at once, the parameters left out."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    held = {"now": 0, "peak": 0}

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            self.size = 0 if tensor.is_leaf and tensor.requires_grad else tensor.numel() * tensor.element_size()
            held["now"] += self.size
            held["peak"] = max(held["peak"], held["now"])

        def __del__(self) -> None:
            held["now"] -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        yield lambda: held["peak"]


def timed(run: Callable[[int], None], count: int, device: torch.device) -> float:
    """Seconds a step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run(count)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


def repeat(step: Callable[[], Any]) -> Callable[[int], None]:
    def run(count: int) -> None:
        for _ in range(count):
            step()

    return run


def mesh_worker(rank: int, world: int, settings: dict[str, Any], images: np.ndarray, steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/init{world}", rank=rank, world_size=world)
    mesh = Mesh.create(1, world, "cpu")
    step = klray_step(settings, {"process.num_terms": 8}, images, torch.device("cpu"), mesh)
    run = repeat(step)
    run(3)
    seconds = [timed(run, steps, torch.device("cpu")) for _ in range(3)]
    if rank == 0:
        Path(folder, f"mesh{world}.json").write_text(json.dumps(statistics.median(seconds)))
    if world > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="steps of each arm in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = copy.deepcopy(CIFAR10 if device.type == "cuda" else SMALL)
    size, channels = settings["data"]["image_size"], settings["data"]["channels"]
    images = np.random.default_rng(0).integers(0, 256, (512, channels, size, size), dtype=np.uint8)

    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "images")
        files.mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0)).save(files / f"{i}.png")
        runs: dict[str, Callable[[int], None]] = {"bare loop": repeat(bare_loop(settings, images, device))}
        for name, changes in ARMS.items():
            runs[name] = repeat(klray_step(settings, changes, images, device, Mesh()))
        runs["lucidrains, same U-Net"] = lucidrains(settings, False, files, device)
        runs["lucidrains, own net"] = lucidrains(settings, True, files, device)
        memory = {}
        for name, run in runs.items():
            run(3)  # warm-up and compilation
            with peak_memory(device) as peak:
                run(1)
                memory[name] = peak()
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                seconds[name].append(timed(run, args.steps, device))
        meshes = {}
        if device.type == "cpu":
            for world in (1, 2):
                mp.spawn(mesh_worker, (world, settings, images, args.steps, folder), nprocs=world)
                meshes[world] = json.loads(Path(folder, f"mesh{world}.json").read_text())

    batch = settings["optimizer"]["batch_size"]
    result: dict[str, Any] = {
        "date": str(date.today()),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "cores": os.cpu_count(),
        "threads": args.threads,
        "versions": {p: version(p) for p in ("torch", "diffusers", "denoising-diffusion-pytorch")},
        "settings": settings,
        "arms": {},
        "ratios": {},
    }
    print(
        f"{result['device']}, {args.threads} thread(s), batch {batch}, {size}x{size}x{channels}, {result['versions']}\n"
    )
    print(f"{'arm':36} {'ms/step':>9} {'images/s':>9} {'peak MiB':>9}")
    for name in runs:
        middle = statistics.median(seconds[name])
        result["arms"][name] = {"seconds": middle, "peak_bytes": memory[name]}
        print(f"{name:36} {1000 * middle:9.1f} {batch / middle:9.0f} {memory[name] / 2**20:9.1f}")
    print(f"\n{'ratio of seconds':36} {'median':>7}  target")
    for name, (above, below, target) in RATIOS.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))
        result["ratios"][name] = ratio
        print(f"{name:36} {ratio:7.3f}  {target}")
    chunk = memory["klray KL-8 repeated, term_chunk 1"] / memory["klray KL-8 partial K = 1"]
    result["ratios"]["memory: chunked joint / one chunk"] = chunk
    print(f"{'memory: chunked joint / one chunk':36} {chunk:7.3f}  <= 1.3 (CPU), 1.2 (GPU)")
    if meshes:
        result["ratios"]["KL-8, mesh 1x1 / 1x2"] = meshes[1] / meshes[2]
        print(f"{'KL-8, mesh 1x1 / 1x2':36} {meshes[1] / meshes[2]:7.3f}  2 on two free cores")
    print(f"\nlucidrains' own net: {runs['lucidrains, own net'].parameters:,} parameters")  # type: ignore[attr-defined]
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
