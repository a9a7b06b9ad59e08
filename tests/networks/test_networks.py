"""The network of terms, starting from a baseline, folding and export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from torch import Tensor

from klray.build import build_network
from klray.config import override
from klray.core.denoiser import TermDenoiser
from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.process import SingleTerm
from klray.core.schedule import VPLinear
from klray.networks.mlp import MLP
from klray.networks.terms import TermNetwork
from klray.networks.unet import build_unet
from klray.networks.weights import fold, save_pipeline, start_from_baseline

M = 3
HO = {"image_size": 32, "in_channels": 3, "channels": (128, 256, 256, 256), "attention": (False, True, False, False)}
HO |= {"layers_per_block": 2, "norm_groups": 32}
SMALL = {"image_size": 8, "in_channels": 2, "channels": (8, 16), "attention": (False, True), "layers_per_block": 1}


def unet(out: int = 2, num_classes: int | None = None, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_unet(**SMALL, out_channels=out, norm_groups=4, num_classes=num_classes).eval()


def wide() -> TermNetwork:
    return TermNetwork(unet(2 * M), M, "wide")


def images(n: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, 8, 8, generator=generator, dtype=dtype)
    return x, torch.linspace(0.01, 1, n, dtype=torch.float64)


def test_the_published_parameter_counts() -> None:
    for classes, expected in ((None, 35_746_307), (8, 35_750_403)):
        network = build_unet(**HO, out_channels=3, dropout=0.1, num_classes=classes)
        assert sum(p.numel() for p in network.parameters()) == expected


def test_repeated_calls_the_backbone_with_time_and_label() -> None:
    backbone = unet(num_classes=M)
    x, t = images()
    output = TermNetwork(backbone, M)(x, t, torch.tensor([2, 0]))
    assert output.shape == (4, 2, 2, 8, 8)
    for place, term in enumerate([2, 0]):
        by_hand = backbone(x, (1000 * t - 1).float(), class_labels=torch.full((4,), term)).sample
        torch.testing.assert_close(output[:, place], by_hand, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output[:, 0], TermNetwork(backbone, M)(x, t, torch.tensor([2]))[:, 0])


def test_wide_gives_all_terms_in_one_call() -> None:
    backbone = unet(out=2 * M)
    network = TermNetwork(backbone, M, "wide")
    calls: list[int] = []
    backbone.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    x, t = images()
    output = network(x, t, torch.arange(M))
    assert calls == [4]
    assert torch.equal(network(x, t, torch.tensor([2, 0])), output[:, [2, 0]])
    torch.testing.assert_close(output.flatten(1, 2), backbone(x, (1000 * t - 1).float()).sample)


def test_time_offset_tokens() -> None:
    backbone, grid = unet(), 10
    network = TermNetwork(backbone, M, "repeated", "time_offset", grid)
    x, _ = images(1)
    times: list[Tensor] = []
    backbone.register_forward_pre_hook(lambda module, args: times.append(args[1]))
    for n in range(1, grid + 1):
        network(x, torch.tensor([n / grid], dtype=torch.float64), torch.arange(M))
    tokens = (torch.cat(times).double() + 1) / 1000
    expected = [(n - 1 + m / M) / grid for n in range(1, grid + 1) for m in range(1, M + 1)]
    torch.testing.assert_close(tokens, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="time_offset needs process.time_grid"):
        TermNetwork(unet(), M, "repeated", "time_offset")


@pytest.mark.parametrize("prediction", ["share", "term"])
@pytest.mark.parametrize("architecture", ["repeated", "wide"])
@pytest.mark.parametrize("marginal", ["matched", "truncated"])
def test_starting_from_a_baseline_is_exact(architecture: str, prediction: str, marginal: str) -> None:
    baseline = TermNetwork(unet(seed=1), 1)
    wide = architecture == "wide"
    network = TermNetwork(unet(out=2 * M if wide else 2, num_classes=None if wide else M), M, architecture)
    assert start_from_baseline(network, baseline.backbone.state_dict(), prediction)
    process = KarhunenLoeve(VPLinear(), M, marginal)
    x, t = images()
    started = TermDenoiser(network, process, prediction).eps_hat(x, t)
    expected = TermDenoiser(baseline, SingleTerm(VPLinear())).eps_hat(x, t)
    torch.testing.assert_close(started, expected, rtol=0, atol=1e-5)


def test_starts_that_only_approximate_say_so() -> None:
    baseline = unet(seed=1).state_dict()
    assert not start_from_baseline(TermNetwork(unet(num_classes=M), M), baseline, "coefficient")
    assert not start_from_baseline(TermNetwork(unet(), M, "repeated", "time_offset", 10), baseline, "share")


def test_an_unfit_baseline_is_refused() -> None:
    wider = build_unet(**{**SMALL, "channels": (16, 16)}, out_channels=2, norm_groups=4)
    with pytest.raises(ValueError, match="network.init_from: .* has shape .*; the networks' widths must be equal"):
        start_from_baseline(TermNetwork(unet(num_classes=M), M), wider.state_dict(), "share")
    with pytest.raises(ValueError, match="the baseline has no tensor"):
        start_from_baseline(TermNetwork(unet(), 1), {}, "share")


def test_a_wide_model_folds_into_a_plain_one() -> None:
    network = TermNetwork(unet(out=2 * M).double(), M, "wide").eval()
    process = KarhunenLoeve(VPLinear(), M)
    x, t = images(dtype=torch.float64)
    plain = TermNetwork(fold(network, "term").double(), 1)
    folded = TermDenoiser(plain, SingleTerm(VPLinear())).eps_hat(x, t)
    torch.testing.assert_close(folded, TermDenoiser(network, process).eps_hat(x, t), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["wide", "baseline"])
def test_the_exported_pipeline_gives_the_same_noise(kind: str, tmp_path: Path) -> None:
    if kind == "wide":
        network, process = TermNetwork(unet(out=2 * M), M, "wide").eval(), KarhunenLoeve(VPLinear(), M)
    else:
        network, process = TermNetwork(unet(), 1).eval(), SingleTerm(VPLinear())
    save_pipeline(network, process, "term", tmp_path)
    pipeline = DDIMPipeline.from_pretrained(tmp_path)
    assert list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.bin"))
    x, _ = images(1)
    denoiser = TermDenoiser(network, process)
    with torch.no_grad():
        for k in (0, 1, 17, 500, 999):
            ours = denoiser.eps_hat(x, torch.tensor([(k + 1) / 1000], dtype=torch.float64))
            torch.testing.assert_close(pipeline.unet(x, k).sample, ours, rtol=0, atol=1e-6)
    times = torch.arange(1, 1001, dtype=torch.float64) / 1000
    kept = pipeline.scheduler.alphas_cumprod.double()
    lam = 0.5 * torch.log(kept / (1 - kept))
    torch.testing.assert_close(lam, VPLinear().lam(times), rtol=0, atol=2e-3)  # its table is float32
    torch.testing.assert_close(kept, VPLinear().alpha(times) ** 2, rtol=2e-5, atol=0)


@pytest.mark.parametrize(
    ("network", "process", "prediction", "message"),
    [
        (lambda: TermNetwork(unet(num_classes=M), M), KarhunenLoeve(VPLinear(), M), "term", "this is repeated"),
        (
            lambda: TermNetwork(unet(2 * M), M, "wide"),
            KarhunenLoeve(VPLinear(), M),
            "share",
            "wide with prediction share",
        ),
        (wide, KarhunenLoeve(VPLinear(), M, "truncated"), "term", "the marginal is truncated"),
        (
            lambda: TermNetwork(unet(2 * M), M, "wide"),
            KarhunenLoeve(VPLinear(), M, "paper"),
            "term",
            "marginal is paper",
        ),
        (lambda: TermNetwork(unet(), 1), SingleTerm(KarhunenLoeve(VPLinear(), M, "truncated")), "term", "is truncated"),
        (lambda: TermNetwork(MLP(), 1), SingleTerm(VPLinear()), "term", "this network is MLP"),
    ],
)
def test_what_cannot_be_exported_is_refused(network, process, prediction, message, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        save_pipeline(network(), process, prediction, tmp_path)


def test_fresh_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = build_network(override({"seed": 3}, ())).state_dict()
    torch.manual_seed(6)
    again = build_network(override({"seed": 3}, ())).state_dict()
    other = build_network(override({"seed": 4}, ())).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_wide_gives_the_terms_in_the_order_asked_for() -> None:
    x, t = images()
    network = wide()
    output = network(x, t, torch.arange(M))
    assert torch.equal(network(x, t, torch.tensor([2, 0, 1])), output[:, [2, 0, 1]])


class TimeRecorder(torch.nn.Module):
    """A backbone in float64 that keeps the time it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.times: list[Tensor] = []

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        self.times.append((timestep + 1) / 1000)
        return (self.scale * sample,)


