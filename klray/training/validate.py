"""Validation with the averaged weights: the training loss per time bin, and one error that all processes share."""

from __future__ import annotations

import torch
from torch import Tensor

from klray.build import build_denoiser, build_encoder, build_parametrisation
from klray.config import Config
from klray.core.losses import kl_loss
from klray.core.process import NoiseProcess, training_times
from klray.networks.half import amp_dtype, in_precision
from klray.networks.terms import TermNetwork
from klray.parallel.mesh import Mesh
from klray.parallel.random import Purpose, normal, uniform
from klray.training.step import call_size

# log(alpha/sigma); inside the range of every process, the truncated one of a single term included.
NOISE_LEVELS = tuple(-2.5 + 6.5 * i / 7 for i in range(8))


@torch.no_grad()
def validate(
    config: Config, process: NoiseProcess, network: TermNetwork, images: Tensor, mesh: Mesh, device: torch.device
) -> dict[str, float]:
    """``val/loss``, ``val/loss_tNN`` and ``val/eps_mse`` on held-out images, uint8 [n, C, H, W]; equal on every rank.

    ``val/eps_mse`` is the mean square of eps_hat - eps at fixed noise levels with fixed noise, the same for every
    process and seed; with M terms, coupling and marginal it stays comparable, which the loss does not.
    """
    count, bins = min(config.validation.images, len(images)), config.validation.time_bins
    encoder = build_encoder(config)
    levels = torch.tensor(NOISE_LEVELS, dtype=torch.float64, device=device)
    times = process.t_of_lam(levels)
    predict = in_precision(network, amp_dtype(config.precision.amp, device))
    step_images, chunk = call_size(config, mesh)
    denoiser = build_denoiser(config, predict, process, term_chunk=chunk)

    def predict_in_chunks(x: Tensor, t: Tensor, terms: Tensor) -> Tensor:
        return torch.cat([predict(x, t, part) for part in terms.split(chunk)], dim=1)

    # Sums over images, and how many: per noise level, then per time bin.
    sums = torch.zeros(2, len(levels) + bins, dtype=torch.float64, device=device)
    mine = mesh.share(count)
    # Without gradients no activations are kept, so this many images take less memory than a training step.
    size = min(config.validation.batch_size, 2 * step_images)
    for start in range(mine.start, mine.stop, size):
        stop = min(start + size, mine.stop)
        where = torch.arange(start, stop, device=device)
        # By a slice: CUDA refuses an index on the device for images on the host.
        x0 = encoder.encode(images[start:stop].to(device))
        for level, t in enumerate(times):
            noise = normal(0, level, Purpose.VALIDATION_NOISE, where, (1, *x0.shape[1:]), x0.dtype)
            x_t = process.alpha(t) * x0 + process.sigma(t) * noise[:, 0]
            error = (denoiser.eps_hat(x_t, t.expand(len(x0))) - noise[:, 0]).square().flatten(1).mean(1)
            sums[:, level] += torch.stack([error.double().sum(), torch.ones_like(error).double().sum()])
        z = normal(0, len(levels), Purpose.VALIDATION_NOISE, where, (process.num_terms, *x0.shape[1:]), x0.dtype)
        for bin_index in range(bins):
            u = (bin_index + uniform(0, bin_index, Purpose.VALIDATION_TIME, where)) / bins
            t = training_times(process, u)
            loss = kl_loss(
                predict_in_chunks,
                process,
                x0,
                z,
                t,
                coupling=config.loss.coupling,
                prediction=build_parametrisation(config),
            )
            sums[:, len(levels) + bin_index] += torch.stack([loss.double().sum(), torch.ones_like(loss).double().sum()])
    totals = mesh.sum_over_all(sums)
    means = (totals[0] / totals[1]).tolist()
    errors, losses = means[: len(levels)], means[len(levels) :]
    result = {"val/eps_mse": sum(errors) / len(errors), "val/loss": sum(losses) / len(losses)}
    result |= {f"val/eps_mse_lam{level:.2f}": e for level, e in zip(NOISE_LEVELS, errors, strict=True)}
    return result | {f"val/loss_t{i:02d}": loss for i, loss in enumerate(losses)}
