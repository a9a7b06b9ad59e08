"""A small multilayer perceptron with UNet2DModel's interface, for tests."""

from __future__ import annotations

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from pydantic import PositiveInt
from torch import Tensor, nn

from klray.networks.dropout import Dropout


class MLP(ModelMixin, ConfigMixin):
    """Images are flattened; time and class enter by addition to the first hidden layer.

    Args:
        width: of the hidden layers.
        dropout: share of activations set to 0 in training.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 8,
        in_channels: int = 1,
        out_channels: int = 1,
        num_classes: int | None = None,
        width: PositiveInt = 128,
        dropout: Dropout = 0.0,
    ) -> None:
        super().__init__()
        pixels = image_size**2
        self.first = nn.Linear(in_channels * pixels, width)
        self.time_embedding = nn.Linear(width, width)
        self.class_embedding = nn.Embedding(num_classes, width) if num_classes else None
        self.hidden = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout))
        self.conv_out = nn.Conv2d(width, out_channels * pixels, 1)  # a 1 x 1 image: widens and folds as the U-Net does

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        embedding = get_timestep_embedding(timestep, self.config.width).to(sample.dtype)
        h = self.first(sample.flatten(1)) + self.time_embedding(embedding)
        if self.class_embedding is not None:
            h = h + self.class_embedding(class_labels)
        h = self.conv_out(self.hidden(h)[:, :, None, None])
        return (h.reshape(len(sample), self.config.out_channels, *sample.shape[2:]),)
