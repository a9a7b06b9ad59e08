"""A backbone with the term index: the network that predicts every term of the noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from klray.networks.dropout import KeyedDropout, use_keyed_dropout
from klray.networks.fused_unet import fused_unet

ARCHITECTURES = ("repeated", "wide")
TERM_INPUTS = ("class_embedding", "time_offset")


class TermNetwork(nn.Module):
    """(x_t [B, C, H, W], t [B], terms [K]) -> [B, K, C, H, W].

    Args:
        backbone: (sample, timestep [B], class_labels [B] or None, return_dict=False) -> ([B, out, H, W],), as
            diffusers' UNet2DModel.
        num_terms: M; 1 for the baseline, which has no term index.
        architecture: ``repeated`` (paper's KL^1): K backbone evaluations an image. ``wide`` (paper's KL^2): one
            evaluation, whose last layer has M * C channels.
        term_input: how ``repeated`` is told the term: ``class_embedding``, a label beside the time; or
            ``time_offset``: t = n/N becomes (n - 1 + m/M)/N, the paper's way, without new parameters.
        time_grid: N, for ``time_offset``.

    Time is always shown as 1000 t - 1: a sinusoidal embedding fed t in [0, 1] hardly sees it.

    Raises:
        ValueError: for an unknown architecture or term input, and for ``time_offset`` without a time grid.
    """

    backbone: Any

    def __init__(
        self,
        backbone: Any,
        num_terms: int,
        architecture: str = "repeated",
        term_input: str = "class_embedding",
        time_grid: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("architecture", architecture, ARCHITECTURES),
            ("term_input", term_input, TERM_INPUTS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if term_input == "time_offset" and time_grid is None:
            raise ValueError("term_input time_offset needs process.time_grid to be a number, the N of t = n/N")
        self.backbone = backbone
        self.num_terms, self.wide = num_terms, architecture == "wide"
        self.time_grid = time_grid if term_input == "time_offset" and not self.wide else None
        self.dropout_keys = use_keyed_dropout(backbone)
        self.has_dropout = any(isinstance(module, KeyedDropout) for module in backbone.modules())
        self.fused = False  # whether the backbone, a plain U-Net, runs through fused_unet

    def forward(self, x: Tensor, t: Tensor, terms: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        """``dropout_keys`` [rows, 2]: one Philox key a backbone row (B * K rows, image-major; B if ``wide``)."""
        self.dropout_keys.rows = dropout_keys
        if self.wide:
            output = self._backbone(x, t, None).unflatten(1, (self.num_terms, x.shape[1]))
            return output.index_select(1, terms)
        count = len(terms)
        rows, time, term = x.repeat_interleave(count, 0), t.repeat_interleave(count), terms.repeat(len(x))
        if self.time_grid is not None:
            time = time + ((term.double() + 1) / self.num_terms - 1) / self.time_grid
        label = None if self.time_grid is not None or self.num_terms == 1 else term
        return self._backbone(rows, time, label).unflatten(0, (len(x), count))

    def _backbone(self, x: Tensor, t: Tensor, term: Tensor | None) -> Tensor:
        dtype = next(self.backbone.parameters()).dtype
        time = (1000 * t.double() - 1).to(torch.promote_types(dtype, torch.float32))  # 1000 t - 1 needs its digits
        if self.fused:
            return fused_unet(self.backbone, x, time, term)
        label = {} if term is None else {"class_labels": term}
        return self.backbone(x.to(dtype), time, return_dict=False, **label)[0]
