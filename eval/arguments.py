"""Arguments that several evaluations take, and what they choose. Imports nothing heavy: --help must answer at once."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from simclr_dali.pipeline.kept_place import Place
from simclr_dali.shards.command_line import positive_int

# What eval/export.py writes, and the ending that timm and torch.export tell a file's kind by.
EXPORT_ENDINGS = {
    "torchvision": ".pth",
    "timm": ".safetensors",
    "safetensors": ".safetensors",
    "onnx": ".onnx",
    "pt2": ".pt2",
    "hub": "",
}


@dataclass(frozen=True)
class EncoderChoice:
    """Which encoder is asked, and how."""

    ckpt: Path
    untrained: bool = False
    prefix: str | None = None
    stem_padding: int | None = None
    unit_range: bool | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    image_size: int | None = None
    """Side of the central view, in pixels; None: as pre-trained."""

    @staticmethod
    def of(given: argparse.Namespace) -> "EncoderChoice":
        names = ("ckpt", "untrained", "image_size")
        return EncoderChoice(**{name: getattr(given, name) for name in names}, **conventions_of(given))


@dataclass(frozen=True)
class DataChoice:
    """Which packed set, and where remote shards are kept."""

    data: str | None = None
    """Folder or address; None: what the run was trained on."""
    cache: Path = Path("~/.cache/simclr-dali")
    cache_gb: float = 200.0
    keep_decoded: Place = "auto"
    """Where decoded pictures stay while a training goes over them (pipeline.kept_memory)."""

    @staticmethod
    def of(given: argparse.Namespace) -> "DataChoice":
        keep_decoded: Place = getattr(given, "keep_decoded", None) or "auto"
        return DataChoice(given.data, given.cache, given.cache_gb, keep_decoded)


def image_size(text: str) -> int:
    """The type of an argument that is the side of a view: below 16 pixels nothing is left of a picture."""
    number = int(text)
    if number < 16:
        raise argparse.ArgumentTypeError(f"{number} is not at least 16")
    return number


def add_encoder_arguments(parser: argparse.ArgumentParser, *, batch: bool = True) -> None:
    """Which encoder; batch: whether it is asked about many images."""
    parser.add_argument(
        "--ckpt", type=Path, required=True, metavar="RUN_OR_FILE",
        help="Take the encoder of this run folder (its newest checkpoint), checkpoint, classifier, hub folder or file "
        "of weights (torchvision, timm, mmpretrain, VISSL, lightly, solo-learn, moco, sthalles/SimCLR, "
        "Spijkervet/SimCLR, or converted from google-research/simclr), or mmpretrain's weights of this name.",
    )  # fmt: skip
    parser.add_argument("--untrained", action="store_true", help="Use the weights that the run began with.")
    parser.add_argument(
        "--image-size", type=image_size, metavar="PX",
        help="Show the central view at this side (default: as pre-trained; of other libraries 224, or 32 with the 3x3 "
        "stem).",
    )  # fmt: skip
    if batch:
        parser.add_argument(
            "--batch", type=positive_int, default=256, metavar="N", help="Embed N images at a time (default: 256)."
        )
    add_foreign_arguments(parser)


def add_foreign_arguments(parser: argparse.ArgumentParser) -> None:
    """What the keys of another library's weights do not show."""
    group = parser.add_argument_group(
        "weights of other libraries",
        "What a file's keys do not show. Runs and exports of this project say it themselves.",
    )
    group.add_argument("--prefix", help="Take the encoder whose keys begin so, where a file holds several.")
    group.add_argument(
        "--stem-padding", type=positive_int, metavar="PX",
        help="Pad the convolution of a 3x3 stem so (default: 1, and 2 for solo-learn's).",
    )  # fmt: skip
    group.add_argument(
        "--unit-range", action=argparse.BooleanOptionalAction,
        help="Give values in 0..1 instead of normalised ones, as the weights of google-research/simclr take them "
        "(default: as their keys say; tonylins/simclr-converter's do not).",
    )  # fmt: skip
    for name in ("mean", "std"):
        group.add_argument(
            f"--{name}", type=float, nargs=3, metavar=("R", "G", "B"),
            help=f"Normalise values in 0..1 by this {name} (default: ImageNet's).",
        )  # fmt: skip


def conventions_of(given: argparse.Namespace) -> dict[str, Any]:
    """What add_foreign_arguments asks for, as model.pretrained.open_pretrained takes it."""
    return {name: getattr(given, name) for name in ("prefix", "stem_padding", "unit_range", "mean", "std")}


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Which data, and where remote shards are kept."""
    default = DataChoice()
    parser.add_argument(
        "--data", help="Take the shards of this folder or address (default: what the run was trained on)."
    )
    parser.add_argument(
        "--cache", type=Path, default=default.cache, metavar="FOLDER",
        help=f"Keep remote shards here (default: {default.cache}).",
    )  # fmt: skip
    parser.add_argument(
        "--cache-gb", type=float, default=default.cache_gb, metavar="GB",
        help=f"Keep no more of them than this (default: {default.cache_gb:g}).",
    )  # fmt: skip


def add_keep_decoded_argument(parser: argparse.ArgumentParser) -> None:
    """For those that train on pictures."""
    parser.add_argument(
        "--keep-decoded", choices=get_args(Place),
        help="Keep decoded pictures from epoch to epoch: auto (default) in the host's memory where they take at most "
        "half of what is free, host up to nine tenths, gpu in half of the GPU's or else the host's, no nowhere.",
    )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser, *, features: bool = True) -> None:
    """What every evaluation takes; features: whether its features may be kept."""
    add_encoder_arguments(parser)
    add_data_arguments(parser)
    if features:
        parser.add_argument(
            "--features", type=Path, metavar="FOLDER",
            help="Keep extracted features here, and use those that are there.",
        )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="Write results here (default: the run folder).")
