"""Weights of other libraries: which encoder a file holds, told by its keys, and its keys as torchvision names them.

Known layouts, each with the place of its first convolution in a file:

    torchvision, timm      conv1.weight
    mmpretrain             state_dict.backbone.conv1.weight (beside neck. or head.)
    VISSL                  classy_state_dict.base_model.model.trunk._feature_blocks.conv1.weight
    lightly                backbone.0.weight, backbone.conv1.weight, or with its own ResNet
    solo-learn             state_dict.backbone.conv1.weight or encoder. (beside projector. or classifier.)
    moco, moco-v3          state_dict.module.encoder_q.conv1.weight, .module.base_encoder.conv1.weight
    sthalles/SimCLR        state_dict.backbone.conv1.weight beside backbone.fc.0 and .fc.2
    Spijkervet/SimCLR      encoder.conv1.weight beside projector.0 and .2, without BatchNorm
    google, converted      resnet.net.0.0.weight (Separius/SimCLRv2-Pytorch), torchvision's (tonylins/simclr-converter)

The weights are found wherever they lie in the file; nothing else in it matters.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simclr_dali.model.checkpoint import CheckpointError
from simclr_dali.model.encoder import Description
from simclr_dali.model.resnet import ResNet, resnet_name
from simclr_dali.model.simclr import Architecture
from simclr_dali.shards.wording import listed

_STAGES = ("layer1", "layer2", "layer3", "layer4")
_OURS = re.compile(r"(conv1|bn1|layer[1-4])\.")
# Of two encoders of one file the one that gradients trained: the other one follows it, or is its moving average.
_FOLLOWERS = {
    "encoder_k": ("encoder_q",),
    "momentum_encoder": ("base_encoder", "encoder"),
    "momentum_backbone": ("backbone",),
    "backbone_momentum": ("backbone",),
    "target_network": ("online_network",),
}
# mmpretrain's averages, of backbone and neck together: encoder_k.module.0.conv1 beside backbone.conv1.
_AVERAGES = ("encoder_k", "momentum_encoder", "target_net", "teacher")
# Whose transforms end with ToTensor.
_UNIT_RANGE = ("google", "sthalles/SimCLR", "Spijkervet/SimCLR")
_LISTED = 8  # keys in a message


@dataclass(frozen=True)
class ForeignEncoder:
    """An encoder that was found in a file of another library."""

    architecture: Architecture
    weights: dict[str, Tensor]
    """In float32, by torchvision's keys."""
    layout: str
    """Whose, as listed above."""
    prefix: str
    """Of its keys in the file."""
    left_out: tuple[str, ...]
    """Keys of the file that belong to no encoder, as those of projectors and classifiers."""
    conventions: dict[str, Any]
    """What its weights do not show: see model.encoder.Encoder."""
    head: tuple[Tensor, Tensor] | None = None
    """Weight [classes, width] and bias of the linear classifier beside it."""


