"""What is stored of pictures of many bits or pixels, and of PNGs."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import torch

from simclr_dali.model.encoder import MEAN, STD
from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.loader import central_views
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.image import rgb
from simclr_dali.shards.manifest import load_split
from simclr_dali.shards.pack import pack
from simclr_dali.shards.plan import Options
from simclr_dali.shards.verify import verify
from tests.conftest import assert_sentence, run_command
from tests.drawn import class_folders, picture, put, put_array, report, stored

RAMP = np.linspace(0, 1, 40 * 30).reshape(30, 40)
DEEP: dict[str, tuple[npt.NDArray[Any], str, tuple[float, float]]] = {
    "12 bit": ((4095 * RAMP).astype(np.uint16), "png", (0.0, 4095.0)),
    "14 bit": ((16383 * RAMP).astype(np.uint16), "tiff", (0.0, 16383.0)),
    "float 0..1": (RAMP.astype(np.float32), "tiff", (0.0, 1.0)),
    "float 0..255": ((255 * RAMP).astype(np.float32), "tiff", (0.0, 255.0)),
    "CT": ((4000 * RAMP - 1000).astype(np.int32), "tiff", (-1000.0, 3000.0)),
}


@pytest.mark.parametrize("kind", DEEP)
def test_pictures_of_many_bits_need_a_range_and_then_use_it_whole(kind: str, tmp_path: Path) -> None:
    array, ending, value_range = DEEP[kind]
    put_array(tmp_path / f"in/train/ant/0.{ending}", array)
    put(tmp_path / "in/train/ant/1.jpg")
    done = run_command("pack", tmp_path / "in", tmp_path / "out")
    assert_sentence(done, f"in/train/ant/0.{ending}: it holds values from", "--range LOW:HIGH")
    assert list(tmp_path.iterdir()) == [tmp_path / "in"]
    words = "{:g}:{:g}".format(*value_range)
    done = run_command("pack", tmp_path / "in", tmp_path / "out", "--range", words, "--workers", 1)
    assert done.returncode == 0, done.stderr
    _assert_ramp(tmp_path / "out", 2)
    found = report(tmp_path / "out")["train"]["range"]
    assert (found["black"], found["white"]) == value_range
    pack(tmp_path / "in", tmp_path / "auto", auto_range=True)
    _assert_ramp(tmp_path / "auto", 3)
    assert "percentile" in report(tmp_path / "auto")["train"]["range"]["from"]


def _assert_ramp(out: Path, tolerance: int) -> None:
    (deep,) = [image for image in map(rgb, stored(out, "train")) if np.ptp(np.asarray(image), axis=2).max() == 0]
    assert np.abs(np.asarray(deep)[..., 0] - 255 * RAMP).max() <= tolerance


def test_sixteen_bits_of_the_whole_range_need_no_word(tmp_path: Path) -> None:
    put_array(tmp_path / "in/train/ant/0.png", (65535 * RAMP).astype(np.uint16))
    put_array(tmp_path / "in/train/ant/1.png", np.zeros((30, 40), np.uint16))
    pack(tmp_path / "in", tmp_path / "out")
    levels = [np.asarray(image)[..., 0] for image in map(rgb, stored(tmp_path / "out", "train"))]
    assert sorted(int(level.max()) for level in levels) == [0, 255]
    assert [one["reason"] for one in report(tmp_path / "out")["train"]["converted"]] == ["PNG format, 16 bit"] * 2


def test_dark_color_of_sixteen_bits_is_refused(tmp_path: Path) -> None:
    dark = io.BytesIO()
    _save_rgb16(dark, (4095 * RAMP).astype(np.uint16))
    put(tmp_path / "in/train/ant/0.png", dark.getvalue())
    with pytest.raises(UserError, match="color of 16 bits a channel and its values stay below 4096"):
        pack(tmp_path / "in", tmp_path / "out")
    pack(tmp_path / "in", tmp_path / "out", Options(value_range=(0.0, 65535.0)))


def _save_rgb16(target: io.BytesIO, levels: npt.NDArray[np.uint16]) -> None:
    """A PNG of three equal channels of 16 bits; Pillow writes none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = levels.shape
    rows = np.repeat(levels[..., None], 3, axis=2).astype(">u2").reshape(height, -1)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    target.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


