"""Writing one WebDataset tar and its DALI index, byte for byte reproducible."""

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.durable import write_durably
from shards.manifest import SAMPLE, Shard

BLOCK = 512  # bytes; every tar member starts on a block
END_OF_ARCHIVE = b"\0" * (2 * BLOCK)


@dataclass(frozen=True)
class Image:
    """One encoded image on its way into a tar. ``key`` is ASCII without dots, slashes or spaces."""

    key: str
    encoded: bytes
    width: int
    height: int
    label: int


def write_shard(path: Path, shard_number: int, images: Iterable[Image]) -> tuple[Shard, npt.NDArray[Any]]:
    """Write ``path`` and ``path.with_suffix('.idx')``; return the shard's description and its rows of SAMPLE.

    Both files appear under their names only when complete and on disk (temporary name, fsync, rename), so a
    kill at any instant leaves no half-written shard. Member headers carry no time, owner or host, so the same
    images give the same bytes. The index is DALI's v1.2: per sample, extension, offset, size and member name of
    each component.
    """
    rows: list[tuple[int, ...]] = []
    index: list[str] = []
    digest = hashlib.sha256()
    position = 0
    temporary = path.with_suffix(".tar.tmp")
    with temporary.open("wb") as tar:

        def put(data: bytes) -> None:
            nonlocal position
            tar.write(data)
            digest.update(data)
            position += len(data)

        def put_member(name: str, data: bytes) -> int:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            put(header.tobuf(tarfile.USTAR_FORMAT, "ascii"))
            start = position
            put(data)
            put(b"\0" * (-len(data) % BLOCK))
            return start

        for image in images:
            label = str(image.label).encode("ascii")
            picture_at = put_member(f"{image.key}.jpg", image.encoded)
            label_at = put_member(f"{image.key}.cls", label)
            index.append(
                f"jpg {picture_at} {len(image.encoded)} {image.key}.jpg cls {label_at} {len(label)} {image.key}.cls\n"
            )
            rows.append(
                (
                    shard_number,
                    picture_at,
                    len(image.encoded),
                    image.width,
                    image.height,
                    image.label,
                    zlib.crc32(image.encoded),
                )
            )
        put(END_OF_ARCHIVE)
        tar.flush()
        os.fsync(tar.fileno())
    write_durably(path.with_suffix(".idx"), f"v1.2 {len(rows)}\n{''.join(index)}".encode("ascii"))
    temporary.replace(path)
    return Shard(path.name, len(rows), position, digest.hexdigest()), np.array(rows, SAMPLE)
