"""Optimisers: entries that are called with ``parameters`` (name -> Parameter) and ``lr``.

The step skips a non-finite gradient by the optimiser's own ``found_inf``, as torch's fused ones have; for one without
it the host asks. Each group's rate is the run's, times the group's ``lr_share`` if it has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch.nn import Parameter

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


def adamw(
    parameters: Mapping[str, Parameter],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: Positive = 1e-8,
    weight_decay: NotNegative = 0.0,
) -> torch.optim.Optimizer:
    """torch's fused AdamW; on a GPU the whole step can be captured.

    Args:
        betas: of the averages of the gradient and of its square.
        eps: added to the root of the latter.
        weight_decay: decoupled, times the rate.
    """
    on_gpu = any(parameter.is_cuda for parameter in parameters.values())
    return torch.optim.AdamW(
        parameters.values(),
        # A captured step reads its rate where it lies; elsewhere a number spares the device a tensor.
        lr=torch.tensor(lr, device=next(iter(parameters.values())).device) if on_gpu else lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        fused=True,
        capturable=on_gpu,
    )


def muon(
    parameters: Mapping[str, Parameter],
    lr: float,
    *,
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95,
    weight_decay: NotNegative = 0.0,
    adamw_share: Positive = 0.015,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: Positive = 1e-10,
) -> torch.optim.Optimizer:
    """Muon (Jordan, 2024): hidden matrices and kernels move by their orthogonalised momentum, kernels as the matrix
    [out, in x height x width]; the first and the last layer, embeddings, biases and gains by AdamW, at
    ``adamw_share`` of the rate. A rate fit for it is some 0.02.

    Args:
        momentum: of the hidden matrices.
        weight_decay: decoupled, times the rate, of all parameters.
        adamw_share: the rate of AdamW's parameters over that of the matrices.
        betas: AdamW's.
        eps: AdamW's.
    """
    from pytorch_optimizer import Muon

    def hidden(name: str, parameter: Parameter) -> bool:
        return parameter.ndim >= 2 and not any(part in name for part in ("conv_in.", "conv_out.", "embedding."))

    matrices = [each for name, each in parameters.items() if hidden(name, each)]
    others = [each for name, each in parameters.items() if not hidden(name, each)]
    group: dict[str, Any] = {"params": matrices, "use_muon": True, "lr": lr, "momentum": momentum}
    plain: dict[str, Any] = {"params": others, "use_muon": False, "lr": lr * adamw_share, "lr_share": adamw_share}
    optimizer: torch.optim.Optimizer = Muon(
        [
            {**group, "weight_decay": weight_decay},
            {**plain, "betas": betas, "eps": eps, "weight_decay": weight_decay},
        ],
        lr=lr,
    )
    return optimizer


OPTIMIZERS: dict[str, Any] = {"adamw": adamw, "muon": muon}
