"""An encoder with a linear classifier, as the evaluations leave it behind: one file that predicts on its own."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simclr_dali.model import checkpoint
from simclr_dali.model.checkpoint import CheckpointError
from simclr_dali.model.encoder import Architecture, Encoder, build_encoder

_FORMAT = "simclr-dali classifier"


@dataclass(frozen=True)
class Classifier:
    """encoder: in eval mode. head: features -> one score per class. classes: their names, by label.

    image_size, center_fraction, interpolation: of the view it was fitted to and is to be asked with
    (pipeline.draws.center). about: what the evaluation reported: protocol, accuracy, hashes.
    """

    encoder: Encoder
    architecture: Architecture
    head: nn.Linear
    classes: tuple[str, ...]
    image_size: int
    center_fraction: float
    interpolation: str
    about: dict[str, Any] = field(default_factory=dict)

    def scores(self, images: Tensor) -> Tensor:
        """Images as the encoder takes them -> scores [n, classes], not yet normalised."""
        scores: Tensor = self.head(self.encoder(images))
        return scores

    def state(self) -> dict[str, Any]:
        """What a file of it holds, in tensors and plain values."""
        return {
            "format": _FORMAT,
            "architecture": checkpoint.describe(self.architecture),
            "habits": self.encoder.habits(),
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
        try:
            architecture = checkpoint.as_architecture(state["architecture"])
            encoder = build_encoder(architecture)
            encoder.load_state_dict(state["encoder"])
            encoder.take_habits(state["habits"])
            classes, width = state["weight"].shape
            if width != encoder.width:
                raise ValueError(f"its head takes {width} features, its encoder gives {encoder.width}")
            head = nn.Linear(width, classes)
            head.load_state_dict({"weight": state["weight"], "bias": state["bias"]})
            if len(state["classes"]) != classes:
                raise ValueError(f"{len(state['classes'])} names for {classes} classes")
            return Classifier(
                encoder.eval(), architecture, head.eval(), tuple(state["classes"]), state["image_size"],
                state["center_fraction"], state["interpolation"], state["about"],
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path} is a damaged classifier ({reason}); fit it again") from error


def is_classifier(state: dict[Any, Any]) -> bool:
    return state.get("format") == _FORMAT


def load_classifier(path: Path) -> Classifier:
    """The classifier of a file of ours. Raises CheckpointError where it is none."""
    if not path.is_file():
        raise CheckpointError(f"{path} is no file; give the linear.pt or finetune-F.pt that an evaluation wrote")
    state = checkpoint.plain_values(path.read_bytes())
    if state is None or not is_classifier(state):
        raise CheckpointError(
            f"{path} holds no classifier; give the linear.pt of eval/linear.py or the finetune-F.pt of eval/finetune.py"
        )
    return Classifier.of_state(state, path)


def save_classifier(path: Path, classifier: Classifier) -> None:
    """Write it, whole or not at all. Raises OSError where the disk refuses."""
    buffer = io.BytesIO()  # torch.save to a full disk raises no OSError
    torch.save(classifier.state(), buffer)
    checkpoint.write_file(path, buffer.getbuffer())
