"""Backbones with the term index, keyed dropout, folding and export.

A backbone is called with image_size, in_channels, out_channels and num_classes (or None), and is itself called as
diffusers' UNet2DModel is: (sample [B, C, H, W], timestep [B], class_labels=None, return_dict=False) -> (output,). Where
num_classes is given, ``class_embedding`` is an nn.Embedding of so many rows, added to its embedding of the time.
"""

BACKBONES = {"unet": "klray.networks.unet:build_unet", "mlp": "klray.networks.mlp:MLP"}
