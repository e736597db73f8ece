"""What becomes of one picture: its own bytes wherever possible, a baseline JPEG otherwise.

Of a picture with transparency the colors are kept and the transparency is dropped, as torchvision's loader does; gray
stays gray, which decoders give as three equal channels; a palette, CMYK and the rest become RGB. Eight bits a channel
are stored: what has more is scaled (``--range``).
"""

import io
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps

from simclr_dali.shards.jpeg import plain_size
from simclr_dali.shards.png import SIGNATURE, plain_png_size

# Above it Pillow suspects a decompression bomb; a picture of this many pixels takes 270 MB once decoded.
MAX_PIXELS = 89_478_485
FULL_CHROMA_ABOVE = 90  # quality; up to it color is stored at half the resolution (4:2:0)
REENCODE = ("jpeg",)
_SAMPLE_FORMAT, _UNSIGNED = 339, 1  # TIFF 6.0, section 19
_ORIENTATION = 0x0112  # of EXIF 2.32, table 4
_ALLOW_MORE = "--max-pixels allows more"
_WHOLE_16_BIT = (0.0, 65535.0)


@dataclass(frozen=True)
class Storage:
    """How pictures are stored."""

    resize: int | None = None
    """The longest that an image's short side may be, in pixels (Lanczos makes it smaller); None: any length."""
    quality: int = 95
    """Of JPEGs that are encoded anew, 1 to 100."""
    reencode: str | None = None
    """"jpeg": what is no JPEG becomes one; None: plain PNGs stay what they are."""
    value_range: tuple[float, float] | None = None
    """The values that become 0 and 255 where a picture has more than 8 bits; None: 0 and 65535, of 16 bits only."""
    max_pixels: int = MAX_PIXELS
    """Pictures with more are refused."""


class Prepared(NamedTuple):
    """A JPEG or PNG to store, its size in pixels, and why it is not the original (None: it is, or only smaller)."""

    encoded: bytes
    width: int
    height: int
    reason: str | None
    resized: bool = False


class UnusableError(Exception):
    """A picture that cannot be decoded: why, the same on every machine, and what the packer has for it, if anything."""

    def __init__(self, reason: str, option: str = "") -> None:
        super().__init__(reason, option)
        self.reason, self.option = reason, option

    def __str__(self) -> str:
        return "; ".join(filter(None, [self.reason, self.option]))


class RangeError(UnusableError):
    """A picture of more than 8 bits whose values cannot be scaled without being told what they mean."""


def ending_of_image(encoded: bytes) -> str:
    """The ending under which stored bytes lie in a tar: "png" or "jpg"."""
    return "png" if encoded.startswith(SIGNATURE) else "jpg"


def rgb(encoded: bytes) -> PIL.Image.Image:
    """An encoded picture as RGB, as stored. Raises OSError where Pillow cannot decode it."""
    with PIL.Image.open(io.BytesIO(encoded)) as picture:
        return picture.convert("RGB")


def allow_pixels(count: int) -> None:
    """Let Pillow open pictures of up to ``count`` pixels in this process, where its own limit is lower."""
    if PIL.Image.MAX_IMAGE_PIXELS is not None:
        PIL.Image.MAX_IMAGE_PIXELS = max(PIL.Image.MAX_IMAGE_PIXELS, count)


def prepare(encoded: bytes, storage: Storage | None = None) -> Prepared:
    """Keep an ordinary JPEG or PNG as it is; re-encode everything else, and what ``storage.resize`` wants smaller.

    Raises UnusableError where the picture cannot be decoded, and RangeError where ``storage.value_range`` is needed.
    """
    storage = storage or Storage()
    size = plain_size(encoded)
    if size is None and storage.reencode is None:
        size = plain_png_size(encoded)
    if size is None:
        return convert(encoded, storage)
    if size[0] * size[1] > storage.max_pixels:
        raise _too_large(size, storage)
    if storage.resize is not None and min(size) > storage.resize:
        return convert(encoded, storage)
    return Prepared(encoded, *size, None)


def _too_large(size: tuple[int, int], storage: Storage) -> UnusableError:
    return UnusableError(f"{size[0]} x {size[1]} pixels, more than {storage.max_pixels:,}", _ALLOW_MORE)


def convert(encoded: bytes, storage: Storage | None = None, *, reason: str | None = None) -> Prepared:
    """Decode with Pillow (first frame, EXIF rotation applied) and encode as RGB or gray JPEG; see :func:`prepare`.

    reason: why, where the picture itself does not show it.
    """
    storage = storage or Storage()
    try:
        with warnings.catch_warnings():
            # The size is compared below; and Pillow warns of damaged metadata, which is not stored again.
            warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            with PIL.Image.open(io.BytesIO(encoded)) as picture:
                if picture.width * picture.height > storage.max_pixels:
                    raise _too_large(picture.size, storage)
                deep_color = _is_deep_color(picture)  # asked first: what follows may load the picture and forget it
                reasons = _oddities(picture, deep_color=deep_color)
                if deep_color:
                    _check_deep_color(picture, storage.value_range)
                levels = _eight_bit(picture, storage.value_range)
                if levels is not picture:  # made of an array, which has no EXIF
                    levels.getexif()[_ORIENTATION] = picture.getexif().get(_ORIENTATION, 1)
                upright = PIL.ImageOps.exif_transpose(levels)
                small = _shrink(upright if upright.mode == "L" else upright.convert("RGB"), storage.resize)
    except PIL.UnidentifiedImageError as error:
        raise UnusableError("no format of pictures is recognised") from error
    except PIL.Image.DecompressionBombError as error:
        raise UnusableError(f"more than {storage.max_pixels:,} pixels", _ALLOW_MORE) from error
    except UnusableError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds; whichever it is, this is no usable picture
        raise UnusableError(f"{type(error).__name__}: {error}") from error
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=storage.quality, subsampling=0 if storage.quality > FULL_CHROMA_ABOVE else 2)
    resized = small.size != upright.size
    if reason is None and not reasons and not resized:
        reason = "unusual JPEG coding"
    return Prepared(buffer.getvalue(), *small.size, ", ".join(filter(None, [*reasons, reason])) or None, resized)


