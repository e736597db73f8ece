"""The files of eval/export.py: how each is written, and what comes out when it is read back."""

import importlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_dali.eval.arguments import EXPORT_ENDINGS
from simclr_dali.eval.model_card import model_card
from simclr_dali.model.classifier import Classifier
from simclr_dali.model.encoder import Encoder
from simclr_dali.model.pretrained import EXPORTED, HEAD, Pretrained, open_pretrained
from simclr_dali.model.simclr import Architecture
from simclr_dali.model.vision import torchvision
from simclr_dali.pipeline.draws import center_fraction
from simclr_dali.shards.errors import UserError

FEATURES, SCORES = "features", "scores"
# Source, path to write, size of the images in pixels, images -> what the written file computes, by name.
Written = dict[str, Tensor]
Format = Callable[[Pretrained, Path, int, Tensor], Written]


class WithHead(nn.Module):
    """images -> (features, scores)."""

    def __init__(self, encoder: Encoder, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(images)
        return features, self.head(features)


def torchvision_file(source: Pretrained, path: Path, size: int, images: Tensor) -> Written:
    """A state_dict; without a head it lacks fc."""
    refuse_unlike(source, "torchvision")
    buffer = io.BytesIO()  # torch.save to a full disk raises no OSError
    torch.save(weights(source), buffer)
    path.write_bytes(buffer.getbuffer())
    head = source.classifier
    model = getattr(torchvision.models, source.architecture.encoder.name)(num_classes=len(head.classes) if head else 1)
    missed = model.load_state_dict(torch.load(path, weights_only=True), strict=head is not None)
    if set(missed.missing_keys) - {f"{HEAD}weight", f"{HEAD}bias"} or missed.unexpected_keys:
        raise UserError(f"torchvision misses {missed.missing_keys} and does not know {missed.unexpected_keys}")
    if head is None:
        model.fc = nn.Identity()
    return {SCORES if head else FEATURES: model.eval()(images)}


def safetensors_file(source: Pretrained, path: Path, size: int, images: Tensor) -> Written:
    """The same keys for every architecture; simclr_dali.load reads the rest from the metadata."""
    about = {key: json.dumps(value) for key, value in described(source, size).items()}
    path.write_bytes(safetensors.torch.save(weights(source), metadata=about))
    features = open_pretrained(path).encoder(images)
    if source.classifier is None:
        return {FEATURES: features}
    state = safetensors.torch.load_file(path)
    return {FEATURES: features, SCORES: F.linear(features, state[f"{HEAD}weight"], state[f"{HEAD}bias"])}


def timm_file(source: Pretrained, path: Path, size: int, images: Tensor) -> Written:
    """Safetensors that timm loads strictly."""
    refuse_unlike(source, "timm")
    safetensors_file(source, path, size, images)
    classes = len(source.classifier.classes) if source.classifier else 0
    model = needed("timm", "timm").create_model(
        source.architecture.encoder.name, num_classes=classes, checkpoint_path=str(path)
    )  # fmt: skip
    return {SCORES if classes else FEATURES: model.eval()(images)}


def onnx_file(source: Pretrained, path: Path, size: int, images: Tensor) -> Written:
    """Any number of images of this size."""
    needed("onnxscript", "onnx")
    runtime = needed("onnxruntime", "onnx")
    names = [FEATURES, SCORES] if source.classifier else [FEATURES]
    torch.onnx.export(
        whole(source), (images,), path, input_names=["images"], output_names=names, dynamic_shapes=any_number(),
        dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(names, {"images": images[1:].numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


def pt2_file(source: Pretrained, path: Path, size: int, images: Tensor) -> Written:
    """torch.export's archive, for any number of images of this size."""
    torch.export.save(torch.export.export(whole(source), (images,), dynamic_shapes=any_number()), path)
    found = torch.export.load(path).module()(images[1:])
    return dict(zip((FEATURES, SCORES), found, strict=True)) if source.classifier else {FEATURES: found}


def hub_folder(source: Pretrained, path: Path, size: int, images: Tensor) -> Written:
    """model.safetensors, config.json and README.md; timm reads it where it has such a network."""
    path.mkdir()
    found = safetensors_file(source, path / EXPORTED, size, images)
    config: dict[str, Any] = {"simclr_dali": described(source, size)}
    classes = source.classifier.classes if source.classifier else ()
    if unlike(source):
        config["architecture"] = source.architecture.encoder.name
    else:
        config |= {
            "architecture": source.architecture.encoder.name,
            "num_classes": len(classes),
            "num_features": source.encoder.width,
            "pretrained_cfg": {
                "input_size": [3, size, size],
                "interpolation": source.classifier.interpolation if source.classifier else "bilinear",
                "crop_pct": center_fraction(size),
                "mean": [0.485, 0.456, 0.406],
                "std": [0.229, 0.224, 0.225],
                "num_classes": len(classes),
                "first_conv": "conv1",
                "classifier": "fc",
            },
        }
    if classes:
        config["label_names"] = list(classes)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (path / "README.md").write_text(model_card(source, size, in_timm=not unlike(source)))
    return found


FORMATS: dict[str, Format] = {
    "torchvision": torchvision_file,
    "timm": timm_file,
    "safetensors": safetensors_file,
    "onnx": onnx_file,
    "pt2": pt2_file,
    "hub": hub_folder,
}
assert FORMATS.keys() == EXPORT_ENDINGS.keys()


def weights(source: Pretrained) -> dict[str, Tensor]:
    """By torchvision's keys; a classifier's head is fc."""
    found = {key: value.contiguous() for key, value in source.encoder.state_dict().items()}
    if source.classifier is not None:
        found |= {f"{HEAD}{key}": value.contiguous() for key, value in source.classifier.head.state_dict().items()}
    return found


def whole(source: Pretrained) -> nn.Module:
    """What is exported as a graph."""
    return WithHead(source.encoder, source.classifier.head).eval() if source.classifier else source.encoder


def any_number() -> tuple[dict[int, Any]]:
    """Of images, in a graph."""
    return ({0: torch.export.Dim("n", min=1, max=65_536)},)


def described(source: Pretrained, size: int) -> dict[str, Any]:
    """What our own reader needs beside the weights, and where they come from."""
    about = {
        "architecture": Architecture(source.architecture.encoder).plain(),
        "conventions": source.encoder.conventions(),
        "image_size": size,
        "center_fraction": center_fraction(size),
        "checkpoint_sha256": source.sha256,
        "step": source.step,
        "tuned": source.tuned,
    }
    return about | (_of_head(source.classifier) if source.classifier else {})


def _of_head(classifier: Classifier) -> dict[str, Any]:
    return {"classes": list(classifier.classes), "interpolation": classifier.interpolation}


def unlike(source: Pretrained) -> list[str]:
    """In what an encoder differs from the network of its name in torchvision and timm."""
    return source.architecture.encoder.differences(source.encoder)


def refuse_unlike(source: Pretrained, library: str) -> None:
    """Raise UserError where ``library`` has no network that computes what this encoder does."""
    if differences := unlike(source):
        raise UserError(
            f"{library} has no {source.architecture.encoder.name} with {' and '.join(differences)}; use --format "
            "safetensors, onnx or pt2"
        )


def needed(module: str, what: str) -> Any:
    """A module that only some formats need. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--format {what} needs {module}; pip install -e '.[export]'") from error
