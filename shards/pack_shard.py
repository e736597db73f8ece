"""One shard from its list of pictures: read, prepare, ask the decoder, write. Runs in a worker process."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from simclr_dali.shards.durable import refusals_named
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.image import Prepared, UnusableError, convert, prepare
from simclr_dali.shards.manifest import Shard
from simclr_dali.shards.sources.source import Item, read_item
from simclr_dali.shards.tar import Image, key_of, write_shard

BATCH = 16  # pictures prepared before the decoder is asked about them


@dataclass(frozen=True)
class Piece:
    """The pictures of one shard. ``start`` is the place of the first in the packed split."""

    root: Path
    items: list[Item]
    tar: Path
    number: int
    start: int
    resize: int | None
    quality: int
    decoder: str  # "cpu", "gpu" or "none"


@dataclass
class Notes:
    """What happened to the pictures of a shard: (name, reason) of each that is not stored as it was."""

    converted: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    resized: int = 0


@dataclass(frozen=True)
class Part:
    """A finished shard: its description, its rows of SAMPLE, and what happened to its pictures."""

    shard: Shard
    rows: npt.NDArray[Any]
    notes: Notes


def part_path(tar: Path) -> Path:
    """Where a finished shard's rows and notes lie until the manifest takes them up."""
    return tar.with_name(f"{tar.name}.part.npz")


def is_done(piece: Piece) -> bool:
    """Whether the shard is there, whole as its part describes it; a crash of the machine may have kept only one."""
    path = part_path(piece.tar)
    return path.is_file() and piece.tar.is_file() and piece.tar.stat().st_size == read_part(path).shard.bytes


def read_part(path: Path) -> Part:
    with np.load(path, allow_pickle=False) as part:
        rows = part["rows"]
        shard, notes = json.loads(str(part["rest"]))
    pairs = {name: [(file, reason) for file, reason in notes[name]] for name in ("converted", "left_out")}
    return Part(Shard(**shard), rows, Notes(resized=notes["resized"], **pairs))


def write_piece(piece: Piece) -> tuple[int, int]:
    """Write the shard and then its part; returns how many pictures it was given and how many it had to leave out.

    Raises UserError where a picture cannot be read, none of them is usable, or the target cannot be written.
    """
    notes = Notes()
    with refusals_named(piece.tar):
        shard, rows = write_shard(piece.tar, piece.number, _usable(piece, notes))
        if not len(rows):
            raise UserError(
                f"{piece.tar} would be empty: none of its {len(piece.items)} images can be decoded, the first is "
                f"{notes.left_out[0][0]} ({notes.left_out[0][1]}); repair them or choose larger shards"
            )
        part = part_path(piece.tar)
        temporary = part.with_name(f"{part.name}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, rows=rows, rest=np.array(json.dumps([asdict(shard), asdict(notes)])))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(part)
    return len(piece.items), len(notes.left_out)


def _usable(piece: Piece, notes: Notes) -> Iterator[Image]:
    """The pictures to store, in order; what is changed or left out goes into ``notes``."""
    for at in range(0, len(piece.items), BATCH):
        items = piece.items[at : at + BATCH]
        prepared = [_prepared(piece, item, notes) for item in items]
        for place, (item, picture) in enumerate(zip(items, _decodable(piece, items, prepared, notes), strict=True)):
            if picture is not None:
                if picture.reason is not None:
                    notes.converted.append((item.name, picture.reason))
                notes.resized += picture.resized
                key = key_of(piece.start + at + place, item.name)
                yield Image(key, picture.encoded, picture.width, picture.height, item.label)


def _prepared(piece: Piece, item: Item, notes: Notes) -> Prepared | None:
    encoded = read_item(piece.root, item)
    try:
        return prepare(encoded, resize=piece.resize, quality=piece.quality)
    except UnusableError as error:
        notes.left_out.append((item.name, str(error)))
        return None


def _decodable(
    piece: Piece, items: list[Item], prepared: list[Prepared | None], notes: Notes
) -> Iterator[Prepared | None]:
    """What training's decoder takes; what it refuses is encoded anew by Pillow, and left out if that fails too."""
    accepted = _accepts(piece, [picture for picture in prepared if picture is not None])
    for item, picture in zip(items, prepared, strict=True):
        if picture is None or next(accepted):
            yield picture
            continue
        try:
            again = convert(picture.encoded, quality=piece.quality, reason="DALI cannot decode it")
            if not next(_accepts(piece, [again])):
                raise UnusableError("DALI cannot decode it, not even encoded anew")
            yield again
        except UnusableError as error:
            notes.left_out.append((item.name, str(error)))
            yield None


def _accepts(piece: Piece, pictures: list[Prepared]) -> Iterator[bool]:
    if piece.decoder == "none":
        return iter([True] * len(pictures))
    from simclr_dali.shards.decode import decoder  # here, because importing DALI takes longer than packing a small set

    images = [picture.encoded for picture in pictures]
    return iter(decoder(piece.decoder).accepts(images, [(picture.width, picture.height) for picture in pictures]))
