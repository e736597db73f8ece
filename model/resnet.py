"""ResNets with torchvision's keys: all that is known of them.

Legend: n = images, c = width of the encoder, h, w = height and width of an image in pixels.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from simclr_dali.model.batchnorm import norm_relu
from simclr_dali.model.encoder import Description, Encoder, require_bool
from simclr_dali.model.selective_kernels import add_selective_kernels
from simclr_dali.model.vision import resnet


class BasicBlock(resnet.BasicBlock):
    """torchvision's, whose BatchNorm may do the ReLU that follows it."""

    def forward(self, x: Tensor) -> Tensor:
        out = norm_relu(self.bn1, self.relu, self.conv1(x))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        found: Tensor = self.relu(out)
        return found


class Bottleneck(resnet.Bottleneck):
    """torchvision's, whose BatchNorms may do the ReLU that follows them."""

    def forward(self, x: Tensor) -> Tensor:
        out = norm_relu(self.bn1, self.relu, self.conv1(x))
        out = norm_relu(self.bn2, self.relu, self.conv2(out))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        found: Tensor = self.relu(out)
        return found


# Blocks per stage: He et al. 2016, table 1.
_BLOCKS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}
RESNETS = tuple(_BLOCKS)
_CHANNELS = (64, 128, 256, 512)  # of the stages, at width 1
# Below this size the 7x7 stem with its two strides leaves a last feature map of one pixel.
SMALLEST_SIZE_FOR_7X7 = 64  # pixels


@dataclass(frozen=True)
class ResNet(Description):
    """One of RESNETS; the last BatchNorm of each residual block starts at zero (google-research/simclr, resnet.py)."""

    width: float = 1.0
    """Factor on every number of channels, a multiple of 1/64 up to 64."""
    stem: Literal["auto", "7x7", "3x3"] = "auto"
    """First convolution: 7x7 with max-pool (ImageNet), or 3x3 at full resolution without (small pictures); auto takes
    3x3 for views under 64 pixels."""
    selective_kernels: bool = False
    """Selective kernels and ResNet-D's stem and shortcuts, as in SimCLRv2; resnet50 and deeper."""

    def __post_init__(self) -> None:
        if self.name not in _BLOCKS:
            raise ValueError(f"name is {self.name!r}; choose one of {', '.join(RESNETS)}")
        if self.stem not in ("auto", "7x7", "3x3"):
            raise ValueError(f"stem is {self.stem!r}; choose 7x7 or 3x3")
        if not 0 < self.width <= 64 or 64 * self.width % 1:
            raise ValueError(f"width is {self.width}; it must be a multiple of 1/64 up to 64")
        if self.selective_kernels and _BLOCKS[self.name][0] is not Bottleneck:
            raise ValueError(f"selective_kernels is for resnet50 and deeper, not for {self.name}")
        if self.selective_kernels and 64 * self.width < 2:
            raise ValueError(f"width is {self.width}; selective kernels need at least 1/32")

    def for_image_size(self, size: int) -> "ResNet":
        if self.stem != "auto":
            return self
        return replace(self, stem="3x3" if size < SMALLEST_SIZE_FOR_7X7 else "7x7")

    def label(self) -> str:
        kernels = ", selective kernels" if self.selective_kernels else ""
        return f"{self.name} x{self.width:g}, {self.stem} stem{kernels}"

    def usual_image_size(self) -> int:
        return 224 if self.stem == "7x7" else SMALLEST_SIZE_FOR_7X7 // 2

    def build(self) -> "ResNetEncoder":
        if self.stem == "auto":
            raise ValueError("stem is 'auto'; say which, or for which size of images (for_image_size)")
        block, depths = _BLOCKS[self.name]
        encoder = ResNetEncoder(block, depths, zero_init_residual=True)
        if self.width != 1:
            _set_width(encoder, block, depths, self.width)
        if self.selective_kernels:
            add_selective_kernels(encoder)
        if self.stem == "3x3":
            encoder.conv1 = nn.Conv2d(3, encoder.bn1.num_features, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
            encoder.maxpool = nn.Identity()
        encoder.fc = nn.Identity()
        return encoder

    def differences(self, encoder: Encoder) -> list[str]:
        conventions = encoder.conventions()
        found = {
            f"width {self.width:g}": self.width != 1,
            f"the {self.stem} stem": self.stem != "7x7",
            "selective kernels": self.selective_kernels,
            "images in 0..1 instead of normalised ones": conventions["unit_range"],
            "images normalised by another mean and std": "mean" in conventions,
            "no ReLU in its stem": not conventions["stem_relu"],
            "another padding in its stem": self.stem == "3x3" and conventions["stem_padding"] != 1,
        }
        return [name for name, there in found.items() if there]


class ResNetEncoder(Encoder, resnet.ResNet):
    """A torchvision ResNet without its classifier.

    stem_relu: whether a ReLU follows the first BatchNorm, as it does but for lightly's own ResNet inside of a
    nn.Sequential of its children. It, and the padding of the first convolution, are what a network of another library
    may have otherwise without showing it in its weights.
    """

    stem_relu = True

    @property
    def width(self) -> int:
        last = self.layer4[-1]
        norm = last.bn2 if isinstance(last, resnet.BasicBlock) else last.bn3
        return int(norm.num_features)

    def features(self, images: Tensor) -> Tensor:
        """[n, c, h / 32, w / 32], with the 3x3 stem [n, c, h / 8, w / 8]."""
        return self.late(self.early(images))

    def early(self, images: Tensor) -> Tensor:
        """All but the last stage, which with the projector holds two thirds of a ResNet-50's parameters."""
        x = self.conv1(self.normalised(images))
        x = self.maxpool(norm_relu(self.bn1, self.relu, x) if self.stem_relu else self.bn1(x))
        found: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return found

    def late(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer4(x)
        return found

    def pool(self, features: Tensor) -> Tensor:
        pooled: Tensor = self.avgpool(features)
        return pooled.flatten(1)

    def conventions(self) -> dict[str, Any]:
        padding = self.conv1.padding[0] if isinstance(self.conv1, nn.Conv2d) else 1
        return {**super().conventions(), "stem_relu": self.stem_relu, "stem_padding": padding}

    def adopt(self, conventions: dict[str, Any]) -> None:
        super().adopt(conventions)
        self.stem_relu = require_bool("stem_relu", conventions.get("stem_relu", self.stem_relu))
        if isinstance(self.conv1, nn.Conv2d) and "stem_padding" in conventions:
            padding = conventions["stem_padding"]
            if type(padding) is not int or not 0 <= padding <= 3:
                raise ValueError(f"stem_padding is {padding!r}; it must be 0, 1, 2 or 3 pixels")
            self.conv1.padding = (padding,) * 2


def resnet_name(bottleneck: bool, depths: list[int]) -> str | None:
    """Which of RESNETS has so many blocks per stage, or None."""
    for name, (block, blocks) in _BLOCKS.items():
        if (block is Bottleneck, blocks) == (bottleneck, depths):
            return name
    return None


def _set_width(encoder: resnet.ResNet, block: type, depths: list[int], width: float) -> None:
    """Rebuild the stages with ``width`` times the channels, which torchvision's constructor does not offer."""
    channels = [round(planes * width) for planes in _CHANNELS]
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
