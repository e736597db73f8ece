"""pipeline.views and scripts.bench.stages, run as a user does."""

import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from scripts.bench.stages import verdict
from tests.conftest import assert_sentence, run_command, run_python


def test_the_sheet_shows_originals_and_views_and_prints_their_draws(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "views.png"
    done = run_command("views", packed, "--out", out, "--count", 3)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if re.match(r"sample \d+ \(\w+\) view [12]: ", line)]
    assert len(lines) == 6 and len({line.split(" view")[0] for line in lines}) == 3
    assert all(re.search(r": \d+% of the picture, \d+x\d+ at \d+,\d+; .*; .*blur", line) for line in lines)
    assert any("brightness x " in line and re.search(r"hue [+-]\d+ deg", line) for line in lines)
    sheet = np.asarray(PIL.Image.open(out).convert("RGB"))
    columns = np.split(sheet[40:220, 6:-6], 3, axis=1)
    # Three different pictures beside each other, none of them blank.
    assert all(column.std() > 5 for column in columns)
    assert not np.array_equal(columns[1], columns[2])
    # The frame of a view has the color of its box on the original.
    for view, color in ((1, [0, 114, 178]), (2, [213, 94, 0])):
        for column in (0, view):
            assert (columns[column] == color).all(axis=2).sum() > 50
    again = run_command("views", packed, "--out", tmp_path / "other.png", "--count", 3, "--epoch", 1)
    assert again.returncode == 0 and again.stdout.splitlines()[0] != done.stdout.splitlines()[0]


def test_mistakes_of_show_are_sentences(packed: Path, tmp_path: Path) -> None:
    assert_sentence(run_command("views", tmp_path, "--out", tmp_path / "a.png"), "no packed split")
    assert_sentence(run_command("views", packed, "--out", tmp_path / "a.xyz", "--count", 2), "ending")
    assert_sentence(run_command("views", packed, "--out", tmp_path / "a.png", "--epoch", -1), "-1")


def test_the_bench_times_every_stage_and_names_the_bottleneck(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    words = ["--images", 32, "--batch", 16, "--rounds", 1, "--size", 64, "--json", out]
    done = run_python("-m", "scripts.bench.stages", packed, *words)
    assert done.returncode == 0, done.stderr
    taken = json.loads(out.read_text())["ms_per_image"]
    assert set(taken) == {"read", "decode", "crop", "color", "blur", "output", "graph", "loader", "kept", "take"}
    assert min(taken["read"], taken["graph"], taken["loader"]) > 0
    assert "bottleneck: " in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_bench_without_a_gpu_says_so(packed: Path) -> None:
    assert_sentence(run_python("-m", "scripts.bench.stages", packed, "--device", "gpu"), "torch sees none")


def test_the_verdict_follows_the_figures() -> None:
    stages = {"decode": 1.0, "crop": 3.0, "color": 2.0, "blur": 1.0, "output": 1.0, "graph": 8.0}
    assert verdict({"read": 0.5, **stages, "loader": 8.8}).startswith("bottleneck: crop, 38% of the graph; the loader")
    assert verdict({"read": 16.0, **stages, "loader": 16.0}) == "bottleneck: reading, 2.0 times as long as the graph"


def test_a_part_of_train_is_held_out_and_val_is_left_alone(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "held"
    done = run_python("scripts/bench/hold_out.py", pictures, out, "--every", 4)
    assert done.returncode == 0, done.stderr
    halves = [{path.resolve() for path in (out / split).rglob("*") if path.is_file()} for split in ("train", "val")]
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == {path for path in (pictures / "train").rglob("*") if path.is_file()}
    for one in (pictures / "train").iterdir():
        images = len(list(one.iterdir()))
        assert len(list((out / "val" / one.name).iterdir())) == -(-images // 4)
    assert_sentence(run_python("scripts/bench/hold_out.py", pictures, out), f"{out} exists")
    assert_sentence(run_python("scripts/bench/hold_out.py", tmp_path, tmp_path / "other"), "no train/CLASS folders")
