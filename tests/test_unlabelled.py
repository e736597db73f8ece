"""A set without labels: it pre-trains, its features are written, and what needs labels says so."""

import json
import shutil
from pathlib import Path

import pytest

from simclr_dali.shards.pack import pack
from tests.conftest import ROOT, assert_sentence, run_command, run_python
from tests.runs import metrics, pretrain, tiny_config


@pytest.fixture(scope="module")
def unlabelled(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn pictures in one flat folder, packed."""
    folder = tmp_path_factory.mktemp("unlabelled")
    (folder / "in").mkdir()
    for number, path in enumerate(sorted((pictures / "train").rglob("*.jpg"))):
        shutil.copy(path, folder / "in" / f"{number:04d}.jpg")
    pack(folder / "in", folder / "packed")
    return folder / "packed"


def test_it_trains_and_only_what_needs_labels_is_refused(unlabelled: Path, packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = pretrain(
        tiny_config(tmp_path), unlabelled, run, "--set", "simclr.knn_every_epochs=1", "--stop-after-steps", 16
    )
    assert done.returncode == 0 and "images without labels in" in done.stdout, done.stderr
    assert "no kNN while training: the set has no labels" in done.stdout and len(metrics(run)) >= 4
    out = tmp_path / "features.npy"
    done = run_command("extract", "--ckpt", run, "--split", "train", "--out", out)
    assert done.returncode == 0 and out.is_file(), done.stderr
    assert set(json.loads(out.with_suffix(".ids.json").read_text())["labels"]) == {-1}
    done = run_command("views", unlabelled, "--out", tmp_path / "views.png")
    assert done.returncode == 0 and "(no label)" in done.stdout, done.stderr
    query = next((unlabelled.parent / "in").iterdir())
    done = run_command(
        "nearest", query, "--ckpt", run, "--split", "train", "--count", 2, "--out", tmp_path / "nearest.png"
    )
    assert done.returncode == 0 and f"_{query.stem} 1.000" in done.stdout, done.stdout + done.stderr
    assert_sentence(run_command("linear", "--ckpt", run), "train of", "has no labels", "--data")
    pack(unlabelled.parent / "in", tmp_path / "both")
    shutil.copytree(tmp_path / "both/train", tmp_path / "both/val")
    assert_sentence(run_command("knn", "--ckpt", run, "--data", tmp_path / "both"), "has no labels", "--data")
    done = run_python(ROOT / "eval/knn.py", "--ckpt", run, "--data", packed, "--k", 20)
    assert done.returncode == 0, done.stderr
