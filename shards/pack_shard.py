"""One shard from its list of images: read, prepare, ask the decoder, write. Runs in a worker process."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from simclr_dali.shards.durable import refusals_named, writing
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.image import Prepared, RangeError, UnusableError, allow_pixels, convert, prepare
from simclr_dali.shards.manifest import Shard
from simclr_dali.shards.plan import Options
from simclr_dali.shards.sources.source import Item, read_item
from simclr_dali.shards.tar import Image, key_of, write_shard

RECORD = ".part.npz"
BATCH = 16  # images prepared before the decoder is asked about them


@dataclass(frozen=True)
class ShardTask:
    """A shard to be packed."""

    root: Path
    items: list[Item]
    tar: Path
    number: int
    start: int
    """Place of its first image in the packed split."""
    options: Options


@dataclass
class Changes:
    """What happened to the images of a shard: (name, reason) of each that is not stored as it was."""

    converted: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    resized: int = 0


@dataclass(frozen=True)
class PackedShard:
    """A finished shard: its description, its rows of SAMPLE, and what happened to its images."""

    shard: Shard
    rows: npt.NDArray[Any]
    changes: Changes


def record_of(tar: Path) -> Path:
    """Where what is known of a finished shard lies until the manifest takes it up."""
    return tar.with_name(f"{tar.name}{RECORD}")


def is_done(task: ShardTask) -> bool:
    """Whether the shard is there, whole as its record describes it; a crash of the machine may have kept only one."""
    path = record_of(task.tar)
    return path.is_file() and task.tar.is_file() and task.tar.stat().st_size == read_record(path).shard.bytes


def read_record(path: Path) -> PackedShard:
    """What :func:`pack_shard` wrote."""
    with np.load(path, allow_pickle=False) as record:
        rows = record["rows"]
        shard, changes = json.loads(str(record["rest"]))
    pairs = {name: [(file, reason) for file, reason in changes[name]] for name in ("converted", "left_out")}
    return PackedShard(Shard(**shard), rows, Changes(resized=changes["resized"], **pairs))


def remove_cut(tasks: list[ShardTask]) -> None:
    """Remove what killed processes left half-written of these shards, and of no others: other machines write those."""
    stems = {task.tar.stem for task in tasks}
    for folder in {task.tar.parent for task in tasks}:
        for path in folder.glob("*.tmp"):
            if path.name.partition(".")[0] in stems:
                path.unlink(missing_ok=True)


def pack_shard(task: ShardTask) -> tuple[int, int]:
    """Write the shard and then its record; returns how many images it was given and how many it had to leave out.

    Raises UserError where an image cannot be read, none of them is usable, or the target cannot be written.
    """
    changes = Changes()
    allow_pixels(task.options.max_pixels)
    with refusals_named(task.tar):
        shard, rows = write_shard(task.tar, task.number, _usable(task, changes))
        if not len(rows):
            raise UserError(
                f"{task.tar} would be empty: none of its {len(task.items)} images can be decoded, the first is "
                f"{changes.left_out[0][0]} ({changes.left_out[0][1]}); repair them or choose larger shards"
            )
        with writing(record_of(task.tar), f".{os.getpid()}") as file:
            np.savez(file, rows=rows, rest=np.array(json.dumps([asdict(shard), asdict(changes)])))
    return len(task.items), len(changes.left_out)


def _usable(task: ShardTask, changes: Changes) -> Iterator[Image]:
    """The images to store, in order; what is changed or left out goes into ``changes``."""
    for at in range(0, len(task.items), BATCH):
        items = task.items[at : at + BATCH]
        prepared = [_prepared(task, item, changes) for item in items]
        for place, (item, picture) in enumerate(zip(items, _decodable(task, items, prepared, changes), strict=True)):
            if picture is not None:
                if picture.reason is not None:
                    changes.converted.append((item.name, picture.reason))
                changes.resized += picture.resized
                key = key_of(task.start + at + place, item.name)
                yield Image(key, picture.encoded, picture.width, picture.height, item.label)


def _prepared(task: ShardTask, item: Item, changes: Changes) -> Prepared | None:
    try:
        encoded = read_item(task.root, item)
        return prepare(encoded, task.options)
    except RangeError as error:
        raise UserError(f"{task.root / item.path}{item.inside()}: {error}") from error
    except UnusableError as error:
        changes.left_out.append((item.name, str(error)))
        return None


def _decodable(
    task: ShardTask, items: list[Item], prepared: list[Prepared | None], changes: Changes
) -> Iterator[Prepared | None]:
    """What training's decoder takes; what it refuses is encoded anew by Pillow, and left out if that fails too."""
    accepted = _accepts(task, [picture for picture in prepared if picture is not None])
    for item, picture in zip(items, prepared, strict=True):
        if picture is None or next(accepted):
            yield picture
            continue
        try:
            again = convert(picture.encoded, task.options, reason="DALI cannot decode it")
            if not next(_accepts(task, [again])):
                raise UnusableError("DALI cannot decode it, not even encoded anew")
            yield again
        except UnusableError as error:
            changes.left_out.append((item.name, str(error)))
            yield None


def _accepts(task: ShardTask, pictures: list[Prepared]) -> Iterator[bool]:
    if task.options.decoder == "none":
        return iter([True] * len(pictures))
    from simclr_dali.shards.decode import decoder  # here, because importing DALI takes longer than packing a small set

    images = [picture.encoded for picture in pictures]
    return iter(
        decoder(task.options.decoder).accepts(images, [(picture.width, picture.height) for picture in pictures])
    )
