"""What every evaluation of a frozen encoder begins with: features of train and val, and proof that it was frozen."""

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eval.features import Features, extract
from model.checkpoint import Checkpoint
from model.load import fingerprint, load_encoder
from pipeline.loader import Setting
from pipeline.remote import Cache, open_split
from shards.errors import UserError, positive_int
from shards.manifest import ShardSet

# "Resize the short side to 256, take the central 224" of ImageNet evaluations.
CENTER_FRACTION = 0.875


@dataclass(frozen=True)
class Frozen:
    """The encoder of a checkpoint, and its features of both splits of a data set. seconds: they took."""

    encoder: nn.Module
    found: Checkpoint
    encoder_sha256: str
    train: Features
    val: Features
    train_shards: ShardSet
    val_shards: ShardSet
    untrained: bool
    image_size: int
    seconds: float

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.train_shards.classes)

    def refuse_change(self) -> None:
        """Raise RuntimeError where the encoder is not what it was when its features were taken."""
        if fingerprint(self.encoder) != self.encoder_sha256:
            raise RuntimeError("the encoder changed while it was probed; the number would be worth nothing")

    def report(self) -> dict[str, Any]:
        """What a figure must be read with."""
        return {
            "untrained": self.untrained,
            "train_images": len(self.train_shards),
            "val_images": len(self.val_shards),
            "classes": len(self.classes),
            "image_size": self.image_size,
            "center_fraction": CENTER_FRACTION,
            "checkpoint": str(self.found.path),
            "checkpoint_sha256": self.found.sha256,
            "checkpoint_step": self.found.state["step"],
            "encoder_sha256": self.encoder_sha256,
            "train_manifest": self.train_shards.fingerprint,
            "val_manifest": self.val_shards.fingerprint,
        }

    def out(self, given: Path | None, name: str) -> Path:
        """Where results go, without their ending: RUN for RUN/checkpoints/step-*/state.pt, else beside the file."""
        inside_run = self.found.path.parent.parent.name == "checkpoints"
        folder = given or (self.found.path.parent.parent.parent if inside_run else self.found.path.parent)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / (f"{name}-untrained" if self.untrained else name)


def freeze(arguments: argparse.Namespace) -> Frozen:
    """Extract features as the command line's ``arguments`` (add_arguments) say.

    Raises CheckpointError or UserError where checkpoint or data cannot be used.
    """
    started = time.monotonic()
    encoder, found = load_encoder(arguments.ckpt, untrained=arguments.untrained)
    data = arguments.data or found.state["data"]
    cache = Cache(arguments.cache.expanduser(), int(arguments.cache_gb * 1e9))
    (train, train_files), (val, val_files) = (open_split(data, split, cache) for split in ("train", "val"))
    if train.classes != val.classes:
        raise UserError(f"train and val of {data} name different classes; pack them together")
    device = torch.device("cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu")
    encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = fingerprint(encoder)
    size = arguments.image_size or found.state["image_size"]
    setting = Setting(size=size, device=device, threads=len(os.sched_getaffinity(0)))
    train_set, val_set = (
        extract(encoder, shards, files, setting, batch=arguments.batch, center_fraction=CENTER_FRACTION)
        for shards, files in ((train, train_files), (val, val_files))
    )
    return Frozen(
        encoder,
        found,
        before,
        train_set,
        val_set,
        train,
        val,
        arguments.untrained,
        size,
        time.monotonic() - started,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every evaluation takes."""
    parser.add_argument(
        "--ckpt", type=Path, required=True, metavar="RUN_OR_FILE", help="run folder, checkpoint folder or its state.pt"
    )
    parser.add_argument(
        "--data", help="folder or address of packed shards with train and val (default: what the run was trained on)"
    )
    parser.add_argument(
        "--untrained", action="store_true", help="probe the encoder with the weights its run began with"
    )
    parser.add_argument(
        "--image-size", type=positive_int, metavar="PX", help="side of the central view (default: as pre-trained)"
    )
    parser.add_argument("--batch", type=positive_int, default=256, help="images embedded at a time (default: 256)")
    parser.add_argument(
        "--cache", type=Path, default=Path("~/.cache/simclr-dali"), metavar="FOLDER", help="keeps remote shards"
    )
    parser.add_argument("--cache-gb", type=float, default=200.0, metavar="GB", help="how much of them (default: 200)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go (default: the run folder)")
