"""Encoders out of files: our runs, checkpoints and classifiers, and the weights of other libraries."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from simclr_dali.model import checkpoint
from simclr_dali.model.checkpoint import Checkpoint, CheckpointError
from simclr_dali.model.classifier import Classifier, is_classifier
from simclr_dali.model.encoder import Encoder
from simclr_dali.model.foreign import find_encoder, linear_head, require_complete
from simclr_dali.model.published import WEIGHTS, fetch, is_published
from simclr_dali.model.resnet import ResNet
from simclr_dali.model.simclr import Architecture, build_model
from simclr_dali.model.untrusted import exported_about, read_tensors
from simclr_dali.shards.wording import counted

_PREFIX = "encoder."
OURS = "simclr-dali"  # the layout of what this project writes
EXPORTED = "model.safetensors"
HEAD = "fc."  # of a classifier's last layer, in a file that other programs read


@dataclass(frozen=True)
class Pretrained:
    """An encoder in eval mode, on the CPU, in float32, and where it comes from; None where its file does not say."""

    encoder: Encoder
    architecture: Architecture
    path: Path
    sha256: str
    """Of the file read."""
    layout: str
    """"simclr-dali", or whose keys the file has (model.foreign)."""
    step: int | None = None
    """Of pre-training."""
    image_size: int | None = None
    """Side of the views it was trained on, in pixels."""
    data: str | None = None
    """Address of the shards."""
    classifier: Classifier | None = None
    """The whole model, where the file is a classifier of ours."""
    run_state: dict[str, Any] | None = None
    """All that our checkpoint holds."""
    left_out: tuple[str, ...] = ()
    """Keys of the file that are not the encoder's."""
    tuned: str | None = None
    """Protocol by which it, or what its run began with, learned from labels."""
    name: str | None = None
    """Of published weights (model.published)."""
    head: tuple[Tensor, Tensor] | None = None
    """Weight and bias of the linear classifier that another library's file, or an export, holds beside the encoder."""
    classes: tuple[str, ...] = ()
    """What the classes of ``head`` are called, where the file says it."""
    interpolation: str = "bilinear"
    """By which the pictures that ``head`` was fitted to became views."""

    @property
    def view_size(self) -> int:
        """Side of the views, in pixels, that it is asked with: as pre-trained, or as is usual for its kind."""
        return self.image_size or self.architecture.encoder.usual_image_size()

    def in_words(self) -> str:
        """For people: what was found, and what it is taken for."""
        other = {key: value for key, value in self.encoder.conventions().items() if key.startswith("stem_")}
        stem = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in other.items())
        keys = len(self.left_out)
        return (
            f"{self.path}: {self.architecture.encoder.label()}, layout of {self.layout}, takes "
            f"{self.encoder.input_range()}"
            + (f"; {stem}; {counted(keys, 'key')} not the encoder's" if self.layout != OURS else "")
        )


