"""Rules of the repository that a machine can hold."""

import ast
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Folder -> folders of ours that it may import. What train and eval share lies in model or pipeline.
ARROWS = {
    "shards": set(),
    "pipeline": {"shards"},
    "model": {"shards"},
    "train": {"shards", "pipeline", "model"},
    "eval": {"shards", "pipeline", "model"},
}
# Of shards, model takes only what writes files and names mistakes: it knows nothing of packed data.
MODEL_TAKES = {"simclr_dali.shards.errors", "simclr_dali.shards.durable"}
RULES = "see 'Changing it' in README.md"
SOURCES = [path for package in (*ARROWS, "scripts", "tests") for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("package", ARROWS)
def test_packages_import_along_the_arrows_only(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        # The parity report holds torchvision against our graph, and torchvision is imported in one place.
        allowed = {"model.vision"} if path == ROOT / "scripts/parity.py" else set()
        used = {name.split(".")[0] for name in imports(path) - allowed} & ARROWS.keys()
        assert used <= ARROWS[package] | {package}, path


def test_torchvision_is_imported_in_one_place() -> None:
    users = [path for path in SOURCES if any(name.split(".")[0] == "torchvision" for name in imports(path))]
    assert users == [ROOT / "model/vision.py"]


def test_no_random_operator_inside_dali() -> None:
    for path in (ROOT / "pipeline").glob("*.py"):
        text = path.read_text()
        for name in ("fn.random", "random_resized_crop", "random_crop", "fn.jitter", "fn.noise"):
            assert name not in text, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_no_module_shadows_the_standard_library() -> None:
    import sys

    names = {path.stem for path in SOURCES} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)


def test_top_level_holds_what_it_should() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    # pyproject.toml: pip installs no folder without it.
    allowed = {*ARROWS, "scripts", "tests", "setup.cfg", "README.md", "LICENSE", "pyproject.toml"}
    assert {name for name in top if not name.startswith(".")} <= allowed
