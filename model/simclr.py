"""SimCLR's network: an encoder of any known kind, and the projector."""

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from simclr_dali.model.encoder import Description, Encoder
from simclr_dali.model.resnet import RESNETS, ResNet
from simclr_dali.shards.wording import counted

# Name -> the class of its description. Whoever adds an encoder adds a line.
ENCODERS: dict[str, type[Description]] = dict.fromkeys(RESNETS, ResNet)


@dataclass(frozen=True)
class Architecture:
    """What must be known to build encoder and projector again.

    projector: widths of its layers, the last is that of z; none where only the encoder is known.
    """

    encoder: Description
    projector: tuple[int, ...] = ()

    def plain(self) -> dict[str, Any]:
        """In plain values, as a checkpoint holds it: the encoder's fields and "projector"."""
        return {**asdict(self.encoder), "projector": list(self.projector)}

    @staticmethod
    def of_plain(values: dict[str, Any]) -> "Architecture":
        """The inverse of :meth:`plain`; fields that are missing take their defaults. Raises ValueError."""
        rest = dict(values)
        projector, name = tuple(rest.pop("projector", ())), rest.pop("name", None)
        encoder = describe(name, rest)
        if encoder != encoder.for_image_size(encoder.usual_image_size()):
            raise ValueError(f"{name} is described only in part: {values}")
        return Architecture(encoder, projector)


def describe(name: Any, values: dict[str, Any]) -> Description:
    """The description of the encoder called ``name`` with these fields; those that are missing take their defaults.

    Raises ValueError for a name or field that is not known, and for a value that cannot be built.
    """
    kind = ENCODERS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"name is {name!r}; choose one of {', '.join(ENCODERS)}")
    known = {field.name for field in fields(kind)} - {"name"}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{name} has no {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return kind(name=name, **values)


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


def projector_weights(run_state: dict[str, Any]) -> dict[str, Tensor]:
    """The projector's part of what a checkpoint of ours holds, by the keys of :func:`build_projector`."""
    prefix = "projector."
    return {key.removeprefix(prefix): value for key, value in run_state["model"].items() if key.startswith(prefix)}


def part_of_projector(projector: nn.Sequential, layers: int | None) -> nn.Sequential:
    """The first ``layers`` hidden layers, each with its BatchNorm and ReLU; None: all, up to z.

    Raises ValueError where it has fewer.
    """
    if layers is None:
        return projector
    hidden = len(projector) // 3
    if not 1 <= layers <= hidden:
        raise ValueError(f"the projector has {counted(hidden, 'hidden layer')}, and none is number {layers}")
    return nn.Sequential(*list(projector)[: 3 * layers])


class SimCLR(nn.Module):
    """Encoder and projector: images [n, 3, h, w] -> embeddings z [n, d], not yet normalised."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.encoder: Encoder = architecture.encoder.build()
        self.projector = build_projector(self.encoder.width, architecture.projector)

    def forward(self, images: Tensor) -> Tensor:
        return self.late(self.early(images))

    def early(self, images: Tensor) -> Tensor:
        """The first part of the encoder (Encoder.early)."""
        return self.encoder.early(images)

    def late(self, x: Tensor) -> Tensor:
        """z, of what :meth:`early` gave."""
        z: Tensor = self.projector(self.encoder.pool(self.encoder.late(x)))
        return z


def build_model(architecture: Architecture, seed: int) -> SimCLR:
    """A freshly initialised model; the same seed gives the same weights, and the caller's random state is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SimCLR(architecture)
