"""What every evaluation of an encoder begins with: encoder, data, features, and proof that it stayed as it was."""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simclr_dali.model.checkpoint import STATE
from simclr_dali.model.classifier import Classifier, save_classifier
from simclr_dali.model.collectives import all_sum
from simclr_dali.model.encoder import SMALLEST_SIZE_FOR_7X7, Encoder
from simclr_dali.model.pretrained import Pretrained, fingerprint, open_pretrained
from simclr_dali.model.process import Process, by_rank_0, join, on_gpu, say
from simclr_dali.pipeline.cache import Cache
from simclr_dali.pipeline.draws import center_fraction
from simclr_dali.pipeline.features import Features, extract, share
from simclr_dali.pipeline.files import Files
from simclr_dali.pipeline.loader import Setting
from simclr_dali.pipeline.remote import is_remote, open_split
from simclr_dali.shards.durable import refusals_named, write_durably, writing
from simclr_dali.shards.errors import UserError, positive_int
from simclr_dali.shards.manifest import ShardSet

_PATIENCE = timedelta(hours=2)  # ranks wait for the one with the slowest disk
_ABANDONED = 3600  # seconds without a write after which a file that was being written is a leftover


@dataclass(frozen=True)
class Split:
    """A packed split, and what opens its files."""

    shards: ShardSet
    files: Callable[[], Files]


@dataclass(frozen=True)
class Opened:
    """An encoder that is not to change, on its device, and the data it is asked about.

    encoder_sha256: of its weights and statistics at the beginning. batch: images embedded at a time.
    features: folder that keeps extracted features, or None.
    """

    process: Process
    source: Pretrained
    encoder: Encoder
    encoder_sha256: str
    train: Split
    val: Split
    image_size: int
    batch: int
    untrained: bool
    data: str
    features: Path | None
    given_out: Path | None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.shards.classes

    def setting(self, interpolation: str = "bilinear") -> Setting:
        return Setting(
            size=self.image_size,
            device=self.process.device,
            threads=self.process.cores,
            interpolation=interpolation,
        )

    def extract(self, split: Split, interpolation: str = "bilinear") -> Features:
        """Features of this rank's share of a split, in storage order; kept, or taken, where a folder for them is.

        Raises UserError where some are not finite. All ranks call it.
        """
        rank, world = self.process.rank, self.process.world
        kept = self._kept(split, interpolation)
        found = self._taken(kept, len(share(len(split.shards), rank, world))) if kept else None
        if found is None:
            found = extract(
                self.encoder,
                split.shards,
                split.files,
                self.setting(interpolation),
                batch=self.batch,
                ids=share(len(split.shards), rank, world),
                silent=rank > 0,
            )
            if kept is not None:
                _keep(kept, found)
        bad = int(all_sum((~found.features.isfinite()).any(1).sum()))
        if bad:
            raise UserError(
                f"the features of {bad} of {len(split.shards)} images of {split.shards.split} are not finite; the "
                f"training of {self.source.path} went astray, or its values are too large for float32"
            )
        return found

    def _taken(self, kept: Path, count: int) -> Features | None:
        if not kept.is_file():
            return None
        try:
            with np.load(kept, allow_pickle=False) as file:
                features, labels = torch.from_numpy(file["features"]), torch.from_numpy(file["labels"])
        except Exception as error:  # NumPy fails on a damaged file in a dozen ways
            print(f"warning: {kept} cannot be read ({error}); its features are extracted again", file=sys.stderr)
            return None
        if len(features) != count or len(labels) != count:
            print(f"warning: {kept} holds {len(features)} rows, not {count}; extracted again", file=sys.stderr)
            return None
        return Features(features.to(self.process.device), labels.to(self.process.device))

    def _kept(self, split: Split, interpolation: str) -> Path | None:
        if self.features is None:
            return None
        # All that the features depend on; a device or version that rounds otherwise is not told apart.
        of = [self.encoder_sha256, self.encoder.habits(), split.shards.fingerprint, self.image_size, interpolation]
        name = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]
        return self.features / f"{split.shards.split}-{name}-{self.process.rank}of{self.process.world}.npz"

    def refuse_change(self) -> None:
        """Raise RuntimeError where the encoder is not what it was at the beginning."""
        if fingerprint(self.encoder) != self.encoder_sha256:
            raise RuntimeError("the encoder changed while it was probed; the number would be worth nothing")

    def report(self) -> dict[str, Any]:
        """What a figure must be read with."""
        return {
            "untrained": self.untrained,
            "tuned": self.source.tuned,  # an encoder that has seen labels is no pre-trained one
            "train_images": len(self.train.shards),
            "val_images": len(self.val.shards),
            "classes": len(self.classes),
            "image_size": self.image_size,
            "center_fraction": center_fraction(self.image_size),
            "encoder": f"{self.source.architecture.name} x{self.source.architecture.width:g}",
            "layout": self.source.layout,
            **self.encoder.habits(),
            "checkpoint": str(self.source.path),
            "checkpoint_sha256": self.source.sha256,
            "checkpoint_step": self.source.step,
            "encoder_sha256": self.encoder_sha256,
            "data": self.data,
            "train_manifest": self.train.shards.fingerprint,
            "val_manifest": self.val.shards.fingerprint,
            "processes": self.process.world,
        }

    def whose(self) -> str:
        """For a printed line: where the encoder is not simply a pre-trained one."""
        tuned = self.source.tuned
        return " (untrained encoder)" if self.untrained else f" (encoder of {tuned})" if tuned else ""

    def out(self, name: str) -> Path:
        """Where results go, without their ending: RUN for RUN/checkpoints/step-*/state.pt, else beside the file."""
        folder = self.given_out or home(self.source.path)
        with refusals_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder / (f"{name}-untrained" if self.untrained else name)

    def write(self, out: Path, result: dict[str, Any], model: Classifier | None = None) -> None:
        """Write ``out``.json, and before it the model to ``out``.pt, on rank 0.

        Results of the same name that are of another encoder, other data or other settings get a number and stay.
        """
        if self.process.rank:
            return
        described, weights = out.with_name(f"{out.name}.json"), out.with_name(f"{out.name}.pt")
        with refusals_named(described):
            _set_aside(described, weights, result)
            if model is not None:
                save_classifier(weights, model)
        write_durably(described, (json.dumps(result, indent=2) + "\n").encode())


