"""The training loop in one process: budgets, resumption, precision, averages, non-finite steps, starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from klray.build import build_denoiser, build_network, build_process
from klray.config import Config, ConfigError, override
from klray.data.sources import load_images
from klray.data.stream import ImageStream
from klray.parallel.mesh import Mesh
from klray.runs.checkpoint import CheckpointError, load_latest, load_network, restore, save_checkpoint
from klray.runs.progress import finished
from klray.runs.state_copy import StateCopy
from klray.runs.train_state import Progress, ema_network, new_state
from klray.training.cost import cost_of
from klray.training.initialise import initialise
from klray.training.loop import train
from klray.training.meter import NonFiniteError
from klray.training.step import TrainStep
from klray.training.validate import NOISE_LEVELS, validate

CPU = torch.device("cpu")
BASE: dict[str, Any] = {
    "preset": "loop-test",
    "process": {"num_terms": 3},
    "network": {"kind": "mlp", "width": 24, "dropout": 0.1},
    "optimizer": {"batch_size": 16},
    "budget": {"unit": "steps", "amount": 12},
    "validation": {"every_images": 64, "images": 20, "batch_size": 7, "time_bins": 4},
    "checkpoint": {"every_images": 64, "keep": 2},
    "sampling": {"every_images": 1000, "images": 4, "batch_size": 3, "num_steps": 2},
    "tracking": {"every_steps": 3},
}
DATA = load_images("digits", image_size=8, limit=100)


class Log:
    """What a run reported."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.images: list[tuple[int, str]] = []

    def __call__(self, progress: Progress, metrics: dict[str, float], images: dict[str, np.ndarray]) -> None:
        if metrics:
            self.metrics.append((progress.step, metrics))
        self.images += [(progress.step, key) for key in images]

    def of(self, key: str) -> dict[int, float]:
        return {step: metrics[key] for step, metrics in self.metrics if key in metrics}


def config_of(**changes: Any) -> Config:
    return override(BASE, [(key.replace("__", "."), value) for key, value in changes.items()])


def run(folder: Path, config: Config) -> tuple[Progress, Log]:
    log = Log()
    return train(config, DATA, mesh=Mesh(), device=CPU, run_dir=folder, report=log, warn=pytest.fail), log


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    latest = load_latest(folder, pytest.fail)
    assert latest is not None
    return load_file(latest / "training.safetensors")


def test_reports_are_at_their_steps(tmp_path: Path) -> None:
    progress, log = run(tmp_path, config_of())
    assert (progress.step, progress.images_seen, progress.network_evals) == (12, 192, 576)
    assert list(log.of("train/loss")) == [3, 4, 6, 8, 9, 12]  # every 3 steps, and before each checkpoint
    assert list(log.of("val/eps_mse")) == [4, 8, 12]
    assert log.images == [(12, "samples")]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "checkpoint_000000000128",
        "checkpoint_000000000192",
    ]
    for key in ("perf/images_per_s", "perf/network_evals_per_s", "perf/memory_gib", "val/loss_t03"):
        assert min(log.of(key).values()) > 0


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    run(tmp_path / "whole", config_of())
    run(tmp_path / "parts", config_of(budget__amount=8))
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "checkpoint_000000000128")  # as if it died before writing it
    assert not finished(config_of(), tmp_path / "parts", pytest.fail)
    run(tmp_path / "parts", config_of())
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert finished(config_of(), tmp_path / "parts", pytest.fail)


