"""ResNet encoders with torchvision's keys, and SimCLR's projector.

Legend: n = images, c = width of the encoder, h, w = height and width of an image in pixels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simclr_dali.model.selective_kernels import add_selective_kernels
from simclr_dali.model.vision import resnet

# Blocks per stage: He et al. 2016, table 1.
_ARCHITECTURES: dict[str, tuple[type[resnet.BasicBlock] | type[resnet.Bottleneck], list[int]]] = {
    "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": (resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
    "resnet101": (resnet.Bottleneck, [3, 4, 23, 3]),
    "resnet152": (resnet.Bottleneck, [3, 8, 36, 3]),
}
ARCHITECTURES = tuple(_ARCHITECTURES)
STEMS = ("7x7", "3x3")
# Below this size the 7x7 stem with its two strides leaves a last feature map of one pixel.
SMALLEST_SIZE_FOR_7X7 = 64  # pixels
# Of ImageNet's RGB values in 0 to 1, as in torchvision's and nearly every other model.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Architecture:
    """What must be known to build an encoder and projector again.

    name: one of ARCHITECTURES. width: factor on every number of channels. stem: "7x7" with max-pool (ImageNet) or "3x3"
    at full resolution without (small pictures). projector: widths of its layers, the last is that of z.
    selective_kernels: SimCLRv2's, with ResNet-D's stem and shortcuts (model.selective_kernels).
    """

    name: str
    width: float
    stem: str
    projector: tuple[int, ...]
    selective_kernels: bool = False


class Encoder(resnet.ResNet):
    """A torchvision ResNet without its classifier.

    Images are RGB [n, 3, h, w]: uint8 in 0 to 255, or floats already normalised by ImageNet's mean and standard
    deviation. unit_range: the weights were trained on values in 0 to 1 instead (google-research/simclr), and images
    are brought to those inside. stem_relu: whether a ReLU follows the first BatchNorm, as it does but for lightly's
    own ResNet inside of a nn.Sequential of its children. Both, and the padding of the first convolution, are what a
    network of another library may have otherwise without showing it in its weights: see :meth:`habits`.
    """

    unit_range = False
    stem_relu = True

    def habits(self) -> dict[str, Any]:
        """What :meth:`take_habits` needs to make an encoder with the same weights compute the same."""
        padding = self.conv1.padding[0] if isinstance(self.conv1, nn.Conv2d) else 1
        return {"unit_range": self.unit_range, "stem_relu": self.stem_relu, "stem_padding": padding}

    def take_habits(self, habits: dict[str, Any]) -> None:
        """Keys as in :meth:`habits`; others, and those that are missing, stay as they are."""
        self.unit_range = bool(habits.get("unit_range", self.unit_range))
        self.stem_relu = bool(habits.get("stem_relu", self.stem_relu))
        if isinstance(self.conv1, nn.Conv2d) and "stem_padding" in habits:
            self.conv1.padding = (habits["stem_padding"],) * 2

    @property
    def width(self) -> int:
        """c, of the pooled features."""
        return (
            self.layer4[-1].bn2.num_features
            if isinstance(self.layer4[-1], resnet.BasicBlock)
            else self.layer4[-1].bn3.num_features
        )

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features [n, c]: the mean of :meth:`features` over the picture."""
        return self.avgpool(self.features(images)).flatten(1)

    def features(self, images: Tensor) -> Tensor:
        """The last feature map, not pooled: [n, c, h / 32, w / 32], with the 3x3 stem [n, c, h / 8, w / 8]."""
        x = self.bn1(self.conv1(self._normalised(images)))
        x = self.maxpool(self.relu(x) if self.stem_relu else x)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def _normalised(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 and not self.unit_range:
            return images
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (_MEAN, _STD))
        if images.dtype != torch.uint8:
            found = images * std + mean
        else:
            found = images / 255 if self.unit_range else (images / 255 - mean) / std
        return found.to(next(self.parameters()).dtype)