def find_encoder(
    tensors: dict[str, Tensor], name: str, prefix: str | None = None, stem_padding: int | None = None
) -> ForeignEncoder:
    """The encoder among ``tensors``, whose keys are dotted paths in a file called ``name``.

    prefix: where there are several encoders, the beginning of the keys of the one that is meant. stem_padding: of a
    3x3 stem, where the caller knows it.
    Raises CheckpointError, listing keys, where there is none, are several, or one is not whole, and where a 3x3 stem
    may as well be solo-learn's as not.
    """
    candidates = {
        beginning: (layout, rename) for layout, mark, rename in _LAYOUTS for beginning in _beginnings(tensors, mark)
    }
    if not candidates:
        raise CheckpointError(
            f"{name} holds no ResNet of a known layout (its keys: {_some(tensors)}); save the state_dict of a "
            "torchvision ResNet"
        )
    if prefix is not None:
        known = ", ".join(map(repr, candidates))
        candidates = {key: value for key, value in candidates.items() if key in (prefix, f"{prefix}.")}
        if not candidates:
            raise CheckpointError(f"{name} holds no encoder under {prefix!r}; choose one of {known}")
    chosen = [beginning for beginning in candidates if not _is_momentum_copy(beginning, candidates)]
    if len(chosen) > 1:
        raise CheckpointError(
            f"{name} holds {len(chosen)} encoders, with keys that begin with {', '.join(map(repr, chosen))}; say which "
            "is meant with --prefix, or load(..., prefix=...)"
        )
    (beginning,) = chosen
    layout, rename = candidates[beginning]
    renamed = {key: rename(key.removeprefix(beginning)) for key in tensors if key.startswith(beginning)}
    weights = {new: tensors[old] for old, new in renamed.items() if _OURS.match(new)}
    encoder = _describe(weights, name)
    weights = require_complete(weights, encoder, name, beginning)
    taken = {old for old, new in renamed.items() if new in weights}
    left_out = tuple(key for key in tensors if key not in taken)
    whose = layout(beginning, left_out)
    conventions: dict[str, Any] = {"unit_range": whose in _UNIT_RANGE, "stem_relu": rename is not _LIGHTLY_CHILDREN}
    if encoder.stem == "3x3":
        conventions["stem_padding"] = _padding(whose, left_out, name) if stem_padding is None else stem_padding
    head = _head(tensors, beginning, whose)
    return ForeignEncoder(Architecture(encoder), weights, whose, beginning, left_out, conventions, head)


def _head(tensors: dict[str, Tensor], beginning: str, whose: str) -> tuple[Tensor, Tensor] | None:
    """Of the libraries whose keys say that a layer is a classifier, and not one of a projector."""
    places = {"torchvision": f"{beginning}fc", "mmpretrain": f"{beginning.removesuffix('backbone.')}head.fc"}
    return linear_head(tensors, places[whose]) if whose in places else None


def linear_head(tensors: dict[str, Tensor], place: str) -> tuple[Tensor, Tensor] | None:
    """Weight [classes, width] and bias of the linear layer called ``place``; None where there is no such layer."""
    weight, bias = (tensors.get(f"{place}.{name}") for name in ("weight", "bias"))
    if weight is None or bias is None or not (weight.is_floating_point() and bias.is_floating_point()):
        return None
    if weight.dim() != 2 or bias.shape != weight.shape[:1]:
        return None
    return weight.float(), bias.float()


def _beginnings(tensors: Iterable[str], mark: str) -> list[str]:
    """What stands before ``mark`` in each key that ends with it."""
    return [key.removesuffix(mark) for key in tensors if key == mark or key.endswith(f".{mark}")]


def _is_momentum_copy(beginning: str, candidates: Iterable[str]) -> bool:
    parts = beginning.split(".")
    leaders = [
        ".".join([*parts[:place], leader, *parts[place + 1 :]])
        for place, part in enumerate(parts)
        for leader in _FOLLOWERS.get(part, ())
    ]
    leaders += [
        ".".join([*parts[:place], "backbone", ""])
        for place, part in enumerate(parts)
        if part in _AVERAGES and parts[place + 1 :] == ["module", "0", ""]
    ]
    return any(leader in candidates for leader in leaders)