def test_channels_last_resumes_with_the_same_bits(tmp_path: Path) -> None:
    """The moments must come back in the layout of the weights, which the fused optimiser walks by address."""
    unet = {"network__kind": "unet", "network__channels": [8], "network__attention": [False]}
    changes = unet | {"precision__channels_last": True}
    run(tmp_path / "whole", config_of(**changes, budget__amount=8))
    run(tmp_path / "parts", config_of(**changes, budget__amount=4))
    run(tmp_path / "parts", config_of(**changes, budget__amount=8))
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("unit", "amount", "changes", "steps"),
    [
        ("steps", 5, {}, 5),
        ("images", 100, {}, 6),  # a seventh step of 16 would exceed it
        ("network_evals", 240, {}, 5),
        ("network_evals", 240, {"loss__partial_terms": 1}, 15),
        ("network_evals", 240, {"network__architecture": "wide"}, 15),
        ("network_evals", 240, {"process__num_terms": 0}, 15),
        ("network_evals", 10, {}, 1),
    ],
)
def test_budgets(unit: str, amount: float, changes: dict[str, Any], steps: int, tmp_path: Path) -> None:
    progress, _ = run(tmp_path, config_of(budget__unit=unit, budget__amount=amount, **changes))
    assert progress.step == steps
    used = {"steps": progress.step, "images": progress.images_seen, "network_evals": progress.network_evals}[unit]
    assert used <= amount or steps == 1


def test_a_budget_in_seconds_counts_training_alone(tmp_path: Path) -> None:
    progress, _ = run(tmp_path, config_of(budget__unit="seconds", budget__amount=0.2))
    assert 0.2 <= progress.seconds < 1
    assert progress.step > 3


def drawn_by(stream: ImageStream, seen: int, positions: range) -> torch.Tensor:
    return stream.take(stream.rows(seen, positions), 0, torch.arange(positions.start, positions.stop))


def test_every_image_comes_once_a_pass_whatever_the_batches() -> None:
    images = np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1)
    stream = ImageStream(images, seed=1, flip=False, device=CPU)

    def indices(sizes: list[int]) -> list[int]:
        seen, drawn = 0, []
        for size in sizes:
            drawn += [round(float(x + 1) * 127.5) for x in drawn_by(stream, seen, range(size)).flatten()]
            seen += size
        return drawn

    drawn = indices([20] * 5)
    assert sorted(drawn[:50]) == sorted(drawn[50:]) == list(range(50))
    assert drawn[:50] != drawn[50:]
    assert indices([7] * 10 + [30]) == drawn
    halves = [drawn_by(stream, 20, part).flatten().tolist() for part in (range(10), range(10, 20))]
    assert [*halves[0], *halves[1]] == drawn_by(stream, 20, range(20)).flatten().tolist()
    assert len(set(indices([130]))) == 50  # a batch larger than the data


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_precisions_train_alike(amp: str, tmp_path: Path) -> None:
    how = {"network__dropout": 0.0, "optimizer__lr": 1e-2, "budget__amount": 30}
    _, log = run(tmp_path, config_of(precision__amp=amp, **how))
    _, control = run(tmp_path / "control", config_of(**how))
    last, expected = log.of("train/loss")[30], control.of("train/loss")[30]
    assert last == pytest.approx(expected, rel=0.02)
    assert last < 0.85 * log.of("train/loss")[3]
    assert load_network(tmp_path)[1].backbone.first.weight.dtype == torch.float32


