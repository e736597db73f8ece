"""One name in the world: what is installed, what is imported, and from where commands run."""

import argparse
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import simclr_dali
from simclr_dali.__main__ import COMMANDS, visible_gpus
from tests.conftest import ROOT, TIMEOUT, assert_sentence, run_command, run_python
from tests.runs import TOOLS, environment, free_port, tiny_config

CODE = (".package", "eval", "model", "pipeline", "scripts", "shards", "train", "README.md", "LICENSE", "setup.cfg")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository in another folder, not installed."""
    target = tmp_path_factory.mktemp("clone") / "simclr"
    target.mkdir()
    for name in (*CODE, "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    return target


def run(*words: Any, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=TIMEOUT, cwd=cwd, check=False,
        env={**environment(), **env},
    )  # fmt: skip


def decoys(folder: Path) -> Path:
    """A working folder with names that the project's folders have."""
    folder.mkdir()
    for name in ("model", "shards"):
        (folder / name).mkdir()
    for name in ("train.py", "eval.py", "pipeline.py"):
        (folder / name).write_text("raise ImportError('this file is the user\\'s')\n")
    return folder


def test_a_wheel_claims_one_top_level_name_and_builds_from_a_clone(clone: Path, tmp_path: Path) -> None:
    done = run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", tmp_path, clone,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert {name.split("/")[0] for name in names} == {
        "simclr_dali", f"simclr_dali-{simclr_dali.__version__}.dist-info",
    }  # fmt: skip
    ours = {str(path.relative_to(ROOT)) for room in CODE[1:7] if room != "scripts" for path in (ROOT / room).rglob("*")}
    wanted = {name for name in ours if name.endswith((".py", ".json"))}
    assert {f"simclr_dali/{name}" for name in wanted} <= set(names) and "simclr_dali/py.typed" in names
    # As installed, without the clone on the path, beside the user's own files.
    here, installed = decoys(tmp_path / "here"), str(tmp_path / "installed")
    code = "import simclr_dali; from simclr_dali import load; print(simclr_dali.__file__, load.__module__)"
    done = run(sys.executable, "-c", code, cwd=here, PYTHONPATH=installed)
    assert done.stdout.split() == [f"{installed}/simclr_dali/__init__.py", "simclr_dali.eval.inference"], done.stderr
    done = run(sys.executable, "-m", "simclr_dali", "knn", "--help", cwd=here, PYTHONPATH=installed)
    assert done.returncode == 0 and "k nearest neighbours" in done.stdout, done.stderr


def test_files_of_the_working_folder_do_not_shadow_ours(tmp_path: Path) -> None:
    here = decoys(tmp_path / "here")
    code = "from simclr_dali import load; from simclr_dali.train.loop import train; print(load, train)"
    done = run_python("-c", code, cwd=here)
    assert done.returncode == 0, done.stderr
    for script in ("eval/knn.py", "train/pretrain.py"):
        assert run_python(ROOT / script, "--help", cwd=here).returncode == 0