# By which two results of one name are told apart.
_IDENTITY = (
    "encoder_sha256", "train_manifest", "val_manifest", "image_size", "center_fraction", "unit_range", "stem_relu",
    "stem_padding", "seed", "differs", "images_sha256", "k", "temperature",
)  # fmt: skip


def _set_aside(described: Path, weights: Path, result: dict[str, Any]) -> None:
    if not described.is_file():
        return
    try:
        before = json.loads(described.read_bytes())
        same = all(before.get(key) == json.loads(json.dumps(result.get(key))) for key in _IDENTITY)
    except (ValueError, AttributeError):
        same = False
    if same:
        return
    number = 1
    while any((aside := described.with_name(f"{described.stem}.{number}.json")).with_suffix(ending).exists()
              for ending in (".json", ".pt")):  # fmt: skip
        number += 1
    print(f"{described} was of another encoder, data or setting; it is now {aside.name}")
    if weights.is_file():
        weights.replace(aside.with_suffix(".pt"))
    described.replace(aside)


def _keep(path: Path, found: Features) -> None:
    with refusals_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f"{path.name}.*.tmp"):
        with suppress(OSError):  # it is complete now, or somebody else's
            if time.time() - leftover.stat().st_mtime > _ABANDONED:  # by a process that was killed
                leftover.unlink()
    with writing(path, f".{os.getpid()}") as file:  # another evaluation may be keeping the same
        np.savez(file, features=found.features.cpu().numpy(), labels=found.labels.cpu().numpy())


def home(path: Path) -> Path:
    """The run folder of one of its checkpoints; the folder of any other file."""
    of_a_run = path.name == STATE and path.parent.parent.name == "checkpoints"
    return path.parent.parent.parent if of_a_run else path.parent


def open_evaluation(arguments: argparse.Namespace) -> Opened:
    """Join the other ranks and open what the command line's ``arguments`` (add_arguments) name.

    Raises CheckpointError, LaunchError or UserError where checkpoint, processes or data cannot be used.
    """
    process = join(_PATIENCE)
    source = open_encoder(arguments)
    data = arguments.data or source.data
    if not data:
        raise UserError(f"{source.path} does not say what it was trained on; give --data, a folder of packed shards")
    train, val = (Split(*open_split(data, split, _cache(arguments))) for split in ("train", "val"))
    if train.shards.classes != val.shards.classes:
        raise UserError(f"train and val of {data} name different classes; pack them together")
    if source.layout != "simclr-dali":
        habits = ", ".join(f"{name} {value}" for name, value in source.encoder.habits().items())
        say(
            process,
            f"{source.path.name}: {source.architecture.name}, width {source.architecture.width:g}, by the keys of "
            f"{source.layout}; {habits}; {len(source.left_out)} keys are not the encoder's",
        )
    encoder = source.encoder.requires_grad_(False).to(process.device, memory_format=torch.channels_last)
    sha256 = fingerprint(encoder)
    of_rank_0 = by_rank_0(process, lambda: (sha256, train.shards.fingerprint, val.shards.fingerprint))
    if of_rank_0 != (sha256, train.shards.fingerprint, val.shards.fingerprint):
        raise UserError(
            f"rank {process.rank} has another checkpoint or other data than rank 0; give all machines the same"
        )
    return Opened(
        process=process,
        source=source,
        encoder=encoder,
        encoder_sha256=sha256,
        train=train,
        val=val,
        image_size=arguments.image_size or own_size(source),
        batch=arguments.batch,
        untrained=arguments.untrained,
        data=data if is_remote(data) else str(Path(data).resolve()),
        features=getattr(arguments, "features", None),
        given_out=arguments.out,
    )


