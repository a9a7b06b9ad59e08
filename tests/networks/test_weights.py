"""What a network may start from, and what diffusers makes of an exported model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel

from klray.core.denoiser import TermDenoiser
from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.schedule import VPLinear
from klray.core.solvers import SOLVERS
from klray.networks.terms import TermNetwork
from klray.networks.unet import build_unet
from klray.networks.weights import fold, save_pipeline, start_from_baseline

M = 3


def unet(out: int = 1, num_classes: int | None = None, layers: int = 1) -> UNet2DModel:
    torch.manual_seed(0)
    return build_unet(
        image_size=8,
        in_channels=1,
        out_channels=out,
        channels=(8, 8),
        attention=(False, False),
        layers_per_block=layers,
        norm_groups=4,
        num_classes=num_classes,
    ).eval()


@pytest.mark.parametrize(
    "other", [unet(layers=2), unet(num_classes=M)], ids=["a deeper network", "a network with a term index"]
)
def test_a_network_with_more_tensors_is_no_baseline(other: UNet2DModel) -> None:
    """All tensors that are needed are there and fit, but the outputs would be another network's."""
    with pytest.raises(ValueError, match=r"network.init_from: it has (class_embedding|.*resnets\.)"):
        start_from_baseline(TermNetwork(unet(num_classes=M), M), other.state_dict(), "share")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folding_keeps_the_dtype_and_leaves_the_model_alone(dtype: torch.dtype) -> None:
    network = TermNetwork(unet(M).to(dtype), M, "wide").eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    plain = fold(network, "term")
    assert {parameter.dtype for parameter in plain.parameters()} == {dtype}
    assert plain.config["out_channels"] == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("clip", [False, True])
def test_diffusers_samples_the_exported_model_as_we_do(clip: bool, tmp_path: Path) -> None:
    """The whole pipeline: U-Net, betas, clipping, the kind of prediction, and where the last step ends."""
    network, process = TermNetwork(unet(M), M, "wide").eval(), KarhunenLoeve(VPLinear(), M)
    save_pipeline(network, process, "term", tmp_path, clip_x0=clip)
    pipeline = DDIMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = pipeline(
        batch_size=2,
        num_inference_steps=10,
        eta=0.0,
        use_clipped_model_output=clip,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    times = torch.tensor([901, 801, 701, 601, 501, 401, 301, 201, 101, 1, 0], dtype=torch.float64) / 1000
    denoiser = TermDenoiser(network, process, clip_x0=clip)
    with torch.no_grad():
        x = SOLVERS["ddim"].sample(denoiser, process, noise, times)
    ours = (x / 2 + 0.5).clamp(0, 1)[:, 0]
    torch.testing.assert_close(torch.from_numpy(theirs).reshape(ours.shape), ours, rtol=0, atol=2e-3)
    assert float(ours.std()) > 0.1
    assert float(pipeline.scheduler.final_alpha_cumprod) == 1  # no noise is left


def test_the_exported_noise_levels_are_ours_up_to_float32(tmp_path: Path) -> None:
    save_pipeline(TermNetwork(unet(M), M, "wide"), KarhunenLoeve(VPLinear(), M), "term", tmp_path)
    kept = DDIMPipeline.from_pretrained(tmp_path).scheduler.alphas_cumprod.double()
    lam = 0.5 * torch.log(kept / (1 - kept))
    error = (lam - VPLinear().lam(torch.arange(1, 1001, dtype=torch.float64) / 1000)).abs()
    assert float(error.max()) < 3e-4  # 1 - 1.1e-4 in float32
    assert float(error[100:].max()) < 1e-6
