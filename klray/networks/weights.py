"""Weights from one architecture to another: starting from a baseline, folding a wide model, export to diffusers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.process import NoiseProcess
from klray.networks.terms import TermNetwork

# Of a model of one term, or folded into one, in diffusers' words.
PREDICTION_TYPES = {
    "term": "epsilon",
    "coefficient": "epsilon",
    "share": "epsilon",
    "v": "v_prediction",
    "x0": "sample",
}


@torch.no_grad()
def start_from_baseline(network: TermNetwork, baseline: dict[str, Tensor], prediction: str) -> bool:
    """Copies a baseline's backbone weights into a KL network, so that its eps_hat at step 0 is the baseline's.

    ``share``, and ``v``, ``x0``, ``edm`` of a baseline of that very kind: the copy itself (``wide``: the last layer in
    all M blocks), class embedding 0. ``term``: the same
    with the last layer divided by M. ``coefficient`` would need f_m = c_m(t) eps_hat, which weights cannot give.

    Returns:
        whether eps_hat is exactly the baseline's; not for ``coefficient`` or ``time_offset``, which start nearby.

    Raises:
        ValueError: where the baseline's tensors do not fit.
    """
    target = network.backbone.state_dict()
    start = {}
    own = {name for name in target if not name.startswith("class_embedding.")}
    if unknown := sorted(baseline.keys() - own):
        raise ValueError(f"network.init_from: it has {unknown[0]}, which this network's baseline has not")
    for name, tensor in target.items():
        if name.startswith("class_embedding."):
            start[name] = torch.zeros_like(tensor)
            continue
        if name not in baseline:
            raise ValueError(f"network.init_from: the baseline has no tensor {name}; it is another network")
        source = baseline[name]
        if name.startswith("conv_out."):
            if network.wide:
                source = source.repeat(network.num_terms, *[1] * (source.dim() - 1))
            if prediction == "term":
                source = source / network.num_terms
        if source.shape != tensor.shape:
            shapes = f"{tuple(source.shape)} for {tuple(tensor.shape)}"
            raise ValueError(f"network.init_from: {name} has shape {shapes}; the networks' widths must be equal")
        start[name] = source.to(tensor)
    network.backbone.load_state_dict(start)
    return prediction != "coefficient" and network.time_grid is None


@torch.no_grad()
def fold(network: TermNetwork, prediction: str) -> nn.Module:
    """A ``wide`` ``term`` model as an ordinary noise predictor of C channels: its last layer's M blocks summed.

    A model of one term is returned as it is.

    Raises:
        ValueError: for a model that no weights of the ordinary architecture can equal.
    """
    backbone = network.backbone
    if network.num_terms == 1:
        return backbone
    if not network.wide or prediction != "term":
        kind = f"{'wide' if network.wide else 'repeated'} with prediction {prediction}"
        raise ValueError(f"only a wide model with prediction term folds into a plain one; this is {kind}")
    config = dict(backbone.config)
    config["out_channels"] //= network.num_terms
    plain = type(backbone).from_config(config).to(next(backbone.parameters()))
    state = {
        name: tensor.unflatten(0, (network.num_terms, -1)).sum(0) if name.startswith("conv_out.") else tensor
        for name, tensor in backbone.state_dict().items()
    }
    plain.load_state_dict(state)
    return plain.eval()


def save_pipeline(
    network: TermNetwork, process: NoiseProcess, prediction: str, folder: Path, *, clip_x0: bool = False
) -> None:
    """Writes a diffusers DDIMPipeline (safetensors) whose U-Net gives the model's own eps_hat.

    diffusers' time k stands for t = (k + 1)/1000, where the network sees 1000 t - 1 = k. Its betas are taken from
    alpha at those times: diffusers' own linear betas are off VPLinear by up to 0.047 in lam.

    Raises:
        ValueError: for a network that does not fold, is no U-Net, or whose process is not variance preserving.
    """
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    schedule = getattr(process, "schedule", process)
    for candidate in (process, schedule):
        if isinstance(candidate, KarhunenLoeve) and candidate.marginal != "matched":
            reason = f"the marginal is {candidate.marginal}, and diffusers' schedulers know only the VP noise level"
            raise ValueError(f"export: {reason}; train with process.marginal=matched")
    plain = fold(network, prediction)
    if not isinstance(plain, UNet2DModel):
        raise ValueError(f"export: a DDIMPipeline holds a UNet2DModel, this network is {type(plain).__name__}")
    if prediction not in PREDICTION_TYPES:
        raise ValueError(f"export: diffusers knows no prediction {prediction}; it knows {', '.join(PREDICTION_TYPES)}")
    times = torch.arange(1001, dtype=torch.float64) / 1000
    alpha = process.alpha(times)
    betas = 1 - (alpha[1:] / alpha[:-1]).square()
    kind = PREDICTION_TYPES[prediction]
    scheduler = DDIMScheduler(trained_betas=betas.numpy(), clip_sample=clip_x0, prediction_type=kind)
    DDIMPipeline(unet=plain, scheduler=scheduler).save_pretrained(folder)