@pytest.mark.launch
def test_the_three_commands_run_in_a_clone_that_is_not_installed(clone: Path, pictures: Path, tmp_path: Path) -> None:
    """From another folder, with names of ours in it; an installed copy does not win over the clone."""
    here = decoys(tmp_path / "here")
    packed, run_folder = tmp_path / "packed", tmp_path / "run"
    done = run(clone / "scripts/make_shards.sh", pictures, packed, "--samples-per-shard", 40, cwd=here)
    assert done.returncode == 0, done.stderr
    words = ["--config", tiny_config(tmp_path), "--data", packed, "--run", run_folder, "--stop-after-steps", 2]
    launcher = [TOOLS / "deepspeed", "--quiet", "--num_gpus", 1, "--master_port", free_port()]
    done = run(*launcher, clone / "train/pretrain.py", *words, cwd=here)
    assert done.returncode == 0 and "is at step 2" in done.stdout, done.stderr
    broken = clone / "eval/knn.py"
    done = run(sys.executable, clone / "eval/linear.py", "--ckpt", run_folder, cwd=here)
    assert done.returncode == 0 and "on 48 images" in done.stdout, done.stderr
    broken.write_text(broken.read_text().replace('"protocol": "knn"', '"protocol": "the clone\'s"'))
    assert run(sys.executable, broken, "--ckpt", run_folder, "--k", 5, cwd=here).returncode == 0
    assert "the clone's" in (run_folder / "knn.json").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_answers_help_without_torch(name: str, tmp_path: Path) -> None:
    """Importing torch, DALI or DeepSpeed takes seconds; nobody waits for them to read a help text."""
    code = (
        "import runpy, sys; sys.argv = ['simclr-dali', *sys.argv[1:]]\n"
        "try: runpy.run_module('simclr_dali', run_name='__main__')\n"
        "finally: print('imported:', sorted({'torch', 'nvidia', 'deepspeed', 'torchvision'} & sys.modules.keys()))"
    )
    done = run_python("-c", code, name, "--help", cwd=tmp_path)
    assert done.returncode == 0 and "usage: simclr-dali " + name in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "imported: []"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples_first_and_says_of_each_option_a_sentence(name: str, tmp_path: Path) -> None:
    code = (
        "import argparse, json, runpy, sys; sys.argv = ['simclr-dali', *sys.argv[1:]]\n"
        "def told(parser, *_):\n"
        "    print(json.dumps({str(a.option_strings or a.dest): a.help for a in parser._actions}))\n"
        "    print(parser.format_help()); sys.exit()\n"
        "argparse.ArgumentParser.parse_args = told\n"
        "runpy.run_module('simclr_dali', run_name='__main__')\n"
    )
    done = run_python("-c", code, name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    described, _, text = done.stdout.partition("\n")
    told = {option: said for option, said in json.loads(described).items() if said != argparse.SUPPRESS}
    wrong = {
        option: said
        for option, said in told.items()
        if not (said and said[0].isupper() and said.endswith(".") and "%" not in said)
    }
    assert not wrong and len(told) >= 2
    usage, _, rest = text.partition("\n\n")
    assert usage.startswith(f"usage: simclr-dali {name}") and usage.endswith("[OPTION ...]")
    assert rest.index("examples:") < rest.index("options:")
    assert max(map(len, text.splitlines())) <= 120
    if "--prefix" in text:
        assert text.index("options:") < text.index("weights of other libraries:") < text.index("--prefix")


def test_the_command_names_its_version_and_what_it_can_do(tmp_path: Path) -> None:
    console = run(TOOLS / "simclr-dali", "--version", cwd=tmp_path)
    assert console.stdout == f"simclr-dali {simclr_dali.__version__}\n", console.stderr
    usage = run_command(cwd=tmp_path)
    assert usage.returncode == 0 and all(f"  {name} " in usage.stdout for name in COMMANDS)
    wrong = run_command("pretrian", cwd=tmp_path)
    assert wrong.returncode == 2 and "did you mean pretrain?" in wrong.stderr


@pytest.mark.launch
def test_pretrain_starts_the_launcher_and_hands_its_options_on(packed: Path, tmp_path: Path) -> None:
    words = ["--config", tiny_config(tmp_path), "--data", packed, "--run", tmp_path / "run", "--stop-after-steps", 1]
    done = run_command("pretrain", "--num_gpus", 2, "--master_port", free_port(), *words, cwd=tmp_path)
    assert done.returncode == 0 and "2 x cpu" in done.stdout, done.stderr


@pytest.mark.launch
@pytest.mark.parametrize("options", [[], ["--num_gpus", 1]])
def test_one_process_needs_no_launcher(options: list[Any], packed: Path, tmp_path: Path) -> None:
    words = ["--config", tiny_config(tmp_path), "--data", packed, "--run", tmp_path / "run", "--stop-after-steps", 1]
    done = run_command("pretrain", *options, *words, cwd=tmp_path)
    assert done.returncode == 0 and "1 x cpu" in done.stdout, done.stderr
    assert "launch" not in done.stdout + done.stderr


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_number_of_processes_that_cannot_be_is_refused(number: str, tmp_path: Path) -> None:
    done = run_command("pretrain", f"--num_gpus={number}", "--config", tiny_config(tmp_path), cwd=tmp_path)
    assert_sentence(done, f"--num_gpus is {number!r}")


@pytest.mark.parametrize(
    ("environment", "count"),
    [({"CUDA_VISIBLE_DEVICES": "0,3"}, 2), ({"CUDA_VISIBLE_DEVICES": ""}, 0), ({"DS_ACCELERATOR": "cpu"}, 0)],
)
def test_visible_gpus(environment: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert visible_gpus() == count


def test_mistakes_are_answered_before_anything_is_imported(tmp_path: Path) -> None:
    done = run_command("linear", "--ckpt", tmp_path, "--protocol", "slow", cwd=tmp_path)
    assert done.returncode == 2 and "invalid choice: 'slow'" in done.stderr
