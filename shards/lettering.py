"""Letters on sheets of pictures: those of the system's fonts, since the one that comes with Pillow is ASCII alone."""

import functools
import unicodedata
from typing import Any

import PIL.ImageFont

_SIZE = 11  # pixels
# Of Debian and most others, of Fedora, and of macOS and Windows.
_FONTS = ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "arial.ttf")
_NOBODY_HAS = "\U0010ffff"


@functools.cache
def font() -> Any:
    """The first of these fonts that is installed, else Pillow's own."""
    for name in _FONTS:
        try:
            return PIL.ImageFont.truetype(name, _SIZE, layout_engine=PIL.ImageFont.Layout.BASIC)
        except OSError:
            continue
    return PIL.ImageFont.load_default(_SIZE)


def lettered(text: str) -> str:
    """``text`` in characters that the font has: others without their accents, or as \\uXXXX."""
    return "".join(map(_lettered, text))


def _lettered(character: str) -> str:
    if character == "\n" or _has(character):
        return character
    base = "".join(one for one in unicodedata.normalize("NFKD", character) if not unicodedata.combining(one))
    if base and all(map(_has, base)):
        return base
    return character.encode("unicode_escape").decode()


def _has(character: str) -> bool:
    try:
        return bytes(font().getmask(character)) != bytes(font().getmask(_NOBODY_HAS))
    except (UnicodeEncodeError, RuntimeError):  # half of a surrogate pair, as names that are no UTF-8 have
        return False