def test_time_offset_tokens_are_exact() -> None:
    """N * M different tokens, the last of each group t_n itself."""
    backbone, grid = TimeRecorder(), 10
    network = TermNetwork(backbone, M, "repeated", "time_offset", grid)
    t = torch.arange(1, grid + 1, dtype=torch.float64) / grid
    network(torch.zeros(grid, 1, 2, 2), t, torch.arange(M))
    tokens = backbone.times[0].view(grid, M)
    expected = torch.arange(1, grid * M + 1, dtype=torch.float64).view(grid, M) / (grid * M)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(tokens[:, -1], t, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_input_and_time_take_the_parameters_dtype(dtype: torch.dtype) -> None:
    network = TermNetwork(unet(num_classes=M).to(dtype), M)
    x, t = images()
    output = network(x.double(), t, torch.arange(M))
    assert output.dtype == dtype
    torch.testing.assert_close(network(x.float(), t, torch.arange(M)), output, rtol=0, atol=1e-12)


def test_fractional_times_are_seen() -> None:
    network = TermNetwork(unet(num_classes=M).double(), M)
    x, _ = images(1, torch.float64)
    times, terms = torch.tensor([[0.5], [0.50005], [0.5001]], dtype=torch.float64), torch.arange(M)
    outputs = [network(x, t, terms).detach() for t in times]
    first, second = outputs[1] - outputs[0], outputs[2] - outputs[1]
    assert float(first.abs().max()) > 1e-6
    assert float((second - first).abs().max()) < 0.2 * float(first.abs().max())  # smooth between whole steps
