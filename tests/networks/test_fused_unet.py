"""The forward pass with few kernels gives what diffusers' own gives."""

from __future__ import annotations

import pytest
import torch

from klray.networks.dropout import use_keyed_dropout
from klray.networks.fused_unet import can_fuse, fused_unet
from klray.networks.mlp import MLP
from klray.networks.unet import build_unet
from klray.parallel.random import dropout_keys

SMALL = {"image_size": 8, "in_channels": 3, "out_channels": 6, "channels": [16, 24], "norm_groups": 8}


@pytest.mark.parametrize("attention", [[False, True], [True, False], [False, False]])
@pytest.mark.parametrize("classes", [None, 5])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outputs_and_gradients_are_those_of_the_module(
    attention: list[bool], classes: int | None, dropout: float
) -> None:
    torch.manual_seed(0)
    net = build_unet(**SMALL, attention=attention, num_classes=classes, dropout=dropout, layers_per_block=2).double()
    for parameter in net.parameters():  # norms start at 1 and 0, which would hide a wrong use of them
        parameter.data += 0.1 * torch.randn_like(parameter)
    keys = use_keyed_dropout(net)
    keys.rows = dropout_keys(0, 0, torch.arange(4), torch.arange(1))
    net.train()
    assert can_fuse(net)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    t = torch.tensor([0.0, 10.0, 500.0, 999.0], dtype=torch.float64)
    labels = None if classes is None else torch.tensor([0, 4, 2, 2])
    weights = torch.randn(4, 6, 8, 8, dtype=torch.float64)
    found = []
    for forward in (lambda: net(x, t, labels, return_dict=False)[0], lambda: fused_unet(net, x, t, labels)):
        net.zero_grad()
        y = forward()
        (y * weights).sum().backward()
        found.append([y.detach(), *(p.grad for p in net.parameters())])
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_what_is_no_plain_unet_is_not_fused() -> None:
    from diffusers import UNet2DModel

    assert not can_fuse(MLP())
    other = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 16),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        resnet_time_scale_shift="scale_shift",
    )
    assert not can_fuse(other)