def _describe(weights: dict[str, Tensor], name: str) -> ResNet:
    depths = []
    for stage in _STAGES:
        numbers = {
            int(key.split(".")[1]) for key in weights if key.startswith(f"{stage}.") and key.split(".")[1].isdigit()
        }
        depths.append(len(numbers))
    known = resnet_name(any(key.startswith("layer1.0.conv3.") for key in weights), depths)
    if known is None:
        raise CheckpointError(
            f"{name} holds a ResNet with {depths} blocks, which is none of 18, 34, 50, 101 and 152 layers, or not "
            f"whole (its keys: {_some(weights)})"
        )
    selective = any(key.startswith("layer1.0.conv2.mix1.") for key in weights)
    deep = selective and "conv1.6.weight" in weights  # the stem of ResNet-D
    if not selective and "conv1.0.weight" in weights:
        raise CheckpointError(
            f"{name} holds a ResNet with a deep stem (three convolutions instead of one, as of resnet50d and its "
            f"relatives), which is not known here; give one with the stem of torchvision's"
        )
    first = weights.get("conv1.6.weight" if deep else "conv1.weight")
    if first is None or first.dim() != 4:
        raise CheckpointError(f"{name} lacks the encoder's first convolution (its keys: {_some(weights)})")
    if first.shape[-1] not in (3, 7):
        raise CheckpointError(
            f"{name} begins with a convolution of {first.shape[-1]} pixels; only stems of 7 (ImageNet) and 3 are known"
        )
    stem = "7x7" if deep or first.shape[-1] == 7 else "3x3"
    try:
        return ResNet(known, first.shape[0] / 64, "3x3" if stem == "3x3" else "7x7", selective)
    except ValueError as error:
        raise CheckpointError(f"{name} holds an encoder that cannot be built: {error}") from error


def require_complete(
    weights: dict[str, Tensor], encoder: Description, name: str, beginning: str = ""
) -> dict[str, Tensor]:
    """``weights`` in float32, if they are all those of ``encoder``; else raise CheckpointError."""
    with torch.device("meta"):
        expected = encoder.build().state_dict()
    missing = [key for key in expected if key not in weights and not key.endswith("num_batches_tracked")]
    unknown = [key for key in weights if key not in expected]
    other = [key for key, value in weights.items() if key in expected and value.shape != expected[key].shape]
    short = [key for key, value in weights.items() if value.nbytes > value.untyped_storage().nbytes()]
    faults = [
        f"{what} {_some(beginning + key for key in keys)}"
        for what, keys in (
            ("lacks", missing),
            ("has besides", unknown),
            ("has in other shapes", other),
            ("repeats numbers in", short),
        )
        if keys
    ]
    if faults:
        raise CheckpointError(f"{name} holds {encoder.label()} only in part: it {'; it '.join(faults)}")
    counted = {key: torch.zeros((), dtype=torch.int64) for key in expected if key.endswith("num_batches_tracked")}
    return {**counted, **{key: value.to(expected[key].dtype) for key, value in weights.items()}}


def _some(keys: Iterable[str]) -> str:
    return listed(list(keys), _LISTED)


def _sequential(order: tuple[str, ...]) -> Callable[[str], str]:
    """nn.Sequential of a ResNet's children: their numbers become their names again."""

    def rename(key: str) -> str:
        number, _, rest = key.partition(".")
        named = order[int(number)] if number.isdigit() and int(number) < len(order) else number
        return f"{named}.{rest}".replace(".shortcut.", ".downsample.")

    return rename


def _shortcut(key: str) -> str:
    return key.replace(".shortcut.", ".downsample.")


# Separius/SimCLRv2-Pytorch, resnet.py, with and without selective kernels: place in its nn.Sequentials -> our name.
GOOGLE_STEM = {"0": "conv1", "1.0": "bn1"}
GOOGLE_STEM_SK = {"0": "conv1.0", "1.0": "conv1.1", "2": "conv1.3", "3.0": "conv1.4", "4": "conv1.6", "5.0": "bn1"}
GOOGLE_BLOCK = {
    "net.0": "conv1", "net.1.0": "bn1", "net.2": "conv2", "net.3.0": "bn2", "net.4": "conv3", "net.5.0": "bn3",
    "projection.shortcut": "downsample.0", "projection.bn.0": "downsample.1",
}  # fmt: skip
GOOGLE_BLOCK_SK = {
    "net.0": "conv1", "net.1.0": "bn1", "net.3": "conv3", "net.4.0": "bn3",
    "net.2.main_conv.0": "conv2.conv", "net.2.main_conv.1.0": "conv2.bn",
    "net.2.mixing_conv.0": "conv2.mix1", "net.2.mixing_conv.1.0": "conv2.mix_bn", "net.2.mixing_conv.2": "conv2.mix2",
    "projection.shortcut.2": "downsample.1", "projection.bn.0": "downsample.2",
}  # fmt: skip


