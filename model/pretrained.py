"""Encoders out of files: our runs, checkpoints and classifiers, and the weights of other libraries.

from simclr_dali import load
encoder = load("runs/ds_lars")

encoder(images)            # pooled features [n, 2048]
encoder.features(images)   # the feature map [n, 2048, 7, 7]
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from simclr_dali.model import checkpoint
from simclr_dali.model.checkpoint import Checkpoint, CheckpointError
from simclr_dali.model.classifier import Classifier, is_classifier
from simclr_dali.model.encoder import Architecture, Encoder, build_encoder, build_model
from simclr_dali.model.foreign import find_encoder
from simclr_dali.model.untrusted import exported_about, read_tensors

_PREFIX = "encoder."
EXPORTED = "model.safetensors"


@dataclass(frozen=True)
class Pretrained:
    """An encoder in eval mode, on the CPU, in float32, and where it comes from.

    sha256: of the file read. layout: "simclr-dali", or whose keys the file has (model.foreign). step: of pre-training;
    image_size: side of the views it was trained on, in pixels; data: address of the shards; None where the file does
    not say. classifier: the whole model, where the file is one of ours. run_state: all that our checkpoint holds.
    left_out: keys of the file that are not the encoder's. tuned: protocol by which it learned from labels.
    """

    encoder: Encoder
    architecture: Architecture
    path: Path
    sha256: str
    layout: str
    step: int | None = None
    image_size: int | None = None
    data: str | None = None
    classifier: Classifier | None = None
    run_state: dict[str, Any] | None = None
    left_out: tuple[str, ...] = ()
    tuned: str | None = None


def load(
    path: str | Path, *, prefix: str | None = None, unit_range: bool | None = None, stem_padding: int | None = None
) -> Encoder:
    """The encoder of a run folder (its newest checkpoint) or of a file, ours or another library's (model.foreign).

    In eval mode, on the CPU, in float32. prefix: where a file holds several encoders, the beginning of the keys of
    the one that is meant. unit_range: whether it was trained on RGB values in 0 to 1, not normalised (default: as the
    layout says). stem_padding: of a 3x3 stem (default: 1, and 2 for solo-learn's). Raises CheckpointError where the
    file is missing, damaged, or holds no whole encoder.
    """
    return open_pretrained(Path(path), prefix=prefix, unit_range=unit_range, stem_padding=stem_padding).encoder


def open_pretrained(
    path: Path,
    *,
    untrained: bool = False,
    prefix: str | None = None,
    unit_range: bool | None = None,
    stem_padding: int | None = None,
) -> Pretrained:
    """What :func:`load` returns, with where it comes from.

    untrained: with the weights its run began with, the baseline of any claim; only our runs know them.
    """
    if (path / EXPORTED).is_file() and not (path / "checkpoints").exists():
        path = path / EXPORTED  # a folder of eval/export.py --format hub
    if path.is_dir() or (path.is_file() and path.name == checkpoint.STATE):
        opened = _of_run(checkpoint.load(path), untrained)
    elif not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a run folder, a folder step-*, or a file with weights")
    else:
        opened = _of_file(path, path.read_bytes(), prefix, stem_padding)
        if untrained:
            raise CheckpointError(f"{path} does not say what its training began with; --untrained needs a run of ours")
    if stem_padding is not None and opened.architecture.stem != "3x3":
        raise CheckpointError(f"{path} has the {opened.architecture.stem} stem; a stem padding is for 3x3")
    given = {"unit_range": unit_range, "stem_padding": stem_padding}
    opened.encoder.take_habits({name: value for name, value in given.items() if value is not None})
    return opened


def fingerprint(module: nn.Module) -> str:
    """sha256 over names and bytes of all parameters and buffers: equal before and after means untouched."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _of_run(found: Checkpoint, untrained: bool) -> Pretrained:
    architecture, state = found.architecture(), found.state
    if untrained:
        encoder = build_model(architecture, state["seed"]).encoder
    else:
        encoder = build_encoder(architecture)
        weights = {key.removeprefix(_PREFIX): value for key, value in state["model"].items() if key.startswith(_PREFIX)}
        try:
            encoder.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{found.path} does not hold the {architecture.name} it names: {reason}") from error
    return Pretrained(
        encoder.eval(), architecture, found.path, found.sha256, "simclr-dali", 0 if untrained else state["step"],
        state["image_size"], state.get("data"), run_state=state,
    )  # fmt: skip


def _of_file(path: Path, data: bytes, prefix: str | None, stem_padding: int | None) -> Pretrained:
    sha256 = hashlib.sha256(data).hexdigest()
    if path.suffix != ".safetensors":
        own = checkpoint.plain_values(data)
        if own is not None and checkpoint.is_ours(own):
            return _of_run(Checkpoint(path, sha256, own), untrained=False)
        if own is not None and is_classifier(own):
            classifier = Classifier.of_state(own, path)
            about = classifier.about
            protocol = str(about.get("protocol", ""))
            tuned = protocol if protocol.startswith("finetune") else about.get("tuned")
            return Pretrained(
                classifier.encoder, classifier.architecture, path, sha256, "simclr-dali", about.get("checkpoint_step"),
                classifier.image_size, about.get("data"), classifier, tuned=tuned,
            )  # fmt: skip
    found = find_encoder(read_tensors(path, data), str(path), prefix, stem_padding)
    encoder = build_encoder(found.architecture)
    encoder.load_state_dict(found.weights)
    about = exported_about(path) if path.suffix == ".safetensors" else {}
    encoder.take_habits(about.get("habits", found.habits))
    return Pretrained(
        encoder.eval(), found.architecture, path, sha256, "simclr-dali" if about else found.layout, about.get("step"),
        about.get("image_size"), left_out=found.left_out, tuned=about.get("tuned"),
    )  # fmt: skip
