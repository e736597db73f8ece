"""What a user does with a trained model: predict, extract, look for what is alike, load it in two lines."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch

from simclr_dali import load
from simclr_dali.eval.inference import open_classifier
from simclr_dali.pipeline.features import extract
from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.image_files import ImageFiles, central_views_of_files, find_images
from simclr_dali.pipeline.loader import central_views
from simclr_dali.pipeline.subset import keys
from simclr_dali.shards.manifest import load_split
from tests.conftest import ROOT, assert_sentence, on_small_disk, run_python

SETTING = LoaderConfig(32, torch.device("cpu"))


@pytest.fixture(scope="module")
def probed(run: Path) -> Path:
    """A run that has a linear.pt."""
    done = run_python(ROOT / "eval/linear.py", "--ckpt", run)
    assert done.returncode == 0, done.stderr
    return run


def embedded(encoder: torch.nn.Module, packed: Path) -> torch.Tensor:
    return extract(encoder, Split.local(packed, "val"), SETTING, batch=48).features


def as_pixels(views: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return ((views * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def test_two_lines_of_python(probed: Path, packed: Path) -> None:
    encoder = load(probed)
    (batch,) = central_views(Split.local(packed, "val"), SETTING, batch=48)
    with torch.no_grad():
        pooled, maps = encoder(batch.views), encoder.features(batch.views)
        levels = encoder(as_pixels(batch.views))
    assert pooled.shape == (48, encoder.width) and maps.shape == (48, encoder.width, 1, 1)
    assert torch.allclose(maps.mean((2, 3)), pooled, atol=1e-6)
    # The same pictures as bytes differ by the rounding of their levels only.
    assert (levels - pooled).norm() < 0.02 * pooled.norm()
    # A classifier's file holds the encoder as well.
    with torch.no_grad():
        assert torch.equal(load(probed / "linear.pt")(batch.views), pooled)


def test_files_give_the_central_views_of_files_packed_pictures(pictures: Path, packed: Path) -> None:
    split = Split.local(packed, "val")
    val = split.shards
    names = [key.partition("_")[2] for key in keys(split)]
    (batch,) = central_views(split, SETTING, batch=48)
    paths = find_images([pictures / "val"])
    assert len(paths) == 48 and paths == sorted(paths)
    made = central_views_of_files(ImageFiles(paths), SETTING, batch=7)
    found = torch.cat([views.views.clone() for views in made])
    labels = val.samples["label"]
    stored = {(val.classes[labels[row]], name): row for row, name in enumerate(names)}
    rows = [stored[path.parent.name, path.stem] for path in paths]
    assert torch.equal(found, batch.views[rows])


@pytest.mark.launch
def test_predictions_are_those_of_the_probe(probed: Path, pictures: Path) -> None:
    done = run_python(ROOT / "eval/predict.py", "--ckpt", probed, pictures / "val", "--json", "--top", 12)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    right = [Path(line["image"]).parent.name == line["predictions"][0]["class"] for line in found]
    result = json.loads((probed / "linear.json").read_text())
    assert len(found) == 48 and 100 * sum(right) / 48 == pytest.approx(result["top1"], abs=100 / 48 + 0.01)
    for line in found:
        scores = [best["score"] for best in line["predictions"]]
        assert sum(scores) == pytest.approx(1, abs=1e-4) and scores == sorted(scores, reverse=True)
    first, second = found[0]["predictions"][:2]
    names = probed / "names.txt"
    names.write_text(f"{first['class']} my bird, Avis mea\n\nnobody\n")
    words = ["--ckpt", probed / "linear.pt", found[0]["image"], "--top", 2, "--names", names]
    table = run_python(ROOT / "eval/predict.py", *words)
    assert table.stdout.split() == [
        found[0]["image"], "my", "bird", f"{first['score']:.3f}", second["class"], f"{second['score']:.3f}"
    ]  # fmt: skip


@pytest.mark.launch
def test_odd_pictures_are_classified_and_bad_ones_named(probed: Path, pictures: Path, tmp_path: Path) -> None:
    good = PIL.Image.open(next(iter(sorted((pictures / "val").rglob("*.*")))))
    good.save(tmp_path / "a.png")
    good.convert("CMYK").save(tmp_path / "b.jpg", quality=95)
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    good.rotate(90, expand=True).save(tmp_path / "c.jpg", exif=turned, quality=95)
    (tmp_path / "d.jpg").write_bytes(b"no picture")
    (tmp_path / "e.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:400])
    (tmp_path / "notes.txt").write_text("not looked at")
    done = run_python(ROOT / "eval/predict.py", "--ckpt", probed, tmp_path, "--json")
    assert_sentence(done, "2 of 5", "d.jpg", "e.jpg")
    found = {Path(line["image"]).name: line["predictions"] for line in json.loads(done.stdout)}
    assert list(found) == ["a.png", "b.jpg", "c.jpg"]
    # The turned one stands upright again.
    paths = [tmp_path / "a.png", tmp_path / "c.jpg"]
    (views,) = central_views_of_files(ImageFiles(paths), SETTING, batch=2)
    straight, upright = views.views
    assert (straight - upright).abs().mean() < 0.1 < (straight - upright.rot90(1, (1, 2))).abs().mean()


@pytest.mark.launch
def test_embeddings_of_shards_with_their_ids(probed: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "val.safetensors"
    done = run_python(ROOT / "eval/extract.py", "--ckpt", probed, "--out", out, "--map", "--batch", 7)
    assert done.returncode == 0, done.stderr
    written = safetensors.torch.load_file(out)
    about = json.loads((tmp_path / "val.ids.json").read_text())
    encoder, val = load(probed), load_split(packed, "val")
    assert torch.allclose(written["embeddings"], embedded(encoder, packed), atol=1e-4)
    assert written["feature_maps"].shape == (48, encoder.width, 1, 1)
    assert written["labels"].tolist() == about["labels"] == val.samples["label"].tolist()
    assert about["ids"] == keys(Split.local(packed, "val")) and about["classes"] == list(val.classes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["val.ids.json", "val.safetensors"]
    again = run_python(ROOT / "eval/extract.py", "--ckpt", probed, "--out", out)
    assert_sentence(again, "exists already")


@pytest.mark.launch
def test_embeddings_of_files(probed: Path, pictures: Path, tmp_path: Path) -> None:
    folder = sorted((pictures / "val").iterdir())[0]
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    out = tmp_path / "out.npy"
    words = ["--ckpt", probed, folder, tmp_path / "bad.jpg", folder, "--out", out, "--map", "--image-size", 64]
    assert_sentence(run_python(ROOT / "eval/extract.py", *words), "1 of 9", "bad.jpg")
    rows, maps = np.load(out), np.load(tmp_path / "out-map.npy")
    ids = json.loads((tmp_path / "out.ids.json").read_text())["ids"]
    assert rows.shape == (8, 64) and maps.shape == (8, 64, 2, 2) and len(ids) == 8
    assert np.allclose(maps.mean((2, 3)), rows, atol=1e-5)
    assert np.allclose(rows[:4], rows[4:], atol=1e-5) and ids[:4] == ids[4:] and not np.allclose(rows[0], rows[1])
    assert not list(tmp_path.glob("*partial*"))
    nothing = run_python(ROOT / "eval/extract.py", "--ckpt", probed, tmp_path / "bad.jpg", "--out", tmp_path / "no.npy")
    assert_sentence(nothing, "1 of 1", "bad.jpg")
    assert not list(tmp_path.glob("no*"))


@pytest.mark.launch
def test_the_nearest_picture_is_the_query_itself(probed: Path, pictures: Path, tmp_path: Path) -> None:
    query = sorted((pictures / "val").rglob("*.*"))[5]
    out = tmp_path / "grid.png"
    done = run_python(ROOT / "eval/nearest.py", query, "--ckpt", probed, "--split", "val", "--count", 3, "--out", out)
    assert done.returncode == 0, done.stderr
    found = next(line for line in done.stdout.splitlines() if line.startswith(f"{query}: "))
    first = found.split(": ")[1].split(",")[0].split()
    assert first == [query.parent.name, "1.000"]
    grid = PIL.Image.open(out).convert("RGB")
    side, title, gap, frame = 160, 20, 24, 8  # pixels; pictures lie in the middle of their places, inside of the frame
    itself, nearest, other = (
        np.asarray(grid.crop((left + frame, title + frame, left + side - frame, title + side - frame)), np.float64)
        for left in (0, side + gap, 2 * side + gap)
    )
    within = np.s_[30:-30, 30:-30]  # the pictures are of 96 pixels
    assert np.abs(itself - nearest)[within].mean() < 1 < np.abs(itself - other)[within].mean()
    # The folder of the query names a class: the query itself is of it, and frames say which others are.
    colors = {tuple(color) for color in np.asarray(grid).reshape(-1, 3)}
    assert (0, 158, 115) in colors


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("predict", ["--ckpt", "RUN/checkpoints", "x.jpg"], ["linear.pt"]),
        ("predict", ["--ckpt", "RUN", "nowhere.jpg"], ["nowhere.jpg"]),
        ("predict", ["--ckpt", "RUN", "EMPTY"], ["no pictures"]),
        ("extract", ["--ckpt", "RUN", "--out", "x.txt"], ["x.txt", ".npy"]),
        ("extract", ["--ckpt", "RUN/linear.pt", "--data", "EMPTY", "--out", "x.npy"], ["no packed split"]),
        ("nearest", ["--ckpt", "RUN", "EMPTY", "--out", "x.png"], ["no pictures"]),
    ],
)
def test_mistakes_are_one_sentence(
    script: str, words: list[str], expected: list[str], probed: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    filled: list[Any] = [word.replace("RUN", str(probed)).replace("EMPTY", str(tmp_path / "empty")) for word in words]
    assert_sentence(run_python(ROOT / f"eval/{script}.py", *filled), *expected)


def test_a_damaged_classifier_is_named(probed: Path, tmp_path: Path) -> None:
    from simclr_dali.model.checkpoint import CheckpointError

    state = torch.load(probed / "linear.pt", weights_only=True)
    for damage in (
        {"weight": torch.zeros(12, 3)},
        {"weight": 3},
        {"classes": ["a"]},
        {"architecture": {"name": "vgg"}},
    ):
        torch.save({**state, **damage}, tmp_path / "linear.pt")
        with pytest.raises(CheckpointError, match="damaged classifier"):
            open_classifier(tmp_path / "linear.pt")
    assert open_classifier(probed / "linear.pt").about["protocol"] == "fast"


@pytest.mark.parametrize("script", ["linear", "linear.pt", "extract", "extract, copying", "export"])
def test_a_full_disk_is_one_sentence(script: str, probed: Path) -> None:
    options = {
        "linear": "--features /mnt",
        "linear.pt": "--out /mnt",
        "extract": "--map --out /mnt/out.npy",
        "extract, copying": "--out /mnt/out.safetensors",
        "export": "--format safetensors --out /mnt/out.safetensors",
    }[script]
    name = script.partition(".")[0].partition(",")[0]
    command = f"{sys.executable} {ROOT}/eval/{name}.py --ckpt {probed} {options}"
    done = on_small_disk(16, f"{command} > /dev/null; code=$?; ls -A /mnt; exit $code")
    assert_sentence(done, "/mnt", "space")
    assert not done.stdout.strip(), done.stdout
