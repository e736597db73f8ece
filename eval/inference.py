"""Models in a program: an encoder that takes pictures as they are, and predictions of a classifier.

from simclr_dali import load, predict

encoder = load("runs/ds_lars")
encoder("bird.jpg")        # pooled features [1, 2048]
predict("runs/ds_lars", "bird.jpg").name
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simclr_dali.eval.evaluation import own_device
from simclr_dali.model.checkpoint import CheckpointError
from simclr_dali.model.classifier import Classifier
from simclr_dali.model.encoder import Encoder
from simclr_dali.model.pretrained import Pretrained, is_hub_folder, open_pretrained
from simclr_dali.model.vision import imagenet_classes
from simclr_dali.pipeline.draws import center_fraction
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.image_files import ImageFiles, central_views_of_files, refuse_failures
from simclr_dali.pipeline.pictures import as_files, central_views_of_pictures, is_one
from simclr_dali.shards.cores import usable_cores
from simclr_dali.shards.errors import UserError

_BRIGHTEST = 2.7  # white, normalised: (1 - 0.406) / 0.225


def load(
    path: str | Path,
    *,
    prefix: str | None = None,
    unit_range: bool | None = None,
    stem_padding: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Encoder:
    """The encoder of a run folder, of a file of ours or of another library, or of published weights, by their name.

    In eval mode, on the CPU, in float32. Called with pictures (paths, folders, Pillow's images, files that are open,
    uint8 arrays and tensors, or a list of them, each of its own size; pipeline.pictures), it embeds the views that an
    evaluation has of them, which ``encoder.views(pictures)`` gives: [n, 3, size, size], size as pre-trained. Called
    with a batch of floats [n, 3, h, w], normalised as for ImageNet, it embeds that as it is, of any size. Either is one
    batch, and records gradients as every module does: ask under torch.inference_mode(), and of a large folder give
    parts, or take eval/extract.py. Pictures are decoded by threads of this process: in workers of a DataLoader, start
    those by multiprocessing_context="spawn"; forked ones are refused.

    The names of published weights are in model.published, and the other arguments and what is raised in
    model.pretrained.open_pretrained; UserError for pictures that cannot be used.
    """
    source = open_pretrained(
        Path(path), prefix=prefix, unit_range=unit_range, stem_padding=stem_padding, mean=mean, std=std
    )
    encoder = source.encoder
    encoder.views = partial(_views, encoder, source.view_size)
    encoder.register_forward_pre_hook(_pictures_become_views)
    return encoder


@torch.compiler.disable
def _views(encoder: Encoder, size: int, pictures: Any) -> Tensor:
    first = next(encoder.parameters())
    found = central_views_of_pictures(pictures, LoaderConfig(size=size, device=first.device, threads=usable_cores()))
    return found.to(first.dtype)


def _pictures_become_views(encoder: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if len(given) != 1:
        return None
    (images,) = given
    if isinstance(images, Tensor) and images.dim() == 4 and images.dtype != torch.uint8:
        if not (torch.compiler.is_compiling() or torch._C._is_tracing() or "_values_seen" in encoder.__dict__):
            encoder.__dict__["_values_seen"] = True
            _warn_of_values(images)
        return None
    return (encoder.views(images),)


def _warn_of_values(images: Tensor) -> None:
    """Once an encoder, of its first batch: floats that were not normalised give features that look like any others."""
    try:
        low, high = float(images.detach().min()), float(images.detach().max())
    except Exception:  # inside of a transform such as vmap there are no values yet
        return
    if low >= 0 and high > 0 and (high <= 1 or high > _BRIGHTEST):
        warnings.warn(
            f"the batch has values from {low:g} to {high:g}, and floats are taken as normalised by ImageNet's mean and "
            "standard deviation; give uint8, paths or images where they are not",
            stacklevel=4,
        )


@dataclass(frozen=True)
class ClassScore:
    """A class that a picture may show."""

    name: str
    label: int
    score: float
    """0 to 1; those of all classes add up to 1."""


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of a picture."""

    best: tuple[ClassScore, ...]
    """The likeliest classes, likeliest first."""

    @property
    def name(self) -> str:
        """Of the likeliest class."""
        return self.best[0].name

    @property
    def label(self) -> int:
        return self.best[0].label

    @property
    def score(self) -> float:
        return self.best[0].score


