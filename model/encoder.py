"""What an encoder is: images -> a feature map -> pooled features, and a description from which it can be built again.

Legend: n = images, c = width of the encoder, h, w = height and width of an image in pixels.

A new kind of encoder is a class of each of the two kinds below, and an entry in model/simclr.py's table.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

# Of ImageNet's RGB values in 0 to 1, as in torchvision's and nearly every other model.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Encoder(nn.Module):
    """Images -> pooled features; :attr:`width` and :meth:`features` are each kind's own.

    Images are RGB [n, 3, h, w]: uint8 in 0 to 255, or floats already normalised by ImageNet's mean and standard
    deviation. The weights may have been trained on other values, to which images are brought inside: unit_range, those
    in 0 to 1 (google-research/simclr); mean and std, normalised by others, as CIFAR's.
    """

    unit_range = False
    mean, std = MEAN, STD

    if TYPE_CHECKING:  # layers are each kind's own
        views: Callable[[Any], Tensor]
        """Pictures of any kind -> the views of an evaluation; of encoders that simclr_dali.load gives."""

        def __getattr__(self, name: str) -> Any: ...

    @property
    def width(self) -> int:
        """c, of the pooled features."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """The feature map, not pooled: [n, c, rows, columns]."""
        raise NotImplementedError

    def early(self, images: Tensor) -> Tensor:
        """The first part of :meth:`features`, as a kind may split it; its gradients are there last.

        With several processes the two parts are compiled apart, so that the gradients of the second are averaged while
        those of the first are computed. By default all is in the second.
        """
        return images

    def late(self, x: Tensor) -> Tensor:
        """The feature map, of what :meth:`early` gave."""
        return self.features(x)

    def pool(self, features: Tensor) -> Tensor:
        """A feature map's mean over the picture: [n, c]."""
        return features.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features [n, c]."""
        return self.pool(self.features(images))

    def conventions(self) -> dict[str, Any]:
        """Settings that the weights do not reveal, such as a padding, in plain values; :meth:`adopt` restores them."""
        other = {"mean": list(self.mean), "std": list(self.std)} if (self.mean, self.std) != (MEAN, STD) else {}
        return {"unit_range": self.unit_range, **other}

    def adopt(self, conventions: dict[str, Any]) -> None:
        """Keys as in :meth:`conventions`; others, and those that are missing, stay as they are.

        Raises ValueError, naming the key, for a value that cannot be.
        """
        self.unit_range = require_bool("unit_range", conventions.get("unit_range", self.unit_range))
        for name in ("mean", "std"):
            if name in conventions:
                setattr(self, name, _three_numbers(name, conventions[name]))
        if self.unit_range and (self.mean, self.std) != (MEAN, STD):
            raise ValueError("unit_range is true, and a mean and std of other values is given; only one can hold")

    def input_range(self) -> str:
        """For people: which values the weights take."""
        if self.unit_range:
            return "values in 0..1"
        if (self.mean, self.std) == (MEAN, STD):
            return "values normalised by ImageNet's mean and std"
        mean, std = (" ".join(f"{number:g}" for number in numbers) for numbers in (self.mean, self.std))
        return f"values normalised by mean {mean} and std {std}"

    def place(self, device: torch.device) -> "Encoder":
        """Move it to ``device``, in the memory format that convolutions like."""
        return self.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def normalised(self, images: Tensor) -> Tensor:
        """Images as the weights take them."""
        other = (self.mean, self.std) != (MEAN, STD)
        if images.dtype != torch.uint8 and not self.unit_range and not other:
            return images
        mean, std, own_mean, own_std = (
            torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD, self.mean, self.std)
        )
        found = images / 255 if images.dtype == torch.uint8 else images * std + mean
        if not self.unit_range:
            found = (found - own_mean) / own_std
        return found.to(next(self.parameters()).dtype)


def require_bool(name: str, value: Any) -> bool:
    """``value``, if it is a bool; else raise ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false")
    return value


def _three_numbers(name: str, values: Any) -> tuple[float, float, float]:
    sound = isinstance(values, list | tuple) and len(values) == 3
    sound = sound and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    if not sound or max(values) > 1 or min(values) < 0 or (name == "std" and min(values) == 0):
        most = "above 0 and up to 1" if name == "std" else "in 0..1"
        raise ValueError(f"{name} is {values!r}; it must be three numbers {most}, of RGB values in 0..1")
    red, green, blue = (float(value) for value in values)
    return red, green, blue


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
