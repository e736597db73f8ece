"""Figures in the texts are those of the result files."""

import json
import shutil
from pathlib import Path

import pytest

from scripts.bench import render
from scripts.gpu_stages import STAGES, WORDS
from tests.conftest import ROOT


def test_texts_say_what_the_results_say() -> None:
    for path, text in render.rendered().items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)}: run python scripts/bench/render.py"


def copy_results(folder: Path) -> None:
    """All but those of a GPU, whose folder is empty."""
    shutil.copytree(render.RESULTS, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("gpu-check"))
    (folder / "gpu-check").mkdir()


def test_a_result_that_changes_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy_results(tmp_path)
    changed = json.loads((tmp_path / "soak.json").read_text())
    (tmp_path / "soak.json").write_text(json.dumps({**changed, "kills": 78}))
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    (different,) = (text for path, text in render.rendered().items() if path.read_text() != text)
    assert "78 kills" in different


def test_what_ran_on_a_gpu_is_a_list_by_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert list(WORDS) == [stage.name for stage in STAGES]
    copy_results(tmp_path)
    for stage, outcome in (("tests", "done"), ("step", "cut")):
        on = {"device": "gpu", "machine": "A GPU", "version": "9.1"}
        result = {"stage": stage, "outcome": outcome, "date": "2030-01-02", "words": "9 passed", "on": on}
        (tmp_path / f"gpu-check/{stage}.json").write_text(json.dumps(result))
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    readme = render.rendered()[ROOT / "README.md"]
    assert "- the tests for a GPU: **run** (A GPU, version 9.1, 2030-01-02): 9 passed\n" in readme
    assert "real input: **cut** (A GPU, version 9.1, 2030-01-02): 9 passed\n" in readme
    assert "and a probe: **not run**\n" in readme
    result["on"] = {**on, "device": "cpu"}
    (tmp_path / "gpu-check/step.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="was made on a CPU"):
        render.rendered()
