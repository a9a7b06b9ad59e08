"""What a configuration costs: parameters and arithmetic, counted without running it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode

from klray.config import Config
from klray.networks.terms import TermNetwork
from klray.training.step_time import StepWork


def cost_of(config: Config, network: TermNetwork) -> dict[str, int]:
    """``cost.parameters``; ``cost.flops_per_eval``, one forward network evaluation of one image (2 x multiply-adds);
    ``cost.train_flops_per_image``, forward and backward over the step's terms, and once more forward for all chunks
    but one where the joint loss runs in chunks.
    """
    meta = network.to("meta")
    shape = (1, config.data.channels, config.data.image_size, config.data.image_size)
    meta.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta(
            torch.empty(shape, device="meta"),
            torch.empty(1, device="meta"),
            torch.zeros(1, dtype=torch.long, device="meta"),
        )
    forward = counter.get_total_flops()
    evals, chunk = config.evals_per_image, config.loss.term_chunk
    again = max(0, evals - chunk) if chunk and config.loss.coupling == "joint" else 0
    return {
        "cost.parameters": sum(p.numel() for p in network.parameters()),
        "cost.flops_per_eval": forward,
        "cost.train_flops_per_image": forward * (3 * evals + again),
    }


def step_work(config: Config, cost: Mapping[str, int]) -> StepWork:
    """What ``step_time`` needs to know of a configuration, whose ``cost_of`` is given. A ``wide`` network makes all
    terms in one evaluation."""
    terms, settings = config.evals_per_image, config.data
    return StepWork(
        config.optimizer.batch_size,
        terms,
        cost["cost.train_flops_per_image"] / terms,
        cost["cost.parameters"],
        settings.channels * settings.image_size**2,
        coupled=config.loss.coupling == "joint" and terms > 1,
        passes=-(-terms // (config.loss.term_chunk or terms)),
    )