def test_channels_last_changes_nothing_but_rounding(tmp_path: Path) -> None:
    unet = {"network__kind": "unet", "network__channels": [8], "network__attention": [False], "budget__amount": 3}
    _, plain = run(tmp_path / "a", config_of(**unet))
    _, laid_out = run(tmp_path / "b", config_of(**unet, precision__channels_last=True))
    assert laid_out.of("train/loss")[3] == pytest.approx(plain.of("train/loss")[3], rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile on the CPU needs a C++ compiler")
def test_compile_changes_nothing_but_rounding(tmp_path: Path) -> None:
    """With dropout, whose keys change at every step, and chunks of several sizes."""
    changes = {"loss__term_chunk": 2, "budget__amount": 6}
    run(tmp_path / "a", config_of(**changes))
    run(tmp_path / "b", config_of(**changes, precision__compile=True))
    plain, compiled = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert plain.keys() == compiled.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_average_follows_the_weights(tmp_path: Path) -> None:
    """decay min(d, (1 + n)/(10 + n)) at update n, every 2 steps; the first update is a copy."""
    config = config_of(ema__decay=0.25, ema__every=2)
    state = new_state(config, build_network(config), CPU)
    step = TrainStep(config, build_process(config), state, ImageStream(DATA.train, 0, False, CPU), Mesh(), CPU)
    state.network.train()
    expected = None
    for i in range(1, 9):
        step()
        weight = state.network.backbone.first.weight.detach().clone()
        if i % 2 == 0:
            n = i // 2 - 1
            decay = min(0.25, (1 + n) / (10 + n))
            expected = weight if expected is None else decay * expected + (1 - decay) * weight
            torch.testing.assert_close(ema_network(state).backbone.first.weight, expected)
    assert not ema_network(state).training


def test_warm_up_and_clipping() -> None:
    config = config_of(optimizer__warmup_images=64, optimizer__lr=0.1, optimizer__clip_norm=1e-3)
    state = new_state(config, build_network(config), CPU)
    step = TrainStep(config, build_process(config), state, ImageStream(DATA.train, 0, False, CPU), Mesh(), CPU)
    norms, rates = [], []

    def watch(optimizer: Any, args: Any, kwargs: Any) -> None:
        norms.append(float(torch.cat([p.grad.flatten() for p in step.parameters]).norm()))
        rates.append(optimizer.param_groups[0]["lr"])

    state.optimizer.register_step_pre_hook(watch)
    state.network.train()
    for _ in range(6):
        step()
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert max(norms) <= 1e-3 * (1 + 1e-5)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_non_finite_step_is_skipped_and_counted(amp: str) -> None:
    config = config_of(precision__amp=amp)
    state = new_state(config, build_network(config), CPU)
    images = ImageStream(DATA.train, 0, False, CPU)
    step = TrainStep(config, build_process(config), state, images, Mesh(), CPU)
    state.network.train()
    for _ in range(3):
        step()
    before = {name: tensor.clone() for name, tensor in state.network.state_dict().items()}
    healthy = images.take
    images.take = lambda *args: healthy(*args) * float("nan")  # type: ignore[method-assign]
    step()
    assert all(torch.equal(before[name], tensor) for name, tensor in state.network.state_dict().items())
    assert state.nonfinite.tolist() == [1, 1]
    images.take = healthy  # type: ignore[method-assign]
    step()
    assert state.nonfinite.tolist() == [1, 0]
    assert not all(torch.equal(before[name], tensor) for name, tensor in state.network.state_dict().items())


def test_a_diverged_run_stops_and_keeps_its_good_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, config_of(budget__amount=4))
    good = tensors(tmp_path)
    broken = config_of(optimizer__lr=1e38, optimizer__clip_norm=None, optimizer__max_nonfinite=3, budget__amount=400)
    with pytest.raises(NonFiniteError, match="steps in a row had a non-finite gradient.*lower optimizer.lr"):
        run(tmp_path, broken)
    kept = tensors(tmp_path)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())
    assert all(torch.equal(good[name], kept[name]) for name in good)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run(tmp_path, config_of(budget__amount=1))
    latest = load_latest(tmp_path, pytest.fail)
    assert latest is not None
    other = config_of(network__width=12)
    with pytest.raises(CheckpointError, match="is of another model"):
        restore(latest, new_state(other, build_network(other), CPU))


def test_a_checkpoint_holds_what_it_says(tmp_path: Path) -> None:
    config = config_of()
    state = new_state(config, build_network(config), CPU)
    state.progress.images_seen = 48
    copied = StateCopy()
    copied.take(state)
    path = save_checkpoint(tmp_path, copied, config, {"klray.git": "abc"}, keep=1)
    assert path.name == "checkpoint_000000000048"
    assert not list(tmp_path.rglob("*.pt"))
    assert not list(tmp_path.rglob("*.pkl"))
    loaded, network = load_network(path)
    assert loaded == config
    assert torch.equal(network.backbone.first.weight, ema_network(state).backbone.first.weight)


@pytest.mark.parametrize("prediction", ["term", "coefficient", "share"])
def test_the_prediction_means_nothing_to_a_process_of_one_whole_term(prediction: str, tmp_path: Path) -> None:
    """Its coefficient is 1; but one term of the paper's marginal has another, and is told apart."""
    for name, process in (("vp", {"process__num_terms": 0}), ("paper", {"process__marginal": "paper"})):
        for kind in ("term", prediction):
            changes = {"process__num_terms": 1} | process | {"loss__prediction": kind, "budget__amount": 3}
            run(tmp_path / name / kind, config_of(**changes))
        first, other = (tensors(tmp_path / name / kind) for kind in ("term", prediction))
        same = all(torch.equal(first[key], other[key]) for key in first)
        assert same == (name == "vp" or prediction != "coefficient")  # the share of one term is 1 as well