def _google(stem: dict[str, str], block: dict[str, str]) -> Callable[[str], str]:
    def rename(key: str) -> str:
        module, _, kind = key.rpartition(".")
        if module.startswith("net.0."):
            return f"{stem.get(module.removeprefix('net.0.'), module)}.{kind}"
        found = re.fullmatch(r"net\.([1-4])\.blocks\.(\d+)\.(.+)", module)
        if found and found[3] in block:
            return f"layer{found[1]}.{found[2]}.{block[found[3]]}.{kind}"
        return key

    return rename


def _padding(whose: str, left_out: Iterable[str], name: str) -> int:
    """Of a 3x3 stem, which its weights do not show."""
    if whose == "solo-learn":
        return 2  # solo/backbones/resnet: nn.Conv2d(3, 64, 3, stride=1, padding=2) for CIFAR
    if "classifier" in _parts(left_out):  # as beside an encoder that solo-learn evaluated
        raise CheckpointError(
            f"{name} has a 3x3 stem and a classifier, and its keys do not show the stem's padding; say it with "
            "--stem-padding, or load(..., stem_padding=...): 2 for solo-learn's networks, 1 for most others"
        )
    return 1


def _parts(keys: Iterable[str]) -> set[str]:
    return {part for key in keys for part in key.split(".")[:-1]}


# Beside the classifier that each of its methods trains along.
_SOLO_LEARNS = {"projector", "momentum_projector", "momentum_head", "momentum_backbone", "momentum_encoder"}


def _by_neighbours(beginning: str, others: Iterable[str]) -> str:
    """Whose a file with plain ResNet keys is: for the reader, and for the padding of a small stem (solo-learn)."""
    parts = _parts(others)
    if "_feature_blocks" in beginning:
        return "VISSL"
    if re.search(r"(encoder_q|base_encoder)\.$", beginning):
        return "moco"
    if "classifier" in parts and beginning.endswith(("backbone.", "encoder.")) and _SOLO_LEARNS & parts:
        return "solo-learn"
    if {"neck", "data_preprocessor"} & parts or ("head" in parts and beginning.endswith("backbone.")):
        return "mmpretrain"
    if "projection_head" in parts:
        return "lightly"
    layers = {key.removeprefix(beginning) for key in others}
    if {"fc.0.weight", "fc.2.weight"} <= layers and beginning.endswith("backbone."):
        return "sthalles/SimCLR"
    if beginning.endswith("encoder."):
        projector = {key for key in others if key.startswith(f"{beginning.removesuffix('encoder.')}projector.")}
        if any(key.endswith(".running_mean") for key in projector):
            return "simclr-dali"
        if {key.rpartition("projector.")[2] for key in projector} >= {"0.weight", "2.weight"}:
            return "Spijkervet/SimCLR"
    return "torchvision"


def _always(layout: str) -> Callable[[str, Iterable[str]], str]:
    return lambda beginning, others: layout


# lightly's own ResNet calls its ReLU and pooling as functions, so the first ReLU is lost with its children alone.
_LIGHTLY_CHILDREN = _sequential(("conv1", "bn1", *_STAGES))
# How to tell a layout, by the end of a key that each file of it has once per encoder, and what its keys become.
_LAYOUTS: tuple[tuple[Callable[[str, Iterable[str]], str], str, Callable[[str], str]], ...] = (
    (_by_neighbours, "layer1.0.conv1.weight", _shortcut),
    (_always("lightly"), "4.0.conv1.weight", _sequential(("conv1", "bn1", "relu", "maxpool", *_STAGES))),
    (_always("lightly"), "2.0.conv1.weight", _LIGHTLY_CHILDREN),
    (_always("google"), "net.1.blocks.0.net.2.weight", _google(GOOGLE_STEM, GOOGLE_BLOCK)),
    (_always("google"), "net.1.blocks.0.net.2.main_conv.0.weight", _google(GOOGLE_STEM_SK, GOOGLE_BLOCK_SK)),
)