def predict(model: str | Path | Classifier, pictures: Any, *, top: int = 5, batch: int = 64, **conventions: Any) -> Any:
    """Classify pictures: a Prediction of one picture, a list of them of several, or of a folder.

    model: what :func:`open_classifier` takes, or gives, which spares opening it at each call. pictures: as :func:`load`
    says; any number of them. top: how many classes are named. batch: how many pictures are taken at a time. On the GPU
    where there is one. conventions: as of :func:`load`, for weights that take other values. Raises CheckpointError
    where there is no classifier, and UserError where a picture cannot be used or its scores are no numbers.
    """
    for name, value in (("top", top), ("batch", batch)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    classifier = model if isinstance(model, Classifier) else open_classifier(model, **conventions)
    found, names = as_files(pictures)
    files = ImageFiles(found)
    predictions = [Prediction(best) for _, best in classify_files(classifier, files, top, batch)]
    refuse_failures(files.failures, names)
    return predictions[0] if is_one(pictures) else predictions


def open_classifier(path: str | Path, **conventions: Any) -> Classifier:
    """The classifier of a run folder (its linear.pt), of a file of ours, of an export, of a torchvision or mmpretrain
    file that holds one beside its encoder, or of published weights, by their name.

    conventions: as of :func:`load`. Raises CheckpointError where there is none, and where nobody says what its classes
    are called.
    """
    path = Path(path)
    if path.is_dir() and not is_hub_folder(path):
        if not (path / "linear.pt").is_file():
            raise CheckpointError(f"{path} has no linear.pt; make one: simclr-dali linear --ckpt {path}")
        path = path / "linear.pt"
    source = open_pretrained(path, **conventions)
    found = classifier_of(source)
    if found is not None:
        return found
    if source.head is None:
        raise CheckpointError(
            f"{path} holds an encoder and no classifier; give the linear.pt of eval/linear.py, the finetune-F.pt of "
            "eval/finetune.py, or weights with a classifier"
        )
    classes, width = source.head[0].shape
    raise CheckpointError(
        f"{path} holds a classifier of {width} features and {classes} classes, {len(source.classes)} names, and an "
        f"encoder of {source.encoder.width} features; without being given, only the names of ImageNet's 1,000 classes "
        "are known"
    )


def classifier_of(source: Pretrained) -> Classifier | None:
    """The classifier that a file holds beside its encoder; None where it has none, or nobody names its classes."""
    if source.classifier is not None or source.head is None:
        return source.classifier
    weight, bias = source.head
    known = imagenet_classes()
    classes = source.classes or (known if len(weight) == len(known) else ())
    if len(classes) != len(weight) or weight.shape[1] != source.encoder.width:
        return None
    head = nn.Linear(weight.shape[1], len(weight))
    head.load_state_dict({"weight": weight, "bias": bias})
    size = source.view_size
    return Classifier(
        source.encoder, source.architecture, head.eval(), classes, size, center_fraction(size), source.interpolation,
        {"layout": source.layout},
    )  # fmt: skip


def classify_files(
    classifier: Classifier, files: ImageFiles, top: int, batch: int
) -> Iterator[tuple[int, tuple[ClassScore, ...]]]:
    """Of every usable picture its place and its ``top`` likeliest classes; ``files.failures`` names the others."""
    device, cores = own_device()
    classifier.encoder.place(device)
    classifier.head.to(device)
    config = LoaderConfig(
        size=classifier.image_size, device=device, threads=cores, interpolation=classifier.interpolation
    )  # fmt: skip
    with torch.inference_mode():
        for views, places in central_views_of_files(
            files, config, batch=batch, center_fraction=classifier.center_fraction
        ):
            shares = classifier.scores(views).softmax(1)
            if not bool(shares.isfinite().all()):
                raise UserError(
                    f"the scores of picture {places[0]} or one soon after it are no numbers; the classifier's weights "
                    "are damaged, or their training went astray"
                )
            scores, labels = shares.topk(min(top, len(classifier.classes)), dim=1)
            for place, of, which in zip(places, scores.tolist(), labels.tolist(), strict=True):
                best = [
                    ClassScore(classifier.classes[label], label, score) for score, label in zip(of, which, strict=True)
                ]
                yield place, tuple(best)
