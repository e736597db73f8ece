"""The notebook: every cell runs, and what it shows is what it says."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOK = ROOT / "scripts/tour.ipynb"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has the repository's files by links, so that the tour's results do not lie in it."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", "scripts", ".venv", ".git"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "scripts").mkdir()
    for path in (ROOT / "scripts").iterdir():
        if path != NOTEBOOK:
            (tmp_path / "scripts" / path.name).symlink_to(path)
    shutil.copy(NOTEBOOK, tmp_path / "scripts/tour.ipynb")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    return tmp_path


def shown(cell: Any) -> str:
    return "".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.get("outputs", [])
    )


@pytest.mark.launch
def test_the_tour_runs_and_shows_what_it_says(clone: Path, pictures: Path) -> None:
    notebook = nbformat.read(clone / "scripts/tour.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # as committed
    first = notebook.cells[1]
    assert "EPOCHS = 20\n" in first.source
    first.source = first.source.replace("EPOCHS = 20\n", "EPOCHS = 1\n")
    shutil.copytree(pictures, clone / "scripts/runs/tour/pictures")
    NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(clone / "scripts")}}).execute()
    text = [shown(cell) for cell in notebook.cells]
    assert any("'train': 240" in part for part in text) and any("images/s" in part for part in text)
    run = clone / "scripts/runs/tour/run"
    found = json.loads((run / "linear.json").read_text())
    probed = next(part for part in text if part.startswith("untrained:"))
    assert f"trained: {found['top1']:.1f} % of 48 images" in probed
    guesses = next(part for part in text if re.match(r"\w+: \w+ [01]\.\d\d\n", part)).splitlines()
    assert len(guesses) == 4 and {guess.split(": ")[1].split()[0] for guess in guesses} <= set(found["per_class"])
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
    page = (run / "report.html").read_text()
    assert "What the model of run finds alike" in page and f"{found['top1']:.2f} (" in page
    assert os.path.relpath(run / "report.html", clone / "scripts") in json.dumps(notebook.cells[-1].outputs)
