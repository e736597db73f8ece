"""What becomes of one picture: kept bit for bit, or encoded anew for a reason that is named, or refused."""

import io
import struct
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simclr_dali.shards.decode import Decoder
from simclr_dali.shards.image import Storage, UnusableError, convert, prepare
from simclr_dali.shards.jpeg import plain_size


def ramp(width: int = 40, height: int = 30) -> PIL.Image.Image:
    """A gray ramp from left to right, as RGB."""
    row = np.linspace(0, 255, width).astype(np.uint8)
    return PIL.Image.fromarray(np.stack([np.tile(row, (height, 1))] * 3, axis=2))


def encoded(image: PIL.Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int, order: str = "<") -> bytes:
    """A JPEG whose EXIF block, in either byte order, says how the camera was held."""
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    block = b"Exif\0\0" + mark + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    return encoded(ramp(), exif=block, quality=95)


@pytest.mark.parametrize(
    "original",
    [
        encoded(ramp()),
        encoded(ramp(), progressive=True),
        encoded(ramp(), subsampling=0),
        encoded(ramp(), comment=b"x" * 40000),
        encoded(ramp().convert("L")),
        turned(1),
        turned(0),
        turned(9, ">"),
    ],
    ids=["baseline", "progressive", "4:4:4", "long comment", "gray", "upright", "orientation 0", "orientation 9"],
)
def test_ordinary_jpegs_are_kept_bit_for_bit(original: bytes) -> None:
    kept = prepare(original)
    assert kept == (original, 40, 30, None, False)
    assert plain_size(original) == (40, 30)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("palette", "PNG format"),
        ("alpha", "PNG format, transparency dropped"),
        ("16 bit", "PNG format, 16 bit"),
        ("webp", "WEBP format"),
        ("gif", "GIF format, several frames"),
        ("cmyk", "CMYK"),
    ],
)
def test_odd_kinds_become_baseline_rgb_jpeg_that_looks_the_same(kind: str, reason: str) -> None:
    image = ramp()
    original = {
        "palette": lambda: encoded(image.quantize(256), "PNG"),
        "alpha": lambda: encoded(image.convert("RGBA"), "PNG"),
        "16 bit": lambda: encoded(PIL.Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257), "PNG"),
        "webp": lambda: encoded(image, "WEBP", quality=95),
        "gif": lambda: encoded(image, "GIF", save_all=True, append_images=[image.rotate(180)]),
        "cmyk": lambda: encoded(image.convert("CMYK"), quality=100),
    }[kind]()
    result = prepare(original)
    assert result.reason == reason and (result.width, result.height) == (40, 30)
    with PIL.Image.open(io.BytesIO(result.encoded)) as stored:
        assert stored.format == "JPEG" and stored.mode in ("RGB", "L") and "progressive" not in stored.info
        assert np.abs(np.asarray(stored.convert("RGB")).astype(int) - np.asarray(image)).mean() < 4
    assert plain_size(result.encoded) == (40, 30)
    assert Decoder().accepts([result.encoded], [(40, 30)]) == [True]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_turned_pictures_are_stored_upright(orientation: int, order: str) -> None:
    original = turned(orientation, order)
    assert plain_size(original) is None
    result = prepare(original)
    assert result.reason == "EXIF rotation"
    with PIL.Image.open(io.BytesIO(original)) as raw, PIL.Image.open(io.BytesIO(result.encoded)) as stored:
        assert stored.size == ((40, 30) if orientation < 5 else (30, 40)) == (result.width, result.height)
        assert stored.getexif().get(0x0112, 1) == 1
        # EXIF 2.3, section 4.6.4: which transposition makes each orientation upright.
        name = [
            "FLIP_LEFT_RIGHT",
            "ROTATE_180",
            "FLIP_TOP_BOTTOM",
            "TRANSPOSE",
            "ROTATE_270",
            "TRANSVERSE",
            "ROTATE_90",
        ]
        wanted = raw.transpose(getattr(PIL.Image.Transpose, name[orientation - 2]))
        assert np.abs(np.asarray(stored).astype(int) - np.asarray(wanted)).mean() < 2


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(
    orientation=st.sampled_from([1, 6]),
    cut=st.integers(0, 600),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), max_size=4),
)
@settings(max_examples=400, deadline=None)
def test_damaged_headers_never_crash_and_agree_with_pillow(
    orientation: int, cut: int, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(turned(orientation))
    for at, bit in flips:
        data[at % len(data)] ^= 1 << bit
    damaged = bytes(data[: len(data) - cut])
    size = plain_size(damaged)
    if size is not None:
        try:
            opened = PIL.Image.open(io.BytesIO(damaged))
        except (OSError, SyntaxError, ValueError):
            return  # Pillow reads on behind the frame header; damage there is the decoder's to find
        assert opened.size == size and opened.mode in ("RGB", "L")


@pytest.mark.parametrize(
    "damaged", [b"", b"no picture", encoded(ramp(), "PNG")[:70], turned(6)[:400]], ids=["empty", "text", "png", "jpeg"]
)
def test_what_nobody_can_decode_is_refused_with_the_same_words_each_time(damaged: bytes) -> None:
    words = []
    for _ in range(2):
        with pytest.raises(UnusableError) as caught:
            prepare(damaged)
        words.append(str(caught.value))
    assert words[0] == words[1] and "0x" not in words[0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_pictures_of_more_pixels_than_allowed_are_refused(kind: str) -> None:
    with pytest.raises(UnusableError, match="40 x 30 pixels, more than 1,000; --max-pixels allows more"):
        prepare(encoded(ramp(), kind), Storage(max_pixels=1000))
    assert prepare(encoded(ramp(), kind), Storage(max_pixels=1200)).width == 40


def test_resize_shrinks_the_short_side_and_keeps_the_aspect() -> None:
    wide = prepare(encoded(ramp(400, 200)), Storage(resize=100))
    tall = prepare(encoded(ramp(150, 601)), Storage(resize=100))
    assert (wide.width, wide.height, wide.resized, wide.reason) == (200, 100, True, None)
    assert (tall.width, tall.height) == (100, 401)
    small = encoded(ramp(400, 100))
    assert prepare(small, Storage(resize=100)) == (small, 400, 100, None, False)
    odd = prepare(encoded(ramp(400, 200), "PNG"), Storage(resize=100))
    assert odd.resized and odd.reason == "PNG format" and odd.height == 100


def test_resize_is_lanczos() -> None:
    random = np.random.default_rng(0)
    image = PIL.Image.fromarray(random.integers(0, 256, (120, 160, 3), dtype=np.uint8)).resize((320, 240))
    result = prepare(encoded(image, quality=100, subsampling=0), Storage(resize=60, quality=100))
    with PIL.Image.open(io.BytesIO(result.encoded)) as stored:
        wanted = image.resize((80, 60), PIL.Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(stored).astype(int) - np.asarray(wanted)).mean() < 2
        other = image.resize((80, 60), PIL.Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(stored).astype(int) - np.asarray(other)).mean() > 4


@pytest.mark.parametrize(("quality", "chroma"), [(90, "4:2:0"), (91, "4:4:4"), (95, "4:4:4"), (50, "4:2:0")])
def test_chroma_is_full_above_quality_90(quality: int, chroma: str) -> None:
    result = prepare(encoded(ramp(100, 100)), Storage(resize=50, quality=quality))
    with PIL.Image.open(io.BytesIO(result.encoded)) as stored:
        sampling = stored.layer[0][1:3]
    assert sampling == {"4:4:4": (1, 1), "4:2:0": (2, 2)}[chroma]


def test_decoder_finds_the_bad_ones_among_many() -> None:
    good = encoded(ramp())
    images = [good] * 40
    images[3], images[17], images[39] = good[:300], b"text", b""
    verdicts = Decoder().accepts(images, [(40, 30)] * 40)
    assert [i for i, verdict in enumerate(verdicts) if not verdict] == [3, 17, 39]
    assert Decoder().accepts([good], [(30, 40)]) == [False]
    assert Decoder().accepts([], []) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_decoder_finds_the_same_bad_ones() -> None:
    good = encoded(ramp(640, 480), quality=90)
    images = [good, good[: len(good) // 2], encoded(ramp(640, 480).convert("L")), b"text", good]
    for device in (None, 0):
        assert Decoder(device).accepts(images, [(640, 480)] * 5) == [True, False, True, False, True]


def test_convert_names_a_reason_even_where_the_picture_shows_none() -> None:
    assert convert(encoded(ramp())).reason == "unusual JPEG coding"
    assert convert(encoded(ramp()), reason="DALI cannot decode it").reason == "DALI cannot decode it"
