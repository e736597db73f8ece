"""An encoder with a linear classifier, as the evaluations leave it behind: one file that predicts on its own."""

import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simclr_dali.model import migrations
from simclr_dali.model.checkpoint import CheckpointError
from simclr_dali.model.encoder import Encoder
from simclr_dali.model.simclr import Architecture
from simclr_dali.shards.durable import write_durably

_FORMAT = "simclr-dali classifier"


@dataclass(frozen=True)
class Classifier:
    """An encoder in eval mode, a classifier, and the view that it was fitted to (pipeline.draws.center)."""

    encoder: Encoder
    architecture: Architecture
    head: nn.Linear
    """Features -> one score per class."""
    classes: tuple[str, ...]
    """Their names, by label."""
    image_size: int
    """Side of the view, in pixels."""
    center_fraction: float
    """Share of a picture's short side that the view shows."""
    interpolation: str
    about: dict[str, Any] = field(default_factory=dict)
    """What the evaluation reported: protocol, accuracy, hashes."""

    def scores(self, images: Tensor) -> Tensor:
        """Images as the encoder takes them -> scores [n, classes], not yet normalised."""
        scores: Tensor = self.head(self.encoder(images))
        return scores

    def state(self) -> dict[str, Any]:
        """What a file of it holds, in tensors and plain values."""
        return {
            "format": _FORMAT,
            "architecture": self.architecture.plain(),
            "conventions": self.encoder.conventions(),
            "encoder": {key: value.cpu() for key, value in self.encoder.state_dict().items()},
            "weight": self.head.weight.detach().cpu(),
            "bias": self.head.bias.detach().cpu(),
            "classes": list(self.classes),
            "image_size": self.image_size,
            "center_fraction": self.center_fraction,
            "interpolation": self.interpolation,
            "about": self.about,
        }

    @staticmethod
    def of_state(state: dict[str, Any], path: Path) -> "Classifier":
        """The inverse of :meth:`state`. Raises CheckpointError, naming ``path``, where it does not hold together."""
        state = migrations.conventions(state)
        try:
            architecture = Architecture.of_plain(state["architecture"])
            encoder = architecture.encoder.build()
            encoder.load_state_dict(state["encoder"])
            encoder.adopt(state["conventions"])
            classes, width = state["weight"].shape
            if width != encoder.width:
                raise ValueError(f"its head takes {width} features, its encoder gives {encoder.width}")
            head = nn.Linear(width, classes)
            head.load_state_dict({"weight": state["weight"], "bias": state["bias"]})
            if len(state["classes"]) != classes:
                raise ValueError(f"{len(state['classes'])} names for {classes} classes")
            return Classifier(
                encoder=encoder.eval(),
                architecture=architecture,
                head=head.eval(),
                classes=tuple(state["classes"]),
                image_size=state["image_size"],
                center_fraction=state["center_fraction"],
                interpolation=state["interpolation"],
                about=state["about"],
            )
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path} is a damaged classifier ({reason}); fit it again") from error


def is_classifier(state: dict[Any, Any]) -> bool:
    return state.get("format") == _FORMAT


def save_classifier(path: Path, classifier: Classifier) -> None:
    """Write it, whole or not at all. Raises UserError where the disk refuses."""
    buffer = io.BytesIO()  # torch.save to a full disk raises no OSError
    torch.save(classifier.state(), buffer)
    write_durably(path, buffer.getbuffer(), tag=f".{os.getpid()}")
