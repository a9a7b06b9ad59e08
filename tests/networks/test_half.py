"""Weights that are cast once a step train as autocast does."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from klray.build import build_network, build_process
from klray.config import Config, override
from klray.data.sources import load_images
from klray.data.stream import ImageStream
from klray.networks.half import HalfWeights
from klray.parallel.mesh import Mesh
from klray.runs.train_state import TrainState, new_state
from klray.training.step import TrainStep

CPU = torch.device("cpu")
BASE: dict[str, Any] = {
    "process": {"num_terms": 3},
    "network": {
        "channels": [16, 24],
        "attention": [False, True],
        "layers_per_block": 1,
        "norm_groups": 8,
        "dropout": 0.1,
    },
    "optimizer": {"batch_size": 8, "lr": 1e-3},
}
DATA = load_images("digits", image_size=8, limit=64)


def trained(steps: int, **changes: Any) -> tuple[TrainState, list[float]]:
    config: Config = override(BASE, [(key.replace("__", "."), value) for key, value in changes.items()])
    state = new_state(config, build_network(config), CPU)
    stream = ImageStream(DATA.train, 0, False, CPU)
    step = TrainStep(config, build_process(config), state, stream, Mesh(), CPU)
    assert (step.half is not None) == (config.precision.fused == "on" and config.precision.amp != "off")
    return state, [float(step()) for _ in range(steps)]


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_fused_steps_train_as_plain_ones_do(amp: str, chunk: int | None) -> None:
    _, plain = trained(8, precision__amp=amp, loss__term_chunk=chunk)
    _, fused = trained(8, precision__amp=amp, precision__fused="on", loss__term_chunk=chunk)
    assert fused[0] == pytest.approx(plain[0], rel=1e-6 if amp == "off" else 0.01)
    assert fused == pytest.approx(plain, rel=2e-3 if amp == "off" else 0.03)  # rounding grows from step to step


def test_gradients_of_chunks_add_up_in_float32() -> None:
    """Three chunks' gradients in bfloat16, added in bfloat16, would lose what the small ones hold."""
    config = override(BASE, [])
    network = build_network(config)
    half = HalfWeights(network, torch.bfloat16)
    weight, cast = network.backbone.conv_in.weight, half.network.backbone.conv_in.weight
    for gradient in (1.0, 2.0**-9, 2.0**-9):
        cast.grad = torch.full_like(cast, gradient)
        half.collect()
        assert cast.grad is None
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, torch.full_like(weight, 1 + 2.0**-8))


def test_matrices_are_cast_and_vectors_shared() -> None:
    network = build_network(override(BASE, []))
    half = HalfWeights(network, torch.bfloat16).network
    for (name, own), (_, cast) in zip(network.named_parameters(), half.named_parameters(), strict=True):
        if own.dim() == 1 or "class_embedding" in name:
            assert cast is own, name
        else:
            assert cast.dtype == torch.bfloat16, name


def gradients(**changes: Any) -> dict[str, torch.Tensor]:
    config: Config = override(BASE, [(key.replace("__", "."), value) for key, value in changes.items()])
    state = new_state(config, build_network(config), CPU)
    step = TrainStep(config, build_process(config), state, ImageStream(DATA.train, 0, False, CPU), Mesh(), CPU)
    found: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        found.update({name: p.grad for name, p in state.network.named_parameters() if p.grad is not None})

    state.optimizer.register_step_pre_hook(keep)
    step()
    return found


@pytest.mark.parametrize("chunk", [None, 1])
def test_every_gradient_of_the_fused_network_is_the_plain_one_s(chunk: int | None) -> None:
    """Of each parameter, not of the whole, where a small one's error would not be seen."""
    changes = {"precision__amp": "off", "optimizer__clip_norm": 1e-3}
    plain = gradients(**changes)
    fused = gradients(**changes, precision__fused="on", loss__term_chunk=chunk)
    assert plain.keys() == fused.keys()
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-4, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_no_two_gradients_lie_in_one_place(amp: str) -> None:
    """What is added to or clipped in place would otherwise be so twice."""
    places = sorted(
        (gradient.data_ptr(), gradient.data_ptr() + gradient.numel() * gradient.element_size())
        for gradient in gradients(precision__fused="on", precision__amp=amp).values()
    )
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