def build_encoder(architecture: Architecture) -> Encoder:
    """Images -> pooled features [n, encoder_width]; see :class:`Encoder`.

    The last BatchNorm of each residual block starts at zero, as in the reference code (google-research/simclr,
    resnet.py). Keys are torchvision's. Raises ValueError for an unknown name or stem, a width that gives fractions of
    channels, or selective kernels in a network without bottlenecks.
    """
    if architecture.name not in _ARCHITECTURES:
        raise ValueError(f"unknown encoder {architecture.name!r}; choose one of {', '.join(ARCHITECTURES)}")
    if architecture.stem not in STEMS:
        raise ValueError(f"unknown stem {architecture.stem!r}; choose one of {', '.join(STEMS)}")
    block, depths = _ARCHITECTURES[architecture.name]
    encoder = Encoder(block, depths, zero_init_residual=True)
    if architecture.width != 1:
        _set_width(encoder, block, depths, architecture.width)
    if architecture.selective_kernels:
        if block is not resnet.Bottleneck:
            raise ValueError(f"selective kernels are for resnet50 and deeper, not for {architecture.name}")
        add_selective_kernels(encoder)
    if architecture.stem == "3x3":
        encoder.conv1 = nn.Conv2d(3, encoder.bn1.num_features, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    encoder.fc = nn.Identity()
    return encoder


def encoder_name(bottleneck: bool, depths: list[int]) -> str | None:
    """Which of ARCHITECTURES has so many blocks per stage, or None."""
    for name, (block, blocks) in _ARCHITECTURES.items():
        if (block is resnet.Bottleneck, blocks) == (bottleneck, depths):
            return name
    return None


def encoder_width(architecture: Architecture) -> int:
    """Width of the pooled features."""
    block, _ = _ARCHITECTURES[architecture.name]
    return round(512 * architecture.width) * block.expansion


def _set_width(encoder: resnet.ResNet, block: type, depths: list[int], width: float) -> None:
    """Rebuild the stages with ``width`` times the channels, which torchvision's constructor does not offer."""
    channels = [round(planes * width) for planes in (64, 128, 256, 512)]
    if min(channels) < 1 or any(c != planes * width for c, planes in zip(channels, (64, 128, 256, 512), strict=True)):
        raise ValueError(f"width {width} does not give whole numbers of channels; use a multiple of 1/64")
    encoder.inplanes = channels[0]
    encoder.conv1 = nn.Conv2d(3, channels[0], 7, stride=2, padding=3, bias=False)
    encoder.bn1 = nn.BatchNorm2d(channels[0])
    for stage, (planes, depth) in enumerate(zip(channels, depths, strict=True), start=1):
        setattr(encoder, f"layer{stage}", encoder._make_layer(block, planes, depth, stride=1 if stage == 1 else 2))
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, resnet.BasicBlock):
            nn.init.zeros_(module.bn2.weight)
        elif isinstance(module, resnet.Bottleneck):
            nn.init.zeros_(module.bn3.weight)


def build_projector(features: int, widths: tuple[int, ...]) -> nn.Sequential:
    """SimCLR's projection head: linear + BatchNorm + ReLU per hidden layer, linear + BatchNorm last, no biases.

    The last BatchNorm has a scale but no shift (google-research/simclr, model_util.py, ``center=use_bias``): its
    bias stays at zero and is not trained.
    """
    layers: list[nn.Module] = []
    for index, width in enumerate(widths):
        last = index == len(widths) - 1
        linear = nn.Linear(features, width, bias=False)
        # The reference draws dense layers from N(0, 0.01^2).
        nn.init.normal_(linear.weight, std=0.01)
        norm = nn.BatchNorm1d(width)
        norm.bias.requires_grad_(not last)
        layers += [linear, norm] if last else [linear, norm, nn.ReLU(inplace=True)]
        features = width
    return nn.Sequential(*layers)


class SimCLR(nn.Module):
    """Encoder and projector: images [n, 3, h, w] -> embeddings z [n, d], not yet normalised."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.encoder = build_encoder(architecture)
        self.projector = build_projector(encoder_width(architecture), architecture.projector)

    def forward(self, images: Tensor) -> Tensor:
        z: Tensor = self.projector(self.encoder(images))
        return z


def build_model(architecture: Architecture, seed: int) -> SimCLR:
    """A freshly initialised model; the same seed gives the same weights, and the caller's random state is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SimCLR(architecture)
