"""A network of your own: a small convolutional net that is told the time and the term by a bias for each channel.

From the folder of this file: klray train --config digits --set network.kind=own_network:ConvNet --set network.width=24
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """What its place gives: image_size, in_channels, out_channels, num_classes. Its setting: width."""

    def __init__(self, in_channels: int, out_channels: int, num_classes: int | None, width: int = 32) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(torch.exp(-math.log(10_000) * torch.arange(16) / 16))
        self.time = nn.Linear(32, width)
        self.class_embedding = nn.Embedding(num_classes, width) if num_classes else None  # the term's row is added
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        angle = timestep[:, None] * self.frequencies
        told = self.time(torch.cat([angle.sin(), angle.cos()], 1).to(sample.dtype))
        if self.class_embedding is not None:
            told = told + self.class_embedding(class_labels)
        h = torch.relu(self.first(sample) + told[:, :, None, None])
        return (self.conv_out(torch.relu(self.middle(h) + h)),)
