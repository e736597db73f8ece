"""Reading an ImageFolder: ``train/<class>/*`` and, where it exists, ``val/<class>/*``."""

import hashlib
import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from tqdm import tqdm

from shards.errors import UserError
from shards.tar import Image

# A picture is what has one of these endings; other files in a class folder are named, not silently left out.
PICTURE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm"})
JPEG_MODES = frozenset({"RGB", "L"})
JPEG_QUALITY_OF_CONVERTED = 95
KEY_LENGTH = 60  # with index, extension and room to spare inside the 100 bytes of a USTAR name


@dataclass(frozen=True)
class Source:
    """One split of an image folder. ``files`` are (path relative to the split's folder, label) in sorted order."""

    folder: Path
    split: str
    classes: list[str]
    files: list[tuple[str, int]]

    def fingerprint(self, *, times: bool) -> str:
        """Changes when a file is added, removed, renamed or resized, and with ``times`` also when it is rewritten."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for name, label in self.files:
            try:
                status = (self.folder / name).stat()
            except OSError as error:
                raise UserError(f"cannot read {self.folder / name} ({error.strerror}); repair or remove it") from error
            time = status.st_mtime_ns if times else 0
            digest.update(f"{name}\0{label}\0{status.st_size}\0{time}\n".encode())
        return digest.hexdigest()


def scan(root: Path) -> list[Source]:
    """Find the splits of ``root``; classes are the sorted folder names of ``train``, as torchvision's.

    Raises UserError for a folder that is missing, a split without classes, a class without pictures, a file
    that is no picture, or a class that ``train`` does not have.
    """
    if not root.is_dir():
        raise UserError(f"image folder {root} does not exist; give a folder with train/<class>/* and val/<class>/*")
    if not (root / "train").is_dir():
        raise UserError(f"{root} has no folder 'train'; expected {root}/train/<class>/* and {root}/val/<class>/*")
    classes = _class_names(root / "train")
    sources = []
    for split in ("train", "val"):
        folder = root / split
        if not folder.is_dir():
            continue
        unknown = sorted(set(_class_names(folder)) - set(classes))
        if unknown:
            raise UserError(
                f"{folder} has the class folder {unknown[0]!r}, which {root / 'train'} does not have; add or remove it"
            )
        files = [
            (f"{name}/{file}", label)
            for label, name in enumerate(tqdm(classes, f"scan {split}", disable=None, leave=False))
            if (folder / name).is_dir()
            for file in _picture_names(folder / name)
        ]
        sources.append(Source(folder, split, classes, files))
    return sources


def _class_names(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{folder} has no class folders; expected {folder}/<class>/*.jpg")
    return names


def _picture_names(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    for name in names:
        if Path(name).suffix.lower() not in PICTURE_ENDINGS:
            raise UserError(
                f"{folder / name} is not a picture ({', '.join(sorted(PICTURE_ENDINGS))}); move it out of the class "
                f"folder"
            )
    if not names:
        raise UserError(f"class folder {folder} is empty; add pictures or remove it")
    return names


def read_image(source: Source, number: int, position: int) -> Image:
    """Read, decode and check file ``number`` of ``source``; ``position`` is its place in the packed split.

    A JPEG in RGB or gray keeps its bytes. Everything else (PNG, CMYK, a palette, ...) becomes an RGB JPEG, since
    the decoders of a training node should meet one format only. Raises UserError where it cannot be decoded.
    """
    name, label = source.files[number]
    path = source.folder / name
    try:
        encoded = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(io.BytesIO(encoded)) as picture:
                picture.load()
                width, height = picture.size
                if picture.format != "JPEG" or picture.mode not in JPEG_MODES:
                    encoded = _as_rgb_jpeg(picture)
    except Exception as error:  # Pillow raises a dozen kinds; whichever it is, this file is no usable picture
        raise UserError(f"cannot decode {path} ({error}); repair or remove it") from error
    key = re.sub(r"[^A-Za-z0-9_-]", "_", Path(name).stem)[:KEY_LENGTH]
    return Image(f"{position:08d}_{key}", encoded, width, height, label)


def _as_rgb_jpeg(picture: PIL.Image.Image) -> bytes:
    if picture.mode.startswith("I;16"):
        # Pillow clips 16-bit gray to 255 when it converts; scaling keeps the picture.
        picture = PIL.Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY_OF_CONVERTED, subsampling=0)
    return buffer.getvalue()
