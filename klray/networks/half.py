"""Networks in bfloat16 or float16: what their matrices are cast to, and when."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from klray.networks.terms import TermNetwork

Network = TypeVar("Network", bound=nn.Module)


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """What ``auto``, ``bf16``, ``fp16`` or ``off`` means on a device; None for full precision."""
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def in_precision(network: TermNetwork, dtype: torch.dtype | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The network as losses and denoisers call it where its weights do not move, computing in ``dtype``."""
    if dtype is None:
        return network
    if network.fused:
        return HalfWeights(network, dtype).network

    def call(x: Tensor, t: Tensor, terms: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=dtype):
            return network(x, t, terms)

    return call


class HalfWeights(Generic[Network]):
    """Casts weights once a step, where autocast casts them at every call; gradients are added up in float32.

    Convolutions and linear layers compute in ``dtype``. Vectors (biases, norms) and embeddings are the network's own.
    """

    def __init__(self, network: Network, dtype: torch.dtype) -> None:
        matrices = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        cast = {id(p): nn.Parameter(p.detach().to(dtype)) for p in matrices}
        own = {id(p): p for p in network.parameters()}
        self.network: Network = copy.deepcopy(network, memo=own | cast)
        self._masters, self._halves = tuple(matrices), tuple(cast.values())

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over what the optimiser did."""
        torch._foreach_copy_(self._halves, self._masters)

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the gradients of a backward pass to the float32 ones; to be called after each."""
        # A step's backward passes reach the same weights, so either all of them have a sum already or none has.
        reached = [(m, h.grad) for m, h in zip(self._masters, self._halves, strict=True) if h.grad is not None]
        gradients = [gradient for _, gradient in reached]
        sums = [m.grad for m, _ in reached if m.grad is not None]
        if sums:
            torch._foreach_add_(sums, gradients)
        else:
            fresh = [torch.empty_like(m) for m, _ in reached]
            torch._foreach_copy_(fresh, gradients)
            for (master, _), gradient in zip(reached, fresh, strict=True):
                master.grad = gradient
        for half in self._halves:
            half.grad = None
