"""What an encoder is: images -> a feature map -> pooled features, and a description from which it can be built again.

Legend: n = images, c = width of the encoder, h, w = height and width of an image in pixels.

A new kind of encoder is a class of each of the two kinds below, and an entry in model/simclr.py's table.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

# Of ImageNet's RGB values in 0 to 1, as in torchvision's and nearly every other model.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Encoder(nn.Module):
    """Images -> pooled features; :attr:`width` and :meth:`features` are each kind's own.

    Images are RGB [n, 3, h, w]: uint8 in 0 to 255, or floats already normalised by ImageNet's mean and standard
    deviation. unit_range: the weights were trained on values in 0 to 1 instead (google-research/simclr), and images
    are brought to those inside.
    """

    unit_range = False

    if TYPE_CHECKING:  # layers are each kind's own

        def __getattr__(self, name: str) -> Any: ...

    @property
    def width(self) -> int:
        """c, of the pooled features."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """The feature map, not pooled: [n, c, rows, columns]."""
        raise NotImplementedError

    def pool(self, features: Tensor) -> Tensor:
        """A feature map's mean over the picture: [n, c]."""
        return features.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features [n, c]."""
        return self.pool(self.features(images))

    def conventions(self) -> dict[str, Any]:
        """Settings that the weights do not reveal, such as a padding, in plain values; :meth:`adopt` restores them."""
        return {"unit_range": self.unit_range}

    def adopt(self, conventions: dict[str, Any]) -> None:
        """Keys as in :meth:`conventions`; others, and those that are missing, stay as they are."""
        self.unit_range = bool(conventions.get("unit_range", self.unit_range))

    def place(self, device: torch.device) -> "Encoder":
        """Move it to ``device``, in the memory format that convolutions like."""
        return self.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def normalised(self, images: Tensor) -> Tensor:
        """Images as the weights take them."""
        if images.dtype != torch.uint8 and not self.unit_range:
            return images
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
        if images.dtype != torch.uint8:
            found = images * std + mean
        else:
            found = images / 255 if self.unit_range else (images / 255 - mean) / std
        return found.to(next(self.parameters()).dtype)


@dataclass(frozen=True)
class Description:
    """What must be known to build an encoder again. Its fields are plain values: a config and a checkpoint hold them.

    Raises ValueError, naming the field and its value, for one that cannot be built.
    """

    name: str
    """Of the network, an entry of model.simclr.ENCODERS."""

    def for_image_size(self, size: int) -> "Description":
        """With the fields that depend on the side of the views, in pixels, filled in."""
        return self

    def build(self) -> Encoder:
        """A freshly initialised encoder."""
        raise NotImplementedError

    def label(self) -> str:
        """For people: what it is, in a few words."""
        return self.name

    def usual_image_size(self) -> int:
        """Side of the views, in pixels, that an encoder of this kind is asked with where nobody says otherwise."""
        return 224

    def differences(self, encoder: Encoder) -> list[str]:
        """In what ``encoder`` computes otherwise than the network of this name in torchvision and timm."""
        return [f"the keys of {self.name}"]
