"""What the header of a PNG says, without decoding."""

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GRAY, _RGB = 0, 2  # color types (PNG specification, section 11.2.2)
# Chunks that make a picture look otherwise than its pixels: transparency, animation, a turned camera.
_ODD_CHUNKS = frozenset({b"tRNS", b"acTL", b"eXIf"})
_CHUNK = struct.Struct(">I4s")
_HEADER = struct.Struct(">IIBBBBB")  # width, height, bits, color type, compression, filter, interlace


def plain_png_size(encoded: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels of an ordinary PNG: 8 bit, gray or RGB, not interlaced, opaque, one picture, whole.

    None for everything else; who gets None must look closer. Every chunk's checksum is compared, since decoders may
    take a damaged picture without a word.
    """
    if not encoded.startswith(SIGNATURE):
        return None
    at, size = len(SIGNATURE), None
    while at + 12 <= len(encoded):
        length, kind = _CHUNK.unpack_from(encoded, at)
        end = at + 8 + length
        if kind in _ODD_CHUNKS or end + 4 > len(encoded):
            return None
        if zlib.crc32(memoryview(encoded)[at + 4 : end]) != int.from_bytes(encoded[end : end + 4], "big"):
            return None
        if kind == b"IHDR" and length == _HEADER.size:
            width, height, bits, color, _, _, interlace = _HEADER.unpack_from(encoded, at + 8)
            if bits != 8 or color not in (_GRAY, _RGB) or interlace or not width or not height:
                return None
            size = width, height
        at = end + 4
        if kind == b"IEND":
            return size
    return None
