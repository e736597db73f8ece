"""What the header of a JPEG says, without decoding: fast enough to ask of every image."""

import re
import struct
from collections.abc import Iterator

# Frame headers (SOF) that every decoder takes: baseline, extended, progressive, Huffman-coded (ITU-T T.81, table B.1).
_PLAIN_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
_OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN, _BASELINE = 0xDA, 0xC0
_APP1, _APP2 = 0xE1, 0xE2
_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
_FRAME = struct.Struct(">BHHB")  # bits per sample, height, width, components
_LENGTH = struct.Struct(">H")


def plain_size(encoded: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels of an ordinary JPEG: 8 bit, gray or three components, upright, one picture.

    None for everything else, damaged headers included: who gets None must look closer. That goes, too, for a JPEG
    that its EXIF block turns or mirrors, and for one that announces more pictures in its file (MPF).
    """
    for marker, at, length in _segments(encoded):
        if marker in _PLAIN_FRAMES and at + 8 <= len(encoded):
            bits, height, width, components = _FRAME.unpack_from(encoded, at + 2)
            return (width, height) if bits == 8 and components in (1, 3) and width and height else None
        if marker in _OTHER_FRAMES:
            return None
        if marker == _APP1 and encoded.startswith(b"Exif\0\0", at + 2):
            if _is_turned(encoded[at + 8 : at + length]):
                return None
        elif marker == _APP2 and encoded.startswith(b"MPF\0", at + 2):
            return None
    return None


def is_baseline(encoded: bytes) -> bool:
    """Whether a JPEG, of which its beginning is enough, is baseline: sequential, Huffman-coded, 8 bit, one or three
    components (ITU-T T.81, frame SOF0). False where that cannot be told."""
    for marker, at, _ in _segments(encoded):
        if marker in _PLAIN_FRAMES | _OTHER_FRAMES:
            if marker != _BASELINE or at + 8 > len(encoded):
                return False
            bits, _, _, components = _FRAME.unpack_from(encoded, at + 2)
            return bits == 8 and components in (1, 3)
    return False


def _segments(encoded: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, place behind it, and length of each segment before the first scan, as far as they can be followed."""
    at = 2 if encoded[:2] == b"\xff\xd8" else len(encoded)
    while match := _MARKER.match(encoded, at):
        marker, at = match[1][0], match.end()
        if marker == _START_OF_SCAN or at + 2 > len(encoded):
            return
        (length,) = _LENGTH.unpack_from(encoded, at)
        yield marker, at, length
        at += length


def _is_turned(tiff: bytes) -> bool:
    """Whether an EXIF block names an orientation other than upright (2 to 8 in tag 0x0112, EXIF 2.3, section 4.6.4).

    A block that cannot be read, and values without a meaning such as 0, turn nothing; Pillow does the same.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return False
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for i in range(entries):
            tag, kind, count, value = struct.unpack_from(f"{order}HHIH", tiff, directory + 2 + 12 * i)
            if tag == 0x0112:
                return kind == 3 and count == 1 and 2 <= value <= 8
    except struct.error:
        return False
    return False
