"""What every evaluation of an encoder begins with: encoder, data, features, and proof that it stayed as it was."""

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from simclr_dali.eval.arguments import DataChoice, EncoderChoice
from simclr_dali.eval.kept_features import KeptFeatures
from simclr_dali.model.checkpoint import STATE
from simclr_dali.model.classifier import Classifier, save_classifier
from simclr_dali.model.collectives import all_sum
from simclr_dali.model.encoder import Encoder
from simclr_dali.model.pretrained import Pretrained, fingerprint, open_pretrained
from simclr_dali.model.process import Process, init_distributed, on_gpu, on_rank_0, print_now, print_rank_0
from simclr_dali.pipeline.cache import Cache
from simclr_dali.pipeline.draws import center_fraction
from simclr_dali.pipeline.features import Features, extract, share
from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.kept_place import Place
from simclr_dali.pipeline.remote import is_remote, open_split
from simclr_dali.shards.cores import usable_cores
from simclr_dali.shards.durable import read_object, refusals_named, refuse_read_only, write_durably
from simclr_dali.shards.errors import UserError

_PATIENCE = timedelta(hours=2)  # ranks wait for the one with the slowest disk
# By which two results of one name are told apart.
_IDENTITY = (
    "encoder_sha256", "train_manifest", "val_manifest", "image_size", "center_fraction", "seed", "differs",
    "images_sha256", "k", "temperature",
)  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """An encoder that is not to change, on its device, and the data it is asked about."""

    process: Process
    source: Pretrained
    encoder: Encoder
    encoder_sha256: str
    """Of its weights and statistics at the beginning."""
    train: Split
    val: Split
    image_size: int
    batch: int
    """Images embedded at a time."""
    untrained: bool
    data: str
    features: Path | None
    """Folder that keeps extracted features."""
    given_out: Path | None
    keep_decoded: Place = "auto"
    """Where decoded pictures stay while a training goes over them."""

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.shards.classes

    def loader_config(self, interpolation: str = "bilinear") -> LoaderConfig:
        return LoaderConfig(
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
        ids = share(len(split.shards), rank, world)
        kept = None
        if self.features is not None:
            depends_on = [
                self.encoder_sha256, self.encoder.conventions(), split.shards.fingerprint, self.image_size,
                interpolation,
            ]  # fmt: skip
            kept = KeptFeatures.named(self.features, split.shards.split, depends_on, rank, world)
        found = kept.load(len(ids), self.process.device) if kept else None
        if found is None:
            found = extract(
                self.encoder,
                split,
                self.loader_config(interpolation),
                batch=self.batch,
                ids=ids,
                silent=rank > 0,
            )
            if kept is not None:
                kept.keep(found)
        bad = int(all_sum((~found.features.isfinite()).any(1).sum()))
        if bad:
            raise UserError(
                f"the features of {bad} of {len(split.shards)} images of {split.shards.split} are not finite; the "
                f"training of {self.source.path} went astray, or its values are too large for float32"
            )
        return found

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
            **origin(self.source, self.image_size),
            "checkpoint_step": self.source.step,
            "encoder_sha256": self.encoder_sha256,
            "data": self.data,
            "train_manifest": self.train.shards.fingerprint,
            "val_manifest": self.val.shards.fingerprint,
            "processes": self.process.world,
        }

    def classifier(
        self, encoder: Encoder, head: torch.nn.Linear, interpolation: str, result: dict[str, Any]
    ) -> Classifier:
        """What an evaluation leaves behind, with what it reported."""
        return Classifier(
            encoder=encoder,
            architecture=self.source.architecture,
            head=head,
            classes=self.classes,
            image_size=self.image_size,
            center_fraction=center_fraction(self.image_size),
            interpolation=interpolation,
            about={**result, "per_class": None, "confused": None},
        )

    def encoder_note(self) -> str:
        """For a printed line: in what the encoder is not simply a pre-trained one."""
        tuned = self.source.tuned
        return " (untrained encoder)" if self.untrained else f" (encoder of {tuned})" if tuned else ""

    def out(self, name: str) -> Path:
        """Where results go, without their ending: RUN for RUN/checkpoints/step-*/state.pt, else beside the file.

        Raises UserError where rank 0 cannot write there, which is asked before anything is computed. All ranks call it.
        """
        folder = self.given_out or result_folder(self.source)
        on_rank_0(self.process, lambda: refuse_read_only(folder / f"{name}.json"))
        if self.features is not None:
            refuse_read_only(self.features / "features")
        return folder / (f"{name}-untrained" if self.untrained else name)

    def write(self, out: Path, result: dict[str, Any], model: Classifier | None = None) -> None:
        """Write ``out``.json, and before it the model to ``out``.pt, on rank 0.

        Results of the same name that are of another encoder, other data or other settings get a number and stay. All
        ranks call it, and all raise UserError where rank 0 cannot write.
        """
        on_rank_0(self.process, lambda: self._write(out, result, model))

    def _write(self, out: Path, result: dict[str, Any], model: Classifier | None) -> None:
        described, weights = out.with_name(f"{out.name}.json"), out.with_name(f"{out.name}.pt")
        text = json.dumps(result, indent=2) + "\n"
        try:
            with refusals_named(described):
                _set_aside(described, weights, result, (*_IDENTITY, *self.encoder.conventions()))
            if model is not None:
                save_classifier(weights, model)
            write_durably(described, text.encode(), tag=f".{os.getpid()}")
        except UserError:
            print_now(text)  # hours may have gone into it
            raise


