"""The forward pass of diffusers' UNet2DModel with few kernels: the same modules and weights, the same numbers.

Everything stays in channels_last. GroupNorm and SiLU are one operator, which also takes the time embedding and the bias
of the convolution before it; the other biases go with the residual addition. 1 x 1 convolutions are matrix products.
It computes in the matrices' dtype (``half.HalfWeights``); vectors may stay float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from klray.networks.fused import add_bias, group_norm_silu

_BLOCKS = {"DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"}


def can_fuse(network: nn.Module) -> bool:
    """Whether ``fused_unet`` computes what ``network`` does: a UNet2DModel as ``build_unet`` makes it."""
    from diffusers import UNet2DModel

    if not isinstance(network, UNet2DModel):
        return False
    config: Any = network.config
    plain = {
        "time_embedding_type": "positional",
        "resnet_time_scale_shift": "default",
        "act_fn": "silu",
        "downsample_type": "conv",
        "upsample_type": "conv",
        "mid_block_scale_factor": 1,
        "center_input_sample": False,
        "class_embed_type": None,
    }
    known = {*config.down_block_types, *config.up_block_types} <= _BLOCKS and network.mid_block is not None
    return known and all(getattr(config, name) == value for name, value in plain.items())


def fused_unet(network: Any, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
    """sample [B, C, H, W], timestep [B], class_labels [B] -> [B, out, H, W], as ``network`` itself."""
    dtype = network.conv_in.weight.dtype
    time = network.time_embedding
    emb = _linear(time.linear_2, F.silu(_linear(time.linear_1, network.time_proj(timestep).to(dtype))))
    if network.class_embedding is not None:
        emb = emb + network.class_embedding(class_labels).to(dtype)
    shifts = _shifts(network, F.silu(emb))
    x = _conv(network.conv_in, sample.to(dtype, memory_format=torch.channels_last))
    skips = [x]
    for block in network.down_blocks:
        for resnet, attention in zip(block.resnets, _attentions(block), strict=True):
            x = _attention(attention, _resnet(resnet, x, shifts))
            skips.append(x)
        for downsampler in block.downsamplers or ():
            conv = downsampler.conv
            # padding 0 is Ho et al.'s: one pixel at the right and the bottom alone
            x = _conv(conv, x if conv.padding != (0, 0) else F.pad(x, (0, 1, 0, 1)))
            skips.append(x)
    x = _resnet(network.mid_block.resnets[0], x, shifts)
    for attention, resnet in zip(network.mid_block.attentions, network.mid_block.resnets[1:], strict=True):
        x = _resnet(resnet, _attention(attention, x), shifts)
    for block in network.up_blocks:
        for resnet, attention in zip(block.resnets, _attentions(block), strict=True):
            x = _attention(attention, _resnet(resnet, torch.cat([x, skips.pop()], dim=1), shifts))
        for upsampler in block.upsamplers or ():
            x = _conv(upsampler.conv, _twice(x))
    return _conv(network.conv_out, _norm(network.conv_norm_out, x))


def _conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The bias by an operator whose gradient is one fast sum; tensor cores want channels in eights at both ends."""
    weight, wanted = layer.weight, len(layer.weight)
    into, out = -x.shape[1] % 8, -wanted % 8
    if into or out:
        weight, x = F.pad(weight, (0, 0, 0, 0, 0, into, 0, out)), F.pad(x, (0, 0, 0, 0, 0, into))
    y = F.conv2d(x, weight.contiguous(memory_format=torch.channels_last), None, layer.stride, layer.padding)
    return add_bias(y[:, :wanted], None, layer.bias)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias.to(x.dtype))


def _resnets(network: Any) -> list[Any]:
    blocks = [*network.down_blocks, network.mid_block, *network.up_blocks]
    return [resnet for block in blocks for resnet in block.resnets]


def _shifts(network: Any, temb: Tensor) -> dict[Any, Tensor]:
    """What each residual block adds to its first convolution, [B, C]: the time's projection and that layer's bias.

    One matrix product for all blocks.
    """
    blocks = _resnets(network)
    weight = torch.cat([block.time_emb_proj.weight for block in blocks])
    bias = torch.cat([block.time_emb_proj.bias for block in blocks])
    # Not one bias, their sum: autograd would give both parts' parameters one gradient in one place, to be added to and
    # clipped twice.
    other = torch.cat([block.conv1.bias for block in blocks])
    shift = F.linear(temb, weight, bias.to(temb.dtype)) + other.to(temb.dtype)
    return dict(zip(blocks, shift.split([block.out_channels for block in blocks], dim=1), strict=True))


def _attentions(block: Any) -> Any:
    return getattr(block, "attentions", None) or [None] * len(block.resnets)


def _norm(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None, silu: bool = True) -> Tensor:
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, shift, silu)


def _resnet(block: Any, x: Tensor, shifts: dict[Any, Tensor]) -> Tensor:
    """x + conv2(dropout(silu(norm2(conv1(silu(norm1(x))) + proj(temb))))), x through a 1 x 1 convolution if widened."""
    h = F.conv2d(_norm(block.norm1, x), block.conv1.weight, padding=1)
    h = block.dropout(_norm(block.norm2, h, shifts[block]))
    h = F.conv2d(h, block.conv2.weight, padding=1)
    if block.conv_shortcut is None:
        return add_bias(x, h, block.conv2.bias)
    x = _pixels(F.linear(x.permute(0, 2, 3, 1), block.conv_shortcut.weight.flatten(1)))
    return add_bias(x, h, block.conv2.bias + block.conv_shortcut.bias)


def _attention(block: Any, x: Tensor) -> Tensor:
    """x + out(attention(norm(x))) over the pixels; x itself where there is no attention."""
    if block is None:
        return x
    batch, channels, height, width = x.shape
    h = _norm(block.group_norm, x, silu=False).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    weight = torch.cat([block.to_q.weight, block.to_k.weight, block.to_v.weight])
    bias = torch.cat([block.to_q.bias, block.to_k.bias, block.to_v.bias])
    q, k, v = F.linear(h, weight, bias.to(h.dtype)).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, height, width, channels)
    return add_bias(x, _pixels(F.linear(h, block.to_out[0].weight)), block.to_out[0].bias)


def _twice(x: Tensor) -> Tensor:
    """Each pixel as 2 x 2."""
    batch, channels, height, width = x.shape
    x = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
    return _pixels(x.reshape(batch, 2 * height, 2 * width, channels))


def _pixels(x: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W] without a copy."""
    return x.permute(0, 3, 1, 2)
