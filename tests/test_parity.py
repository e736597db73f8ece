"""The parity report: our graph is within its limits of torchvision, and one that is not would be caught."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from scripts import parity
from simclr_dali.pipeline import color, graph
from simclr_dali.pipeline.draws import Draws
from tests.conftest import assert_sentence, run_python
from tests.test_graph import photos

COLOR_STAGES = ("brightness", "contrast", "saturation", "gray", "these three, nothing clipped between")


def test_every_limited_stage_is_well_within_its_limit() -> None:
    results = {result.stage.name: result for result in parity.compare(photos(6), draws_per_image=4)}
    assert all(result.within for result in results.values())
    assert results["flip"].worst == 0
    # On floats the color steps are torchvision's but for rounding.
    for name in COLOR_STAGES:
        assert results[name].mean < 0.05 and len(results[name].ours) >= 3
    # What is stated to differ does, or the report would say too much.
    assert results["hue"].mean > 1 and results["these three, clipped between"].worst > 1


def exceeded() -> set[str]:
    return {result.stage.name for result in parity.compare(photos(4), draws_per_image=2) if not result.within}


def test_other_gray_weights_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(color, "GRAY", np.tile([0.5, 0.3, 0.2], (3, 1)))
    assert {"saturation", "gray"} <= exceeded()


def test_a_contrast_around_another_level_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_mean(draws: Sequence[Draws]) -> list[tuple[color.Matrices, color.Matrices]]:
        return [(m, np.zeros_like(n)) for m, n in color.compose_each(draws)]

    monkeypatch.setattr(graph, "compose_each", without_mean)
    assert "contrast" in exceeded()


def test_the_command_writes_a_report_with_pictures(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "parity.html"
    done = run_python("-m", "scripts.parity", pictures / "val", "--html", out, "--most", 3, "--draws", 2)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "crop and resize" in done.stdout and "stated only" in done.stdout
    text = out.read_text()
    assert text.count("<h2>") >= 9 and text.count("data:image/jpeg;base64,") >= 50


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    assert_sentence(run_python("-m", "scripts.parity", tmp_path / "none"), "does not exist")
    assert_sentence(run_python("-m", "scripts.parity", tmp_path), "no pictures")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    assert_sentence(run_python("-m", "scripts.parity", tmp_path / "bad.jpg"), "bad.jpg", "cannot be decoded")