def _is_same(described: Path, result: dict[str, Any], identity: tuple[str, ...]) -> bool:
    """Whether a file has a result of the same encoder, data and settings."""
    before = read_object(described)
    return bool(before) and all(before.get(key) == json.loads(json.dumps(result.get(key))) for key in identity)


def _set_aside(described: Path, weights: Path, result: dict[str, Any], identity: tuple[str, ...]) -> None:
    if not described.is_file():
        return
    if _is_same(described, result, identity):
        return
    for other in described.parent.glob(f"{described.stem}.*.json"):
        if other.stem.rpartition(".")[2].isdecimal() and _is_same(other, result, identity):
            other.unlink()  # the new one stands in its place
            other.with_suffix(".pt").unlink(missing_ok=True)
    number = 1
    while any((aside := described.with_name(f"{described.stem}.{number}.json")).with_suffix(ending).exists()
              for ending in (".json", ".pt")):  # fmt: skip
        number += 1
    print(f"{described} was of another encoder, data or setting; it is now {aside.name}")
    if weights.is_file():
        weights.replace(aside.with_suffix(".pt"))
    described.replace(aside)


def origin(source: Pretrained, image_size: int) -> dict[str, Any]:
    """Which encoder something was computed by, and of which view; what it must be read with."""
    return {
        "image_size": image_size,
        "center_fraction": center_fraction(image_size),
        "encoder": source.architecture.encoder.label(),
        "layout": source.layout,
        "input": source.encoder.input_range(),
        **source.encoder.conventions(),
        **({"published": source.name} if source.name else {}),
        "checkpoint": str(source.path),
        "checkpoint_sha256": source.sha256,
    }


def result_folder(source: Pretrained) -> Path:
    """The run folder of one of its checkpoints; runs/NAME for published weights; the folder of any other file."""
    if source.name is not None:
        return Path("runs") / source.name
    path = source.path
    of_a_run = path.name == STATE and path.parent.parent.name == "checkpoints"
    return path.parent.parent.parent if of_a_run else path.parent


def open_evaluation(
    chosen: EncoderChoice, data: DataChoice, *, batch: int, out: Path | None, features: Path | None = None
) -> Evaluation:
    """Join the other ranks, and open encoder and data.

    Raises UserError where checkpoint, processes or data cannot be used.
    """
    process = init_distributed(_PATIENCE)
    source = open_encoder(chosen)
    print_rank_0(process, source.in_words())
    address = data_of(data, source)
    train, val = (_with_labels(address, split, data) for split in ("train", "val"))
    if train.shards.classes != val.shards.classes:
        raise UserError(f"train and val of {address} name different classes; pack them together")
    encoder = source.encoder.requires_grad_(False).place(process.device)
    sha256 = fingerprint(encoder)
    own = (sha256, train.shards.fingerprint, val.shards.fingerprint)
    if on_rank_0(process, lambda: own) != own:
        raise UserError(
            f"rank {process.rank} has another checkpoint or other data than rank 0; give all machines the same"
        )
    return Evaluation(
        process=process,
        source=source,
        encoder=encoder,
        encoder_sha256=sha256,
        train=train,
        val=val,
        image_size=image_size_of(chosen, source),
        batch=batch,
        untrained=chosen.untrained,
        data=address if is_remote(address) else str(Path(address).resolve()),
        features=features,
        given_out=out,
        keep_decoded=data.keep_decoded,
    )


def _with_labels(address: str, split: str, data: DataChoice) -> Split:
    found = open_split(address, split, cache_of(data))
    if not found.shards.classes:
        raise UserError(
            f"{split} of {address} has no labels, which this evaluation needs; give a set that has them with --data"
        )
    return found


def open_encoder(chosen: EncoderChoice) -> Pretrained:
    """Raises CheckpointError where there is no such encoder."""
    return open_pretrained(
        chosen.ckpt,
        untrained=chosen.untrained,
        prefix=chosen.prefix,
        unit_range=chosen.unit_range,
        mean=chosen.mean,
        std=chosen.std,
        stem_padding=chosen.stem_padding,
    )


def data_of(data: DataChoice, source: Pretrained) -> str:
    """The address of the packed set. Raises UserError where nobody says it."""
    address = data.data or source.data
    if not address:
        raise UserError(f"{source.path} does not say what it was trained on; give --data, a folder of packed shards")
    return address


def cache_of(data: DataChoice) -> Cache:
    return Cache.at(data.cache, data.cache_gb)


def image_size_of(chosen: EncoderChoice, source: Pretrained) -> int:
    """Side of the view that the encoder is asked with, in pixels: as chosen, as pre-trained, or as is usual for it."""
    return chosen.image_size or source.view_size


def own_device() -> tuple[torch.device, int]:
    """Where a process on its own computes, and the cores it has."""
    return torch.device("cuda" if on_gpu() else "cpu"), usable_cores()