@pytest.mark.parametrize("value", ["5", "9:1", "a:b", "0:inf"])
def test_ranges_that_cannot_be_meant_are_one_sentence(value: str, tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 2})
    assert_sentence(run_command("pack", tmp_path / "in", tmp_path / "out", "--range", value), "--range is", "LOW:HIGH")


def test_auto_range_needs_pictures_of_many_bits(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 2})
    with pytest.raises(UserError, match="no picture of more than 8 bits was found"):
        pack(tmp_path / "in", tmp_path / "out", auto_range=True)


def test_more_pixels_are_allowed_by_an_option(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train": 2})
    options = Options(max_pixels=1000)
    with pytest.raises(UserError, match=r"40 x 30 pixels, more than 1,000; --max-pixels allows more"):
        pack(tmp_path / "in", tmp_path / "out", options)
    huge = io.BytesIO()
    PIL.Image.new("L", (20_000, 10_000)).save(huge, "JPEG")
    put(tmp_path / "in/train/ant/9.jpg", huge.getvalue())
    huge.seek(0)
    PIL.Image.new("1", (20_000, 10_000)).save(huge, "TIFF", compression="group4")
    put(tmp_path / "in/train/bee/9.tiff", huge.getvalue())
    with pytest.raises(UserError, match="--max-pixels allows more"):
        pack(tmp_path / "in", tmp_path / "out2")
    pack(tmp_path / "in", tmp_path / "out3", Options(max_pixels=200_000_000, decoder="none"))
    assert load_split(tmp_path / "out3", "train").samples["width"].max() == 20_000


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_pngs_keep_their_bytes(mode: str, tmp_path: Path) -> None:
    data = io.BytesIO()
    picture().convert(mode).save(data, "PNG")
    put(tmp_path / "in/train/ant/0.png", data.getvalue())
    put(tmp_path / "in/train/bee/1.jpg")
    pack(tmp_path / "in", tmp_path / "out")
    assert data.getvalue() in stored(tmp_path / "out", "train") and verify(tmp_path / "out", full=True) == []
    pack(tmp_path / "out", tmp_path / "again")
    assert data.getvalue() in stored(tmp_path / "again", "train")
    for options in (Options(reencode="jpeg"), Options(resize=20)):
        out = tmp_path / f"out-{options.reencode}"
        pack(tmp_path / "in", out, options)
        assert all(image[:2] == b"\xff\xd8" for image in stored(out, "train"))


def test_views_of_pngs_are_views_of_their_pixels(tmp_path: Path) -> None:
    """Central views of 32 px are whole pictures: a gray and a color PNG of that size come out as they are."""
    images = {"gray": picture(32, 32).convert("L"), "color": picture(32, 32)}
    for name, image in images.items():
        image.save(put(tmp_path / f"in/train/{name}/0.png"), "PNG")
    pack(tmp_path / "in", tmp_path / "out")
    split = Split.local(tmp_path / "out", "train")
    (found,) = central_views(split, LoaderConfig(32, torch.device("cpu")), batch=2)
    pixels = as_pixels(found.views)
    for view, label in zip(pixels, found.labels.tolist(), strict=True):
        expected = np.asarray(images[split.shards.classes[label]].convert("RGB"))
        assert np.abs(view - expected).max() <= 1


def as_pixels(views: torch.Tensor) -> npt.NDArray[np.float64]:
    """Normalised views as levels [n, rows, columns, 3] of 0..255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (255 * (views.double() * std + mean)).permute(0, 2, 3, 1).numpy()


def test_odd_pngs_become_jpeg(tmp_path: Path) -> None:
    for number, image in enumerate((picture().convert("RGBA"), picture().quantize(), picture().convert("1"))):
        image.save(put(tmp_path / f"in/train/ant/{number}.png"), "PNG")
    whole = io.BytesIO()
    picture().save(whole, "PNG", transparency=(1, 2, 3))
    put(tmp_path / "in/train/ant/8.png", whole.getvalue())
    pack(tmp_path / "in", tmp_path / "out")
    assert all(image[:2] == b"\xff\xd8" for image in stored(tmp_path / "out", "train"))
    damaged = io.BytesIO()
    picture().save(damaged, "PNG")
    cut = bytearray(damaged.getvalue())
    cut[len(cut) // 2] ^= 255
    put(tmp_path / "in/train/ant/9.png", bytes(cut))
    with pytest.raises(UserError, match="1 of 5 images cannot be decoded"):
        pack(tmp_path / "in", tmp_path / "out2")
