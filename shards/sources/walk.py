"""One rule for every command that is given a folder: what is a picture, what is passed over, which links are followed.

Links to folders are followed, but not into a folder that is being walked already. Files that systems and file managers
leave everywhere are rubbish. Nothing is passed over without being counted (:class:`LeftOut`).
"""

import io
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image

from simclr_dali.shards.errors import UserError


def endings(text: str) -> frozenset[str]:
    """Endings of file names from a text that separates them by spaces."""
    return frozenset(text.split())


# A file with one of these endings is a picture. Files with endings of none of these lists are looked into.
PICTURE_ENDINGS = endings(
    "jpg jpeg jpe jfif jif png webp bmp dib ppm pgm pbm pnm gif tif tiff jp2 j2k jpf jpx avif avifs"
)
# Of pictures that no decoder here reads: a file with one of them is a picture that is lost, not a stray file.
UNREADABLE_ENDINGS = endings(
    "heic heif hif dng cr2 cr3 crw nef nrw arw orf rw2 raf pef srw raw svg exr hdr dcm nii npy jxl jxr psb"
)
ARCHIVE_ENDINGS = endings("tar tgz tbz2 txz zip gz bz2 xz zst 7z rar")
# Certainly no pictures, so that millions of captions need not be opened to find that out.
_OTHER_ENDINGS = endings("txt json jsonl xml csv tsv md html yaml yml idx parquet cls mat py log mp4 mov")
# Formats that Pillow recognises by their first bytes; some others it takes nearly any file for.
_SNIFFED_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "PSD", "ICO")
_SNIFFED_BYTES = 65536

_RUBBISH = re.compile(
    r"\._.*|\.ds_store|\.localized|\.apdisk|icon\r|thumbs\.db|ehthumbs(_vista)?\.db|desktop\.ini|\.?picasa\.ini"
    r"|\.directory|@eadir|\.ipynb_checkpoints|__macosx|\.trashes|\.trash-\d+|#recycle|\$recycle\.bin|\.spotlight-v100"
    r"|\.fseventsd|system volume information|lost\+found|\.thumbnails",
    re.IGNORECASE,
)
RUBBISH = "rubbish of file managers"
HIDDEN = "hidden"
NOT_REGULAR = "no regular file"
DEAD_LINK = "link to nothing"
CIRCLE = "link to a folder that it lies in"
_NAMES = 20  # of what is left out and no picture, kept of each reason


@dataclass
class LeftOut:
    """What lies in a source and is not packed: how many by reason, and names.

    Of pictures that are lost every name is kept; of the rest the first twenty of each reason.
    """

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str, name: str, *, lost: bool = False) -> None:
        """Count one; lost: it was meant to be a sample."""
        self.counts[reason] += 1
        self.lost[reason] += lost
        names = self.names.setdefault(reason, [])
        if lost or len(names) < _NAMES:
            names.append(name)

    def as_report(self) -> list[dict[str, Any]]:
        """For report.json: per reason the count, how many of them are lost samples, and names."""
        return [
            {"reason": reason, "count": count, "lost": self.lost[reason], "names": self.names[reason]}
            for reason, count in sorted(self.counts.items())
        ]

    def __str__(self) -> str:
        """``3 no label, 2 rubbish of file managers``; the commonest reasons first."""
        most = self.counts.most_common(6)
        rest = sum(self.counts.values()) - sum(count for _, count in most)
        return ", ".join([f"{count:,} {reason}" for reason, count in most] + ([f"{rest:,} others"] if rest else []))


class File(NamedTuple):
    """A regular file: its path relative to what was walked, size in bytes, modification time in ns."""

    path: str
    size: int
    modified: int