@pytest.mark.parametrize("architecture", ["repeated", "wide"])
@pytest.mark.parametrize("prediction", ["share", "term"])
def test_init_from_starts_at_the_baseline(architecture: str, prediction: str, tmp_path: Path) -> None:
    run(tmp_path / "base", config_of(process__num_terms=0))
    changes = {"network__init_from": str(tmp_path / "base"), "network__architecture": architecture}
    config = config_of(**changes, loss__prediction=prediction, budget__amount=1, optimizer__lr=1e-30)
    run(tmp_path / "kl", config)
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.01, 1, 5, dtype=torch.float64)
    estimates = []
    for name in ("base", "kl"):
        own, network = load_network(tmp_path / name)
        estimates.append(build_denoiser(own, network, build_process(own)).eps_hat(x, t))
    torch.testing.assert_close(estimates[1], estimates[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "process",
    [
        {"process__num_terms": 0},
        {"process__num_terms": 4},
        {"process__num_terms": 1, "process__marginal": "truncated"},
        {"process__num_terms": 4, "process__kind": "vp_truncated"},
        {"process__num_terms": 4, "process__kind": "vp_ensemble"},
        {"process__num_terms": 4, "process__marginal": "paper"},
    ],
)
def test_eps_mse_has_the_same_levels_for_every_process(process: dict[str, Any]) -> None:
    """A network that knows nothing (output 0) has the mean square of the noise as its error, at every level."""
    config = config_of(**process)
    network = build_network(config).eval()
    with torch.no_grad():
        for parameter in network.backbone.conv_out.parameters():
            parameter.zero_()
    held_out = torch.from_numpy(DATA.held_out)
    metrics = validate(config, build_process(config), network, held_out, Mesh(), CPU)
    levels = [value for key, value in metrics.items() if key.startswith("val/eps_mse_lam")]
    assert len(levels) == len(NOISE_LEVELS) == 8
    assert metrics["val/eps_mse"] == pytest.approx(1.0, abs=0.05)
    own = build_process(config)
    times = own.t_of_lam(torch.tensor(NOISE_LEVELS, dtype=torch.float64))
    assert bool((times > own.t_min).all())
    assert bool((times < own.t_max).all())


def test_cost() -> None:
    base = cost_of(config_of(), build_network(config_of()))
    chunked = cost_of(config_of(loss__term_chunk=1), build_network(config_of()))
    assert base["cost.train_flops_per_image"] == 9 * base["cost.flops_per_eval"]
    assert chunked["cost.train_flops_per_image"] == 11 * base["cost.flops_per_eval"]
    width = 24  # first, time, hidden, last layer: 2 x multiply-adds
    assert base["cost.flops_per_eval"] == 2 * (64 * width + width * width + width * width + width * 64)


def test_init_from_a_diffusers_folder(tmp_path: Path) -> None:
    unet = {"network__kind": "unet", "network__channels": [8], "network__attention": [False], "network__dropout": 0.0}
    baseline = build_network(config_of(**unet, process__num_terms=0, seed=5)).backbone
    baseline.save_pretrained(tmp_path / "pipeline" / "unet")
    config = config_of(**unet, network__init_from=str(tmp_path / "pipeline"), loss__prediction="share")
    network = build_network(config)
    initialise(config, network, warn=pytest.fail)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.9], dtype=torch.float64)
    with torch.no_grad():
        expected = baseline(x, (1000 * t - 1).float()).sample
        torch.testing.assert_close(network(x, t, torch.tensor([1]))[:, 0], expected, rtol=0, atol=1e-5)
    torn = tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    with pytest.raises(ConfigError, match="network.init_from: .* holds no readable UNet2DModel"):
        initialise(config, network, warn=pytest.fail)