def open_pretrained(
    path: Path,
    *,
    untrained: bool = False,
    prefix: str | None = None,
    unit_range: bool | None = None,
    stem_padding: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Pretrained:
    """The encoder of a run folder (its newest checkpoint), of a file, ours or another library's (model.foreign), or of
    weights that are known by their name (model.published).

    untrained: with the weights its run began with, the baseline of any claim; only our runs know them. prefix: where a
    file holds several encoders, the beginning of the keys of the one that is meant. unit_range: whether it was trained
    on RGB values in 0 to 1, not normalised (default: as the layout says). stem_padding: of a 3x3 stem (default: 1, and
    2 for solo-learn's). mean, std: of the RGB values in 0 to 1 by which its images were normalised (default:
    ImageNet's). Raises CheckpointError where the file is missing, damaged, or holds no whole encoder, and for a value
    that cannot be.
    """
    name = str(path) if is_published(path) else None
    path = fetch(name) if name else path
    path = path / EXPORTED if is_hub_folder(path) else path
    if path.is_dir() or (path.is_file() and path.name == checkpoint.STATE):
        opened = _of_run(checkpoint.load(path), untrained)
    elif not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; give a run folder, a folder step-*, a file with weights, or one of the names "
            f"{', '.join(WEIGHTS)}"
        )
    else:
        opened = _of_file(path, path.read_bytes(), prefix, stem_padding)
        if untrained:
            raise CheckpointError(f"{path} does not say what its training began with; --untrained needs a run of ours")
    described = opened.architecture.encoder
    if stem_padding is not None and not (isinstance(described, ResNet) and described.stem == "3x3"):
        raise CheckpointError(f"{path} holds {described.label()}; a stem padding is for the 3x3 stem")
    given = {"unit_range": unit_range, "stem_padding": stem_padding, "mean": mean, "std": std}
    if (mean is None) != (std is None):
        raise CheckpointError(f"{path}: a {'std' if mean is None else 'mean'} is given alone; give --mean and --std")
    if mean is not None or std is not None:
        given["unit_range"] = bool(unit_range)  # as the caller says, whatever the layout does
    try:
        opened.encoder.adopt({name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be used so: {error}") from error
    return replace(opened, name=name)


def is_hub_folder(path: Path) -> bool:
    """Whether it is a folder of eval/export.py --format hub, and no run."""
    return (path / EXPORTED).is_file() and not (path / "checkpoints").exists()


def fingerprint(module: nn.Module) -> str:
    """sha256 over names and bytes of all parameters and buffers: equal before and after means untouched."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _of_run(found: Checkpoint, untrained: bool) -> Pretrained:
    architecture, state = found.architecture(), found.state
    begun_with = state.get("begun_with") or {}
    if untrained and begun_with:
        raise CheckpointError(
            f"{found.path} began with the weights of {begun_with['path']}, not with random ones; evaluate those "
            f"instead of --untrained"
        )
    if untrained:
        encoder = build_model(architecture, state["seed"]).encoder
    else:
        encoder = architecture.encoder.build()
        weights = {key.removeprefix(_PREFIX): value for key, value in state["model"].items() if key.startswith(_PREFIX)}
        try:
            encoder.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{found.path} does not hold the {architecture.encoder.name} it names: {reason}"
            ) from error
    return Pretrained(
        encoder=encoder.eval(),
        architecture=architecture,
        path=found.path,
        sha256=found.sha256,
        layout=OURS,
        step=0 if untrained else state["step"],
        image_size=state["image_size"],
        data=state.get("data"),
        run_state=state,
        tuned=begun_with.get("tuned"),
    )


def _of_file(path: Path, data: bytes, prefix: str | None, stem_padding: int | None) -> Pretrained:
    sha256 = hashlib.sha256(data).hexdigest()
    if path.suffix != ".safetensors":
        own = checkpoint.plain_values(data)
        if own is not None and checkpoint.is_ours(own):
            return _of_run(Checkpoint(path, sha256, own), untrained=False)
        if own is not None and is_classifier(own):
            classifier = Classifier.of_state(own, path)
            return _of_classifier(path, sha256, classifier)
    tensors = read_tensors(path, data)
    about = exported_about(path) if path.suffix == ".safetensors" else {}
    if "architecture" in about:
        return _of_export(path, sha256, tensors, about)
    found = find_encoder(tensors, str(path), prefix, stem_padding)
    encoder = found.architecture.encoder.build()
    encoder.load_state_dict(found.weights)
    try:
        encoder.adopt(found.conventions)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be used so: {error}") from error
    return Pretrained(
        encoder.eval(), found.architecture, path, sha256, found.layout, left_out=found.left_out, head=found.head
    )


def _of_classifier(path: Path, sha256: str, classifier: Classifier) -> Pretrained:
    about = classifier.about
    protocol = str(about.get("protocol", ""))
    return Pretrained(
        encoder=classifier.encoder,
        architecture=classifier.architecture,
        path=path,
        sha256=sha256,
        layout=OURS,
        step=about.get("checkpoint_step"),
        image_size=classifier.image_size,
        data=about.get("data"),
        classifier=classifier,
        tuned=protocol if protocol.startswith("finetune") else about.get("tuned"),
    )


def _of_export(path: Path, sha256: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> Pretrained:
    """What eval/export.py wrote, with its metadata."""
    try:
        architecture = Architecture.of_plain(about["architecture"])
        head = tuple(key for key in tensors if key.startswith(HEAD))
        weights = {key: value for key, value in tensors.items() if key not in head}
        weights = require_complete(weights, architecture.encoder, str(path))
        encoder = architecture.encoder.build()
        encoder.load_state_dict(weights)
        encoder.adopt(about.get("conventions", {}))
    except (ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not hold the encoder that it describes ({error}); export it again"
        ) from error
    return Pretrained(
        encoder=encoder.eval(),
        architecture=architecture,
        path=path,
        sha256=sha256,
        layout=OURS,
        step=about.get("step"),
        image_size=about.get("image_size"),
        left_out=head,
        tuned=about.get("tuned"),
        head=linear_head(tensors, HEAD.removesuffix(".")),
        classes=tuple(map(str, about.get("classes", ()))),
        interpolation=about.get("interpolation", "bilinear"),
    )