def open_one_split(arguments: argparse.Namespace, source: Pretrained) -> Split:
    """The split that --data and --split name. Raises UserError where there is none."""
    data = arguments.data or source.data
    if not data:
        raise UserError(f"{source.path} does not say what it was trained on; give --data, a folder of packed shards")
    return Split(*open_split(data, arguments.split, _cache(arguments)))


def asking_device() -> tuple[torch.device, int]:
    """Where a process on its own computes, and the cores it has."""
    return torch.device("cuda" if on_gpu() else "cpu"), len(os.sched_getaffinity(0))


def _cache(arguments: argparse.Namespace) -> Cache:
    return Cache(arguments.cache.expanduser(), int(arguments.cache_gb * 1e9))


def own_size(source: Pretrained) -> int:
    """Side of the view that the encoder is asked with: as pre-trained; else 224 pixels, or 32 with the small stem."""
    return source.image_size or (224 if source.architecture.stem == "7x7" else SMALLEST_SIZE_FOR_7X7 // 2)


def open_encoder(arguments: argparse.Namespace) -> Pretrained:
    """The encoder that --ckpt, --prefix, --unit-range and --untrained name."""
    return open_pretrained(
        arguments.ckpt,
        untrained=arguments.untrained,
        prefix=arguments.prefix,
        unit_range=arguments.unit_range,
        stem_padding=arguments.stem_padding,
    )


def add_encoder_arguments(parser: argparse.ArgumentParser, *, batch: bool = True) -> None:
    """Which encoder; batch: whether it is asked about many images."""
    parser.add_argument(
        "--ckpt", type=Path, required=True, metavar="RUN_OR_FILE",
        help="run folder, checkpoint folder, its state.pt, a classifier of ours, or weights of torchvision, timm, "
        "mmpretrain, VISSL, lightly, solo-learn, moco or converted from google-research/simclr",
    )  # fmt: skip
    parser.add_argument("--untrained", action="store_true", help="the encoder with the weights its run began with")
    parser.add_argument("--prefix", help="beginning of the encoder's keys, where a file holds several")
    parser.add_argument(
        "--stem-padding", type=positive_int, metavar="PX",
        help="of a 3x3 stem, which weights do not show (default: 1, and 2 for solo-learn's)",
    )  # fmt: skip
    parser.add_argument(
        "--unit-range", action=argparse.BooleanOptionalAction,
        help="whether the weights were trained on values in 0..1 instead of normalised ones, as those of "
        "google-research/simclr (default: as their keys say; tonylins/simclr-converter's do not)",
    )  # fmt: skip
    parser.add_argument(
        "--image-size",
        type=positive_int,
        metavar="PX",
        help="side of the central view (default: as pre-trained; of other libraries 224, or 32 with the 3x3 stem)",
    )
    if batch:
        parser.add_argument("--batch", type=positive_int, default=256, help="images embedded at a time (default: 256)")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Which data, and where remote shards are kept."""
    parser.add_argument("--data", help="folder or address of packed shards (default: what the run was trained on)")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("~/.cache/simclr-dali"),
        metavar="FOLDER",
        help="keeps remote shards (default: ~/.cache/simclr-dali)",
    )
    parser.add_argument("--cache-gb", type=float, default=200.0, metavar="GB", help="how much of them (default: 200)")


def add_arguments(parser: argparse.ArgumentParser, *, features: bool = True) -> None:
    """What every evaluation takes; features: whether its features may be kept."""
    add_encoder_arguments(parser)
    add_data_arguments(parser)
    if features:
        parser.add_argument(
            "--features", type=Path, metavar="FOLDER", help="keep extracted features here, and use those that are there"
        )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go (default: the run folder)")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the deepspeed launcher
