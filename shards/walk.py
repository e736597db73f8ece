"""One rule for every command that is given a folder: what is a picture, what is passed over, which links are followed.

Links to folders are followed, but not into a folder that is being walked already. Files that systems and file managers
leave everywhere are rubbish. Nothing is passed over without being counted (left_out.LeftOut).
"""

import io
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image

from simclr_dali.shards.durable import unreadable_named
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.left_out import LeftOut


def endings(text: str) -> frozenset[str]:
    """Endings of file names from a text that separates them by spaces."""
    return frozenset(text.split())


# A file with one of these endings is a picture. Files with endings of none of these lists are looked into.
PICTURE_ENDINGS = endings(
    "jpg jpeg jpe jfif jif png webp bmp dib ppm pgm pbm pnm gif tif tiff jp2 j2k jpf jpx avif avifs tga qoi psd pcx sgi"
)
# Of pictures that no decoder here reads: a file with one of them is a picture that is lost, not a stray file.
UNREADABLE_ENDINGS = endings(
    "heic heif hif dng cr2 cr3 crw nef nrw arw orf rw2 raf pef srw raw svg exr hdr dcm nii jxl jxr psb"
)
ARCHIVE_ENDINGS = endings("tar tgz tbz2 txz zip gz bz2 xz zst 7z rar")
# Certainly no pictures, so that millions of captions need not be opened to find that out.
_OTHER_ENDINGS = endings("txt json jsonl xml csv tsv md html yaml yml idx parquet cls mat py log mp4 mov")
# Formats that Pillow recognises by their first bytes; some others it takes nearly any file for.
_SNIFFED_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "PSD", "ICO")
_LARGEST_UNNAMED = 1 << 28  # bytes

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


class File(NamedTuple):
    """A regular file: its path relative to what was walked, size in bytes, modification time in ns."""

    path: str
    size: int
    modified: int


def ending_of(name: str) -> str:
    """What stands behind the last dot, in lower case; empty where there is none."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name.rpartition("/")[2] else ""


def passed_over(name: str) -> str | None:
    """Why a file or folder of this name, without its path, is passed over; None where it is not."""
    if _RUBBISH.fullmatch(name):
        return RUBBISH
    return HIDDEN if name.startswith(".") and name not in (".", "..") else None


def path_passed_over(path: str) -> str | None:
    """:func:`passed_over` of a path with slashes, by the first of its parts that is."""
    return next((reason for part in path.split("/") if (reason := passed_over(part))), None)


def add_dead_link(name: str, left_out: LeftOut) -> None:
    """Count a link to nothing; it is a lost sample where it is called like a picture."""
    if is_called_like_a_picture(name):
        left_out.add(DEAD_LINK, name, lost=True)
    else:
        left_out.add(f"{DEAD_LINK}, no picture", name)


def walk(
    root: Path,
    left_out: LeftOut,
    *,
    below: str = "",
    watched: dict[str, int] | None = None,
    exclude: frozenset[Path] = frozenset(),
    above: tuple[tuple[int, int], ...] = (),
) -> Iterator[File]:
    """Every file in and under ``root/below``, sorted by name in each folder; what is no file goes into ``left_out``.

    watched: takes the time of each folder, in ns, read before the folder is listed, so that what is added meanwhile
    makes it newer. exclude: folders that are not entered; the folders that hold them are not watched, since they may
    be written. above: device and inode of the folders that are being walked, for the walk's own use. Raises UserError
    where a folder cannot be read.
    """
    folder = root / below
    with unreadable_named(folder):
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    if watched is not None and not any(folder in path.parents for path in exclude):
        watched[below or "."] = status.st_mtime_ns
    here = (status.st_dev, status.st_ino)
    for entry in entries:
        path = f"{below}/{entry.name}" if below else entry.name
        reason = passed_over(entry.name)
        try:
            if entry.is_dir():
                inode = entry.stat()
                if reason:
                    _count_files(root / path, reason, path, left_out)
                elif (inode.st_dev, inode.st_ino) in (*above, here):
                    left_out.add(CIRCLE, path)
                elif root / path not in exclude:
                    inside = (*above, here)
                    yield from walk(root, left_out, below=path, watched=watched, exclude=exclude, above=inside)
                continue
            if reason:
                left_out.add(reason, path)
                continue
            file = entry.stat()
        except (FileNotFoundError, NotADirectoryError):
            add_dead_link(path, left_out)
            continue
        except OSError as error:
            if entry.is_symlink():  # one that leads to itself
                add_dead_link(path, left_out)
                continue
            raise UserError(f"cannot read {root / path} ({error.strerror}); repair or remove it") from error
        if stat.S_ISREG(file.st_mode):
            yield File(path, file.st_size, file.st_mtime_ns)
        else:
            left_out.add(NOT_REGULAR, path)


def _count_files(folder: Path, reason: str, name: str, left_out: LeftOut) -> None:
    """Count the files in and under a folder that is passed over, without following links."""
    for inside, _, files in os.walk(folder):
        for file in files:
            left_out.add(reason, os.path.normpath(f"{name}/{os.path.relpath(inside, folder)}/{file}"))


def is_picture(path: Path, name: str, left_out: LeftOut, offset: int = 0, length: int | None = None) -> bool:
    """Whether a file, or a member of an archive, is a picture, by its ending or else by its first bytes.

    What is none is counted. path: of the file on disk, of which a member takes ``length`` bytes from ``offset`` on.
    """
    ending = ending_of(name)
    if ending in PICTURE_ENDINGS:
        return True
    if ending in UNREADABLE_ENDINGS:
        left_out.add(f"no decoder for .{ending}", name, lost=True)
    elif ending in ARCHIVE_ENDINGS:
        left_out.add(f"archive .{ending} beside pictures", name, lost=True)
    elif ending not in _OTHER_ENDINGS and _is_recognised(path, offset, length):
        return True
    else:
        left_out.add(f"no picture (.{ending})" if ending else "no picture", name)
    return False


def is_called_like_a_picture(name: str) -> bool:
    """Whether the ending says so, for what cannot be looked into."""
    return ending_of(name) in PICTURE_ENDINGS | UNREADABLE_ENDINGS


def _is_recognised(path: Path, offset: int, length: int | None) -> bool:
    try:
        with path.open("rb") as file:
            start: Any = file
            if length is not None:  # a member of an archive; few have no ending, so they are read whole
                file.seek(offset)
                start = io.BytesIO(file.read(min(length, _LARGEST_UNNAMED)))
            with PIL.Image.open(start, formats=_SNIFFED_FORMATS):
                return True
    except PIL.Image.DecompressionBombError:
        return True  # the packer compares its size with --max-pixels
    except Exception:  # Pillow raises a dozen kinds for what is no picture
        return False


def pictures_below(
    root: Path, left_out: LeftOut, watched: dict[str, int] | None = None, exclude: frozenset[Path] = frozenset()
) -> Iterator[File]:
    """The pictures in and under ``root``; everything else goes into ``left_out``. See :func:`walk`."""
    for file in walk(root, left_out, watched=watched, exclude=exclude):
        if is_picture(root / file.path, file.path, left_out):
            yield file
