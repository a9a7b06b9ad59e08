"""The U-Net of Ho et al. (arXiv 2006.11239) through diffusers' UNet2DModel."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import UNet2DModel
from pydantic import PositiveInt

from klray.networks.dropout import Dropout
from klray.registry import checked_by


def _check(
    image_size: int, channels: Sequence[int], attention: Sequence[bool], norm_groups: int, **others: object
) -> None:
    if len(channels) != len(attention):
        raise ValueError(
            f"network.attention needs one value for each of the {len(channels)} network.channels, got {len(attention)}"
        )
    if any(width % norm_groups for width in channels):
        raise ValueError(f"network.channels must be multiples of norm_groups = {norm_groups}, got {list(channels)}")
    halvings = 2 ** (len(channels) - 1)
    if image_size % halvings:
        rule = f"data.image_size must be a multiple of {halvings} for {len(channels)} network.channels"
        raise ValueError(f"{rule}, got {image_size}")


@checked_by(_check)
def build_unet(
    *,
    image_size: int,
    in_channels: int,
    out_channels: int,
    num_classes: int | None = None,
    channels: list[PositiveInt] = [16, 32],  # noqa: B006
    attention: list[bool] = [False, False],  # noqa: B006
    layers_per_block: PositiveInt = 1,
    norm_groups: PositiveInt = 8,
    dropout: Dropout = 0.0,
) -> UNet2DModel:
    """A UNet2DModel; channels (128, 256, 256, 256) with attention at 16 x 16 is Ho et al.'s net for CIFAR-10.

    Args:
        channels: width of each resolution, from the full one down.
        attention: whether that resolution attends to itself.
        layers_per_block: residual blocks at each resolution.
        norm_groups: of every GroupNorm; divides every width.
        dropout: share of activations set to 0 in training.
        num_classes: M for a class embedding of the term; None for none.
    """
    return UNet2DModel(
        sample_size=image_size,
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=tuple(channels),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        layers_per_block=layers_per_block,
        dropout=dropout,
        norm_num_groups=norm_groups,
        norm_eps=1e-6,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        num_class_embeds=num_classes,
    )
