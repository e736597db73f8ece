"""Every command of the README files, run as it stands there but for the names of what a reader has."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import PIL.Image
import pytest
import torch

from tests.conftest import ROOT, TIMEOUT, run_command, run_python
from tests.runs import TINY, TOOLS, environment, free_port

# In the order in which someone reads them, and makes what the next one uses.
DOCUMENTS = [
    "README.md",
    *(f"{folder}/README.md" for folder in ("shards", "train", "eval", "pipeline", "model", "tests")),
]
DOCUMENTS.insert(3, "train/GUIDES.md")
COMMANDS = list(
    dict.fromkeys(
        line.split("  #")[0].strip()
        for path in DOCUMENTS
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / path).read_text(), flags=re.S)
        for line in block.splitlines()
        if line.strip()
    )
)
# They set up an environment and use it; other tests, and whoever runs this one, run them.
ELSEWHERE = ("scripts/quickstart.sh", "scripts/test.sh", "scripts/gpu_check.sh")
# What is long or large at its own settings is asked for less.
SMALLER = {
    "train/pretrain.py": "--stop-after-steps 2",
    "--protocol mmpretrain-lars-90e": "--epochs 1 --train-batch 16",
    "--fraction 0.01": "--fraction 0.2 --epochs 1 --train-batch 16",
    "eval/knn.py": "--k 5 20",
    "eval/nearest.py": "--count 4",
    "scripts/parity.py": "--most 2 --draws 2",
    "scripts/bench/stages.py": "--images 16 --batch 8 --rounds 1 --size 32",
    "scripts/make_shards.sh": "--samples-per-shard 40",
    "--format timm": "--format safetensors",  # timm has no network of an eighth of the width
}


@pytest.fixture(scope="module")
def reader(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which someone follows the README, with pictures where they keep ImageNet."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(pictures, folder / "data")
    (folder / "holiday").mkdir()
    for name in ("bird.jpg", "holiday/1.jpg", "holiday/2.jpg"):
        PIL.Image.effect_noise((90, 70), 80).convert("RGB").save(folder / name)
    for number, path in enumerate(sorted((pictures / "train").rglob("*.jpg"))):
        (folder / f"pictures/roll {number % 3}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"pictures/roll {number % 3}/{number}.jpg")
    config = {**TINY, "simclr": {**TINY["simclr"], "data": str(folder / "data-shards")}}
    for name in ("ds_lars.json", "ds_sqrt_b256.json"):
        (folder / name).write_text(json.dumps(config))
    return folder


def adapted(command: str, folder: Path) -> str:
    for mark, smaller in SMALLER.items():
        if mark in command:
            same_option = smaller.split(" ")[0] == mark.split(" ")[0]
            command = command.replace(mark, smaller) if same_option else f"{command} {smaller}"
    command = command.replace("/data/imagenette", "DATA").replace("/data/imagenet", "DATA")
    command = command.replace("DATA", str(folder / "data")).replace("~/pictures", str(folder / "pictures"))
    command = re.sub(r"\b(scripts|train|eval)/", rf"{ROOT}/\1/", command)
    return command.replace("deepspeed ", f"deepspeed --quiet --num_gpus 1 --master_port {free_port()} ")


@pytest.mark.launch
def test_every_command_of_the_readme_runs_as_it_stands(reader: Path) -> None:
    assert len(COMMANDS) > 15
    path = f"{TOOLS}:{os.environ['PATH']}"
    for command in COMMANDS:
        if command.startswith(ELSEWHERE):
            continue
        first, *words = shlex.split(adapted(command, reader))
        if first in ("python", "simclr-dali"):
            done = run_python(*words, cwd=reader) if first == "python" else run_command(*words, cwd=reader)
        else:
            done = subprocess.run(
                [first, *words], capture_output=True, text=True, timeout=TIMEOUT, cwd=reader,
                env={**environment(), "PATH": path}, check=False,
            )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{adapted(command, reader)}\n{done.stdout}\n{done.stderr}"


def test_the_readmes_lines_of_python_run(
    run: Path, packed: Path, reader: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader's example as it stands, on two CPU threads and for one batch."""
    front, load, loss, loader = (
        block
        for path in ("README.md", "eval/README.md", "model/README.md", "pipeline/README.md")
        for block in re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), flags=re.S)
    )
    names = {"images": torch.zeros(2, 3, 64, 64, dtype=torch.uint8)}
    assert run_python(ROOT / "eval/linear.py", "--ckpt", run).returncode == 0
    monkeypatch.chdir(reader)
    for lines in (front, load, loss):
        exec(lines.replace("runs/ds_lars", str(run)), names)
    small = loader.replace("/data/imagenet-shards", str(packed)).replace("global_batch=4096", "global_batch=64")
    small = small.replace('torch.device("cuda", 0)', 'torch.device("cpu")').replace("    ...\n", "    break\n")
    small = small.replace("LoaderConfig(224", "LoaderConfig(32").replace("world=8", "world=4")
    exec(small, names)
    assert names["views"].shape == (2 * 16, 3, 32, 32)


@pytest.mark.parametrize("path", [*DOCUMENTS, "scripts/bench/README.md"])
def test_files_that_are_named_are_there(path: str) -> None:
    text = (ROOT / path).read_text()
    named = re.findall(r"`((?:shards|pipeline|model|train|eval|scripts|tests|\.package)/[\w/.\-]+)`", text)
    linked = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    for name in named:
        assert (ROOT / name).exists(), name
    for link in linked:
        assert (ROOT / path).parent.joinpath(link).exists(), link


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