def ending_of(name: str) -> str:
    """What stands behind the last dot, in lower case; empty where there is none."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name.rpartition("/")[2] else ""


def is_rubbish(name: str) -> bool:
    """Whether a file or folder of this name, without its path, is what systems and file managers leave behind."""
    return _RUBBISH.fullmatch(name) is not None


def walk(
    root: Path,
    left_out: LeftOut,
    *,
    below: str = "",
    watched: dict[str, int] | None = None,
    without: frozenset[Path] = frozenset(),
) -> Iterator[File]:
    """Every file in and under ``root/below``, sorted by name in each folder; what is no file goes into ``left_out``.

    watched: takes the time of each folder, in ns, read before the folder is listed, so that what is added meanwhile
    makes it newer. without: folders that are not entered; the folders that hold them are not watched, since they may
    be written. Raises UserError where a folder cannot be read.
    """
    yield from _walk(root, left_out, below, watched, without, ())


def _walk(
    root: Path,
    left_out: LeftOut,
    below: str,
    watched: dict[str, int] | None,
    without: frozenset[Path],
    above: tuple[tuple[int, int], ...],
) -> Iterator[File]:
    folder = root / below
    try:
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read {folder} ({error.strerror}); repair or remove it") from error
    if watched is not None and not any(path.parent == folder for path in without):
        watched[below or "."] = status.st_mtime_ns
    here = (status.st_dev, status.st_ino)
    for entry in entries:
        path = f"{below}/{entry.name}" if below else entry.name
        passed_over = RUBBISH if is_rubbish(entry.name) else HIDDEN if entry.name.startswith(".") else None
        try:
            if entry.is_dir():
                inode = entry.stat()
                if passed_over:
                    count_files(root / path, passed_over, path, left_out)
                elif (inode.st_dev, inode.st_ino) in (*above, here):
                    left_out.add(CIRCLE, path)
                elif root / path not in without:
                    yield from _walk(root, left_out, path, watched, without, (*above, here))
                continue
            if passed_over:
                left_out.add(passed_over, path)
                continue
            file = entry.stat()
        except (FileNotFoundError, NotADirectoryError):
            left_out.add(DEAD_LINK, path, lost=ending_of(path) in PICTURE_ENDINGS | UNREADABLE_ENDINGS)
            continue
        except OSError as error:
            if entry.is_symlink():  # one that leads to itself
                left_out.add(DEAD_LINK, path, lost=ending_of(path) in PICTURE_ENDINGS | UNREADABLE_ENDINGS)
                continue
            raise UserError(f"cannot read {root / path} ({error.strerror}); repair or remove it") from error
        if stat.S_ISREG(file.st_mode):
            yield File(path, file.st_size, file.st_mtime_ns)
        else:
            left_out.add(NOT_REGULAR, path)


def count_files(folder: Path, reason: str, name: str, left_out: LeftOut) -> None:
    """Count the files in and under a folder that is passed over, without following links."""
    for inside, _, files in os.walk(folder):
        for file in files:
            left_out.add(reason, os.path.normpath(f"{name}/{os.path.relpath(inside, folder)}/{file}"))


def is_picture(name: str, start: bytes | None, left_out: LeftOut) -> bool:
    """Whether a file is a picture, by its ending or else by its first bytes; where it is not, it is counted.

    start: the first bytes, or None where they are not at hand and :func:`needs_start` did not ask for them.
    """
    ending = ending_of(name)
    if ending in PICTURE_ENDINGS or (start is not None and _is_recognised(start)):
        return True
    if ending in UNREADABLE_ENDINGS:
        left_out.add(f"no decoder for .{ending}", name, lost=True)
    elif ending in ARCHIVE_ENDINGS:
        left_out.add(f"archive .{ending} beside pictures", name, lost=True)
    else:
        left_out.add(f"no picture (.{ending})" if ending else "no picture", name)
    return False


def needs_start(name: str) -> bool:
    """Whether the ending leaves open if a file is a picture."""
    return ending_of(name) not in PICTURE_ENDINGS | UNREADABLE_ENDINGS | ARCHIVE_ENDINGS | _OTHER_ENDINGS


def start_of(path: Path, offset: int = 0, length: int = _SNIFFED_BYTES) -> bytes:
    """The first bytes of what lies in ``path`` at ``offset``; nothing where they cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(min(length, _SNIFFED_BYTES))
    except OSError:
        return b""


def _is_recognised(start: bytes) -> bool:
    try:
        with PIL.Image.open(io.BytesIO(start), formats=_SNIFFED_FORMATS):
            return True
    except Exception:  # Pillow raises a dozen kinds for what is no picture
        return False


def pictures_below(
    root: Path,
    left_out: LeftOut,
    *,
    below: str = "",
    watched: dict[str, int] | None = None,
    without: frozenset[Path] = frozenset(),
) -> Iterator[File]:
    """The pictures in and under ``root/below``; everything else goes into ``left_out``. See :func:`walk`."""
    for file in walk(root, left_out, below=below, watched=watched, without=without):
        start = start_of(root / file.path) if needs_start(file.path) else None
        if is_picture(file.path, start, left_out):
            yield file
