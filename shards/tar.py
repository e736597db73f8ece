"""Writing one WebDataset tar and its DALI index, byte for byte reproducible; listing the members of any tar."""

import hashlib
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from simclr_dali.shards.durable import write_durably
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import BLOCK, SAMPLE, Shard

KEY_LENGTH = 60  # of the stem: with position, ending and room to spare inside the 100 bytes of a USTAR name
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_-]")
# The parts of a header that are always the same: mode, user, group; time; kind (a file), magic, names, padding.
_OWNER = b"0000644\0" + 2 * b"0000000\0"
_TIME = b"\0" + b"00000000000\0"
_KIND = b"0".ljust(101, b"\0") + b"ustar\00000" + 247 * b"\0"
_FIXED_SUM = sum(_OWNER + _TIME + _KIND) + 8 * ord(" ")  # the checksum itself counts as spaces
END_OF_ARCHIVE = b"\0" * (2 * BLOCK)


@dataclass(frozen=True)
class Image:
    """One encoded image on its way into a tar. ``key`` is ASCII without dots, slashes or spaces."""

    key: str
    encoded: bytes
    width: int
    height: int
    label: int


def key_of(position: int, name: str) -> str:
    """The key of the picture at ``position`` of a split: ASCII without dots, slashes or spaces, from ``name``."""
    base = name.rpartition("/")[2]
    stem = base.rpartition(".")[0] or base
    return f"{position:08d}_{_NOT_IN_KEYS.sub('_', stem)[:KEY_LENGTH]}"


def header(name: str, size: int) -> bytes:
    """The USTAR header (POSIX.1-1988) of a file of ``size`` bytes, ``name`` ASCII of at most 100 characters.

    It is what tarfile makes of ``TarInfo(name)`` (mode 0644, no time, no owner), in a tenth of its time: most of what
    a small image costs beside decoding would be spent there.
    """
    encoded, octal = name.encode("ascii"), b"%011o" % size
    checksum = b"%06o\0 " % (_FIXED_SUM + sum(encoded) + sum(octal))
    return encoded.ljust(100, b"\0") + _OWNER + octal + _TIME + checksum + _KIND


class Around(NamedTuple):
    """What a shard holds of a sample beside the bytes of its image, in order; the image follows its header."""

    header: bytes
    padding: bytes
    label_header: bytes
    label: bytes


def around_image(key: str, length: int, label: int) -> Around:
    """For an image of ``length`` bytes."""
    text = str(label).encode("ascii")
    padding = b"\0" * (-length % BLOCK)
    return Around(header(f"{key}.jpg", length), padding, header(f"{key}.cls", len(text)), text.ljust(BLOCK, b"\0"))


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

        for image in images:
            around = around_image(image.key, len(image.encoded), image.label)
            image_at = position + BLOCK
            put(around.header)
            put(image.encoded)
            put(around.padding + around.label_header)
            index.append(
                f"jpg {image_at} {len(image.encoded)} {image.key}.jpg cls {position} {len(str(image.label))} "
                f"{image.key}.cls\n"
            )
            put(around.label)
            rows.append(
                (
                    shard_number,
                    image_at,
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


def list_members(path: Path, inside: tuple[int, int] | None = None) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset in ``path``, length) of each file in a tar, or in the tar that lies ``inside`` one.

    ``inside`` is the offset and length of the inner tar. Raises UserError where it is no tar, or cut.
    """
    with path.open("rb") as file:
        begin, length = inside or (0, os.fstat(file.fileno()).st_size)
        end = begin + length
        file.seek(begin)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    if member.offset_data + member.size > end:
                        raise tarfile.ReadError(f"member {member.name!r} ends behind the archive")
                    if member.isreg():
                        yield member.name, member.offset_data, member.size
                # tarfile takes a cut between two members for the end; a whole tar ends with blocks of zeros.
                file.seek(tar.offset)
                if file.read(min(BLOCK, end - tar.offset)) != END_OF_ARCHIVE[:BLOCK]:
                    raise tarfile.ReadError("it has no end")
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{path} is no tar, or cut ({error}); fetch it again (and unpack a .gz first)") from error
