"""What becomes of one picture: its own bytes wherever possible, a baseline RGB JPEG otherwise."""

import io
import warnings
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps

from simclr_dali.shards.jpeg import plain_size

# Above it Pillow suspects a decompression bomb; a picture of this many pixels takes 270 MB once decoded.
MAX_PIXELS = 89_478_485
FULL_CHROMA_ABOVE = 90  # quality; up to it color is stored at half the resolution (4:2:0)


class Prepared(NamedTuple):
    """A JPEG to store, its size in pixels, and why it is not the original (None: it is, or was only made smaller)."""

    encoded: bytes
    width: int
    height: int
    reason: str | None
    resized: bool = False


class UnusableError(Exception):
    """A picture that cannot be decoded; the message says why, the same on every machine."""


def rgb(encoded: bytes) -> PIL.Image.Image:
    """An encoded picture as RGB, as stored. Raises OSError where Pillow cannot decode it."""
    with PIL.Image.open(io.BytesIO(encoded)) as picture:
        return picture.convert("RGB")


def prepare(encoded: bytes, *, resize: int | None = None, quality: int = 95) -> Prepared:
    """Keep an ordinary JPEG as it is; re-encode everything else, and what ``resize`` wants smaller.

    resize: the short side may have this many pixels at most (Lanczos); smaller pictures stay untouched.
    quality: of what is encoded anew, 1 to 100. Raises UnusableError where the picture cannot be decoded.
    """
    size = plain_size(encoded)
    if size is None:
        return convert(encoded, resize=resize, quality=quality)
    if size[0] * size[1] > MAX_PIXELS:
        raise UnusableError(f"{size[0]} x {size[1]} pixels, more than {MAX_PIXELS:,}")
    if resize is not None and min(size) > resize:
        return convert(encoded, resize=resize, quality=quality)
    return Prepared(encoded, *size, None)


def convert(encoded: bytes, *, resize: int | None = None, quality: int = 95, reason: str | None = None) -> Prepared:
    """Decode with Pillow (first frame, EXIF rotation applied) and encode as RGB or gray JPEG; see :func:`prepare`.

    reason: why, where the picture itself does not show it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            # Pillow warns of damaged metadata, which is not stored again.
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            with PIL.Image.open(io.BytesIO(encoded)) as picture:
                reasons = _oddities(picture)
                upright = PIL.ImageOps.exif_transpose(_eight_bit(picture))
                small = _shrink(upright if upright.mode == "L" else upright.convert("RGB"), resize)
    except PIL.UnidentifiedImageError as error:
        raise UnusableError("no format of pictures is recognised") from error
    except Exception as error:  # Pillow raises a dozen kinds; whichever it is, this is no usable picture
        raise UnusableError(f"{type(error).__name__}: {error}") from error
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality, subsampling=0 if quality > FULL_CHROMA_ABOVE else 2)
    resized = small.size != upright.size
    if reason is None and not reasons and not resized:
        reason = "unusual JPEG coding"
    return Prepared(buffer.getvalue(), *small.size, ", ".join(filter(None, [*reasons, reason])) or None, resized)


def _oddities(picture: PIL.Image.Image) -> list[str]:
    found = []
    if picture.format != "JPEG":
        found.append(f"{picture.format} format")
    if getattr(picture, "n_frames", 1) > 1:
        found.append("several frames")
    if picture.mode == "CMYK":
        found.append("CMYK")
    if picture.mode.startswith("I"):
        found.append("16 bit")
    if 2 <= picture.getexif().get(0x0112, 1) <= 8:
        found.append("EXIF rotation")
    return found


def _eight_bit(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Pillow cuts 16-bit gray at 255 when it converts; scaling keeps the picture."""
    if not picture.mode.startswith("I"):
        return picture
    levels = np.asarray(picture).astype(np.int64)
    return PIL.Image.fromarray(np.clip(levels >> 8, 0, 255).astype(np.uint8))


def _shrink(picture: PIL.Image.Image, resize: int | None) -> PIL.Image.Image:
    short = min(picture.size)
    if resize is None or short <= resize:
        return picture
    width, height = (max(1, round(side * resize / short)) for side in picture.size)
    return picture.resize((width, height), PIL.Image.Resampling.LANCZOS)