def is_high_bit_depth(encoded: bytes) -> bool:
    """Whether a picture has more than 8 bits a channel; false for what cannot be opened."""
    try:
        with PIL.Image.open(io.BytesIO(encoded)) as picture:
            return picture.mode.startswith(("I", "F")) or _is_deep_color(picture)
    except Exception:  # packing says what is wrong with it
        return False


def deep_values(encoded: bytes) -> npt.NDArray[Any] | None:
    """The values of a gray picture of more than 8 bits; None for every other, and for what cannot be decoded."""
    try:
        with PIL.Image.open(io.BytesIO(encoded)) as picture:
            return levels_of(picture) if picture.mode.startswith(("I", "F")) else None
    except Exception:  # packing says what is wrong with it
        return None


def _oddities(picture: PIL.Image.Image, *, deep_color: bool) -> list[str]:
    found = []
    if picture.format != "JPEG":
        found.append(f"{picture.format} format")
    if getattr(picture, "n_frames", 1) > 1:
        found.append("several frames")
    if picture.mode == "CMYK":
        found.append("CMYK")
    if picture.mode.startswith(("I", "F")):
        found.append(_kind(picture).replace("16 bits", "16 bit"))
    elif deep_color:
        found.append("16 bit")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        found.append("transparency dropped")
    if 2 <= picture.getexif().get(_ORIENTATION, 1) <= 8:
        found.append("EXIF rotation")
    return found


def _eight_bit(picture: PIL.Image.Image, value_range: tuple[float, float] | None) -> PIL.Image.Image:
    """Scale a picture of more than 8 bits to 0..255: 16 bits by their upper half, others by ``value_range``.

    Values outside of the range are cut off, and what is no number becomes 0. Raises RangeError for 32 bits and floats
    without a range, and for 16 bits of which the upper half of all values is not used: those are most likely 12-bit
    data, and would be stored almost black.
    """
    if not picture.mode.startswith(("I", "F")):
        return picture
    levels = levels_of(picture)
    if value_range is not None:
        low, high = value_range
        scaled = np.clip((np.nan_to_num(levels.astype(np.float64), nan=low) - low) / (high - low), 0, 1)
        return PIL.Image.fromarray(np.round(255 * scaled).astype(np.uint8))
    if _kind(picture) == "16 bits" and (levels.max() > _WHOLE_16_BIT[1] // 2 or levels.max() == 0):
        return PIL.Image.fromarray((levels.astype(np.int64) >> 8).astype(np.uint8))
    finite = levels[np.isfinite(levels)]
    if not finite.size:
        raise UnusableError("none of its values is a number")
    raise RangeError(
        f"it holds values from {finite.min():g} to {finite.max():g} in {_kind(picture)}",
        "say which are black and white with --range LOW:HIGH, or --range auto",
    )


def levels_of(picture: PIL.Image.Image) -> npt.NDArray[Any]:
    """The values of a gray picture of more than 8 bits, as they stand in its file."""
    if picture.format == "PPM":
        codec, _, _, arguments = getattr(picture, "tile")[0]  # noqa: B009, of Pillow's ImageFile
        levels = np.asarray(picture)
        # Pillow scales a PGM to 65535 by the largest value that its header names.
        return np.round(levels * (arguments[1] / 65535)).astype(np.int64) if codec == "ppm" else levels
    levels = np.asarray(picture)
    tags: Any = getattr(picture, "tag_v2", {})
    if levels.dtype == np.int32 and tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED:
        return levels.view(np.uint32)  # Pillow has no mode for it
    return levels


def _kind(picture: PIL.Image.Image) -> str:
    if picture.mode.startswith("F"):
        return "floating point numbers"
    return "16 bits" if ";16" in picture.mode or picture.format == "PPM" else "32-bit integers"


def _is_deep_color(picture: PIL.Image.Image) -> bool:
    """Whether a picture that was only opened has color of 16 bits a channel, of which Pillow keeps the upper 8."""
    return not picture.mode.startswith(("I", "F")) and any(
        ";16" in str(tile[3]) for tile in getattr(picture, "tile", [])
    )


def _check_deep_color(picture: PIL.Image.Image, value_range: tuple[float, float] | None) -> None:
    if value_range not in (None, _WHOLE_16_BIT):
        raise RangeError(
            "it is color of 16 bits a channel", "--range does not scale it, so convert it to 8 bits yourself"
        )
    brightest = int(np.asarray(picture.convert("RGB")).max())
    if value_range is None and 0 < brightest < 128:
        raise RangeError(
            f"it is color of 16 bits a channel and its values stay below {256 * (brightest + 1)} of 65536",
            "where that is meant give --range 0:65535, otherwise convert it to 8 bits yourself",
        )


def _shrink(picture: PIL.Image.Image, resize: int | None) -> PIL.Image.Image:
    short = min(picture.size)
    if resize is None or short <= resize:
        return picture
    width, height = (max(1, round(side * resize / short)) for side in picture.size)
    return picture.resize((width, height), PIL.Image.Resampling.LANCZOS)
