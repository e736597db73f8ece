"""A vision transformer of torchvision's as an encoder of ours: a class of each kind, and a line in one table."""

import runpy
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from simclr_dali.model.encoder import Description, Encoder
from simclr_dali.model.simclr import ENCODERS
from simclr_dali.model.vision import torchvision


@dataclass(frozen=True)
class TinyViT(Description):
    """A transformer for small pictures."""

    patch: int = 8
    """Side of a patch, in pixels."""
    layers: int = 2
    image_size: int = 0
    """Of its position embeddings; 0: that of the views."""

    def for_image_size(self, size: int) -> "TinyViT":
        return self if self.image_size else replace(self, image_size=size)

    def build(self) -> "ViTEncoder":
        return ViTEncoder(self)


class ViTEncoder(Encoder):
    """Features are those of the patches, normalised; they are pooled by their mean."""

    def __init__(self, of: TinyViT) -> None:
        super().__init__()
        transformer = torchvision.models.VisionTransformer
        self.vit: Any = transformer(of.image_size, of.patch, of.layers, 2, 16, 32)
        self.vit.heads = nn.Identity()
        nn.init.normal_(self.vit.conv_proj.weight, std=0.1)

    @property
    def width(self) -> int:
        return 16

    def features(self, images: Tensor) -> Tensor:
        patches = self.vit._process_input(self.normalised(images))
        tokens = torch.cat([self.vit.class_token.expand(len(patches), -1, -1), patches], 1)
        side = round(patches.shape[1] ** 0.5)
        maps: Tensor = self.vit.encoder(tokens)[:, 1:].transpose(1, 2)
        return maps.unflatten(2, (side, side))


def register() -> None:
    """All that the product has to be told."""
    ENCODERS["tiny_vit"] = TinyViT


if __name__ == "__main__":  # python -m tests.vit SCRIPT ...: a script of ours that knows it
    register()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
