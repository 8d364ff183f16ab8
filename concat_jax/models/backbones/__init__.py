"""Backbones by the `kind` of a config.

A backbone is a linen module
  (images [B, H, W, 3], image_size [B, 2] or None) -> four maps [B, H/s, W/s, C_s], s doubling,
with an attribute `stride`, that of the first map, and a field `dtype`. One with fields
`num_groups`, `remat` or `scan_layers` takes the segmentor's. A new backbone is one file and one
line here.
"""

import flax.linen as nn

from concat_jax.models.backbones.convnext import ConvNeXt
from concat_jax.models.backbones.resnet import ResNet
from concat_jax.models.backbones.swin import Swin

BACKBONES: dict[str, type[nn.Module]] = {"convnext": ConvNeXt, "resnet": ResNet, "swin": Swin}
