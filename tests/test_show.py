"""The summary says what is there; the sheet shows the right pictures."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from simclr_dali.shards.manifest import load_split
from simclr_dali.shards.pack import pack
from simclr_dali.shards.show import CAPTION, THUMBNAIL, histogram, sheet, summary
from tests.conftest import assert_sentence, run_command


def test_summary_counts_images_classes_and_sizes(packed: Path) -> None:
    text = "\n".join(summary(load_split(packed, "train")))
    assert "train: 240 images" in text and "in 6 shards (40 images" in text
    assert "12 classes, 20 images each" in text
    assert "64 .. 128          240" in text


def test_histogram_has_every_value_once() -> None:
    lines = histogram(np.array([0, 4, 5, 9, 10, 5000]), [0, 5, 10])
    assert [int(line.split()[3]) for line in lines] == [2, 2, 2]


def test_sheet_shows_pictures_of_the_set_under_their_class(tmp_path: Path) -> None:
    colors = {"blue": (0, 0, 255), "red": (255, 0, 0)}
    for name, color in colors.items():
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
        for number in range(4):
            PIL.Image.new("RGB", (200, 100), color).save(tmp_path / "set" / "train" / name / f"{number}.jpg")
    pack(tmp_path / "set", tmp_path / "out")
    shards = load_split(tmp_path / "out", "train")
    picture = sheet(shards, 4, 5)
    assert picture.size == (4 * THUMBNAIL, 2 * (THUMBNAIL + CAPTION))
    for place in range(8):
        center = (place % 4 * THUMBNAIL + THUMBNAIL // 2, place // 4 * (THUMBNAIL + CAPTION) + THUMBNAIL // 2)
        wanted = colors[shards.classes[shards.samples["label"][place]]]
        assert np.abs(np.array(picture.getpixel(center)) - wanted).max() < 6


def test_the_command_prints_and_writes(packed: Path, tmp_path: Path) -> None:
    done = run_command("show", packed, "--pictures", tmp_path / "sheet.png", "--split", "val")
    assert done.returncode == 0, done.stderr
    assert "val: 48 images" in done.stdout and "0 left out while packing" in done.stdout
    with PIL.Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width == 10 * THUMBNAIL


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["odd/train"], "no packed split"),
        (["out", "--pictures", "sheet"], "must be .png or .jpg"),
        (["out", "--pictures", "none/sheet.png"], "cannot write"),
        (["bare"], "report.json is missing or damaged"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], sentence: str, odd_pictures: Path, tmp_path: Path) -> None:
    for name in ("out", "bare"):
        pack(odd_pictures, tmp_path / name)
    (tmp_path / "bare" / "report.json").unlink()
    done = run_command("show", *words, cwd=tmp_path)
    assert_sentence(done, sentence)
