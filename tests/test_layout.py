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
# Of shards, model takes only what writes files, names mistakes, counts cores and reads launchers: it knows nothing of
# packed data.
MODEL_TAKES = {
    f"simclr_dali.shards.{name}" for name in ("cores", "errors", "durable", "interface", "launch", "wording")
}
RULES = "see tests/README.md"
SOURCES = [path for package in (*ARROWS, "scripts", "tests") for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def against_the_arrows(package: str, imported: set[str]) -> set[str]:
    """Which of the modules that a file of ``package`` imports it may not."""
    ours = {name for name in imported if name.startswith("simclr_dali.")}
    wrong = {name for name in ours if name.split(".")[1] not in ARROWS[package] | {package}}
    if package == "model":
        wrong |= {name for name in ours if name.startswith("simclr_dali.shards") and name not in MODEL_TAKES}
    return wrong


@pytest.mark.parametrize("package", ARROWS)
def test_packages_import_along_the_arrows_only(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert any(name.startswith("simclr_dali.") for path in files for name in imports(path))
    for path in files:
        wrong = against_the_arrows(package, imports(path))
        assert not wrong, f"{path} imports {wrong}; {RULES}"


@pytest.mark.parametrize(
    ("package", "module"),
    [
        ("shards", "pipeline.order"),
        ("model", "shards.manifest"),
        ("train", "eval.linear"),
        ("pipeline", "model.ntxent"),
    ],
)
def test_what_is_against_the_arrows_is_seen(package: str, module: str) -> None:
    assert against_the_arrows(package, {f"simclr_dali.{module}", "simclr_dali.shards.errors"}) == {
        f"simclr_dali.{module}"
    }


def test_the_import_name_is_used_inside_too() -> None:
    for path in SOURCES:
        assert not {name.split(".")[0] for name in imports(path)} & ARROWS.keys(), f"{path}; {RULES}"


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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short_enough_to_read(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


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
