"""Writing one WebDataset tar and its DALI index, byte for byte reproducible; listing the members of any tar."""

import hashlib
import os
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from simclr_dali.shards.durable import unreadable_named, write_durably, writing
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.image import ending_of_image
from simclr_dali.shards.left_out import LeftOut
from simclr_dali.shards.manifest import BLOCK, SAMPLE, Shard
from simclr_dali.shards.walk import NOT_REGULAR, add_dead_link, path_passed_over

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


def around_image(name: str, length: int, label: int) -> Around:
    """For an image of ``length`` bytes that lies in the tar as ``name``, key and ending."""
    text = str(label).encode("ascii")
    padding = b"\0" * (-length % BLOCK)
    return Around(
        header(name, length), padding, header(f"{name.rpartition('.')[0]}.cls", len(text)), text.ljust(BLOCK, b"\0")
    )


def write_shard(path: Path, shard_number: int, images: Iterable[Image]) -> tuple[Shard, npt.NDArray[Any]]:
    """Write ``path`` and ``path.with_suffix('.idx')``; return the shard's description and its rows of SAMPLE.

    Both files appear under their names only when complete and on disk (temporary name, fsync, rename), so a
    kill at any instant leaves no half-written shard. The temporary names are those of this process: a worker whose
    parent was killed may still be writing when the next pack comes to the same shard. Member headers carry no time,
    owner or host, so the same images give the same bytes. The index is DALI's v1.2: per sample, extension, offset,
    size and member name of each component.
    """
    rows: list[tuple[int, ...]] = []
    index: list[str] = []
    digest = hashlib.sha256()
    position = 0
    tag = f".{os.getpid()}"
    with writing(path, tag) as tar:

        def put(data: bytes) -> None:
            nonlocal position
            tar.write(data)
            digest.update(data)
            position += len(data)

        for image in images:
            ending = ending_of_image(image.encoded)
            around = around_image(f"{image.key}.{ending}", len(image.encoded), image.label)
            image_at = position + BLOCK
            put(around.header)
            put(image.encoded)
            put(around.padding + around.label_header)
            index.append(
                f"{ending} {image_at} {len(image.encoded)} {image.key}.{ending} cls {position} "
                f"{len(str(image.label))} {image.key}.cls\n"
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
        index_bytes = f"v1.2 {len(rows)}\n{''.join(index)}".encode("ascii")
        write_durably(path.with_suffix(".idx"), index_bytes, tag)
    return Shard(path.name, len(rows), position, digest.hexdigest()), np.array(rows, SAMPLE)


def list_members(
    path: Path, left_out: LeftOut, inside: tuple[int, int] | None = None
) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset in ``path``, length) of each file in a tar, or in the tar that lies ``inside`` one.

    inside: offset and length of the inner tar. Links are given as the files they lead to; archives that were joined
    with ``cat`` are read one behind the other. left_out: takes rubbish, hidden members and what is no file. Raises
    UserError where it cannot be read, is no tar, is cut, or holds something else behind its end.
    """
    with unreadable_named(path):
        opened = path.open("rb")
    with opened as file:
        begin, length = inside or (0, os.fstat(file.fileno()).st_size)
        end = begin + length
        at: int | None = begin
        try:
            while at is not None:
                file.seek(at)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    yield from _files_of_archive(tar, end, left_out)
                    at = _next_archive(file, tar.offset, end)
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{path} is no tar, or cut ({error}); fetch it again (and unpack a .gz first)") from error


def _files_of_archive(tar: tarfile.TarFile, end: int, left_out: LeftOut) -> Iterator[tuple[str, int, int]]:
    files: dict[str, tuple[int, int]] = {}
    links: list[tuple[str, str]] = []
    folders: set[str] = set()
    while member := tar.next():
        if member.isreg() and not member.issparse() and member.offset_data + member.size > end:
            raise tarfile.ReadError(f"member {member.name!r} ends behind the archive")
        name = posixpath.normpath(member.name)
        folders.update(str(folder) for folder in PurePosixPath(name).parents)
        if member.isdir():
            folders.add(name)
            continue
        if reason := path_passed_over(member.name):
            left_out.add(reason, member.name)
        elif member.issparse():
            left_out.add("sparse member", member.name, lost=True)
        elif member.isreg():
            files[name] = member.offset_data, member.size
            yield member.name, member.offset_data, member.size
        elif member.islnk() or member.issym():
            folder = posixpath.dirname(member.name) if member.issym() else ""
            links.append((member.name, posixpath.normpath(posixpath.join(folder, member.linkname))))
        else:
            left_out.add(NOT_REGULAR, member.name)
    target_of = {posixpath.normpath(name): target for name, target in links}
    for name, target in links:
        seen = {name}
        while target in target_of and target not in seen:  # a link to a link; they may form a ring
            seen.add(target)
            target = target_of[target]
        if target in files:
            yield name, *files[target]
        elif target in folders:
            left_out.add("link to a folder inside of a tar", name)
        else:
            add_dead_link(name, left_out)


def _next_archive(file: BinaryIO, at: int, end: int) -> int | None:
    """Where another archive begins behind the zeros that end one at ``at``; None where nothing follows."""
    file.seek(at)
    # tarfile takes a cut between two members for the end; a whole tar ends with blocks of zeros.
    if file.read(min(BLOCK, end - at)) != END_OF_ARCHIVE[:BLOCK]:
        raise tarfile.ReadError("it has no end")
    while (at := at + BLOCK) < end:
        block = file.read(min(BLOCK, end - at))
        if block.strip(b"\0"):
            return at
    return None
