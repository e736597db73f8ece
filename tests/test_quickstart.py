"""The quickstart: pictures whose color says nothing, and a whole job from a folder to a table."""

import base64
import io
import json
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from scripts.draw_pictures import CLASSES, draw_picture
from simclr_dali.eval.logistic import fit_linear, score
from tests.conftest import ROOT, assert_sentence, run_python


def test_color_and_brightness_do_not_tell_a_class() -> None:
    """A linear probe on mean color and on the mean and spread of brightness stays at chance."""
    random = np.random.default_rng(1)
    features, labels = [], []
    for label, name in enumerate(CLASSES):
        for _ in range(50):
            picture = np.asarray(draw_picture(name, random), np.float64) / 255
            gray = picture.mean(2)
            features.append([*picture.mean((0, 1)), gray.mean(), gray.mean() ** 2, gray.std()])
            labels.append(label)
    x, y = torch.tensor(features).float(), torch.tensor(labels)
    train = torch.arange(len(y)) % 5 < 3
    layer = fit_linear(x[train], y[train], len(CLASSES), 1e-3).layer
    chance, count = 1 / len(CLASSES), int((~train).sum())
    four_sigma = 4 * np.sqrt(chance * (1 - chance) / count)
    assert score(layer, x[~train], y[~train]).top1 < 100 * (chance + four_sigma)


def test_every_class_is_drawn_from_the_seed_alone() -> None:
    first, again = (np.asarray(draw_picture("spiral", np.random.default_rng(3))) for _ in range(2))
    assert np.array_equal(first, again)
    assert len(CLASSES) >= 10 and len(set(CLASSES)) == len(CLASSES)


@pytest.mark.launch
def test_a_folder_becomes_a_table(pictures: Path, tmp_path: Path) -> None:
    words = [ROOT / "scripts/quickstart.py", pictures, "--images-seen", 240]
    done = run_python(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    assert summary["chance"] == pytest.approx(100 / 12, abs=1e-3)
    assert 0 <= summary["untrained"] <= 100 and 0 <= summary["trained"] <= 100
    assert summary["images_per_s"] > 0 and summary["seconds"] > 0
    run = tmp_path / summary["run"]
    assert json.loads((run / "linear.json").read_text())["top1"] == summary["trained"]
    assert json.loads((run / "linear-untrained.json").read_text())["top1"] == summary["untrained"]
    assert "finished" in (run / "report.html").read_text() and done.stdout.rstrip().endswith("report.html")
    for label in ("chance", "untrained encoder", "trained encoder", "images/s", "summary.json"):
        assert label in done.stdout
    assert_whole((tmp_path / "runs/quickstart/overview.svg").read_text())


def test_the_picture_of_the_front_page_is_one_of_the_quickstart() -> None:
    text = (ROOT / "scripts/overview.svg").read_text()
    assert_whole(text)
    assert "740 steps without labels" in text and len(text) < 200_000


def assert_whole(text: str) -> None:
    """All pictures are in it, the curve lies in its axes, and nothing is fetched."""
    space = "{http://www.w3.org/2000/svg}"
    root = xml.etree.ElementTree.fromstring(text)
    images = [image.attrib["href"].partition(",") for image in root.iter(f"{space}image")]
    assert len(images) == 3 * 3 + 3 * 5 and {kind for kind, _, _ in images} == {"data:image/jpeg;base64"}
    for _, _, data in images:
        assert PIL.Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").size > (40, 40)
    (curve,) = root.iter(f"{space}polyline")
    x, y = np.array([point.split(",") for point in curve.attrib["points"].split()], float).T
    levels = [float(line.attrib["y1"]) for line in root.iter(f"{space}line")]
    assert (np.diff(x) > 0).all() and y.min() > 50 and y.max() < 220 and min(levels) < y.max() and y.min() < max(levels)
    assert sum("%" in (text.text or "") for text in root.iter(f"{space}text")) == 3  # two probes and chance


def test_a_folder_inside_its_own_results_is_refused_and_kept(tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder = tmp_path / "runs/quickstart/pictures" / split / "a"
        folder.mkdir(parents=True)
        (folder / "1.jpg").touch()
    done = run_python(ROOT / "scripts/quickstart.py", "runs/quickstart/pictures", cwd=tmp_path)
    assert_sentence(done, "lies inside")
    assert len(list(tmp_path.rglob("1.jpg"))) == 2


def test_a_folder_without_val_is_refused_and_the_last_results_stay(tmp_path: Path) -> None:
    kept = tmp_path / "runs/quickstart/summary.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    folder = tmp_path / "only" / "train" / "a"
    folder.mkdir(parents=True)
    (folder / "1.jpg").touch()
    assert_sentence(run_python(ROOT / "scripts/quickstart.py", tmp_path / "only", cwd=tmp_path), "val")
    assert kept.exists()
