"""Pictures, packed sets and helper processes shared by the tests."""

import atexit
import functools
import hashlib
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _take_own_cores() -> None:
    """Test processes that run side by side share the cores out, and so does all that they start."""
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    cores = sorted(os.sched_getaffinity(0))
    if worker.startswith("gw") and workers <= len(cores):
        os.sched_setaffinity(0, cores[int(worker[2:]) :: workers])


_take_own_cores()  # before the libraries count them

import numpy as np
import PIL.Image
import pytest
import torch
import torch.distributed
from torch.multiprocessing.spawn import start_processes

if not torch.cuda.is_available():  # read when Triton is first imported, by whomever
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / ".package")]

import simclr_dali.model.vision
from scripts.draw_pictures import draw_set
from simclr_dali.shards.manifest import ShardSet, load_split
from simclr_dali.shards.pack import pack
from simclr_dali.shards.plan import Options
from tests.zygote import Zygote

TIMEOUT = 240  # seconds for one process that a test starts

# A shell inside a launched job must not make ranks of the processes that tests start.
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_SIZE"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn image folder: 12 classes, 20 pictures each in train, 4 in val, 96 x 96 pixels."""
    folder = tmp_path_factory.mktemp("pictures") / "set"
    draw_set(folder, train_per_class=20, val_per_class=4)
    return folder


@pytest.fixture(scope="session")
def packed(pictures: Path) -> Path:
    """``pictures`` packed into shards of about 40."""
    out = pictures.with_name("packed")
    pack(pictures, out, Options(samples_per_shard=40), workers=2)
    return out


@pytest.fixture(scope="session")
def trained(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run on ``packed``, stopped after 8 steps. Whoever writes into it takes a copy: ``run``."""
    from tests.runs import pretrain, tiny_config

    folder = tmp_path_factory.mktemp("trained")
    done = pretrain(tiny_config(folder), packed, folder / "run", "--stop-after-steps", 8)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def run(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of ``trained`` for the tests of one file."""
    return Path(shutil.copytree(trained, tmp_path_factory.mktemp("copied") / "run"))


@pytest.fixture(scope="session")
def train_split(packed: Path) -> ShardSet:
    return load_split(packed, "train")


@pytest.fixture
def odd_pictures(tmp_path: Path) -> Path:
    """An image folder of random sizes and aspects, so that a mix-up of width and height shows."""
    random = np.random.default_rng(7)
    for split, count in (("train", 12), ("val", 4)):
        for label in ("a", "b"):
            folder = tmp_path / "odd" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = random.integers(20, 150, 2)
                coarse = PIL.Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
                coarse.resize((int(width), int(height))).save(folder / f"{number}.JPEG", quality=95)
    return tmp_path / "odd"


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def later(path: Path) -> None:
    """Make it a second younger: some kernels count time in steps of 10 ms, and a test is faster."""
    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))


def originals(folder: Path, split: str) -> dict[bytes, str]:
    return {path.read_bytes(): path.parent.name for path in (folder / split).rglob("*.*")}


@functools.cache
def zygote() -> Zygote:
    """This test process's own; it ends with it."""
    started = Zygote({**os.environ, "DS_ACCELERATOR": "cpu"})
    atexit.register(started.close)
    return started


def run_python(*words: Any, env: dict[str, str] | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the interpreter on ``words``, on the CPU unless ``env`` says otherwise; its output is kept.

    A script, or a module, runs in a fork of one process that has imported the libraries (tests.zygote), unless it has
    an environment of its own.
    """
    command = [sys.executable, *map(str, words)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", **(env or {})}
    if env is None and (command[1].endswith(".py") or command[1:2] == ["-m"]):
        return zygote().run(command[1:], cwd, environment, TIMEOUT)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, env=environment, cwd=cwd, check=False
    )


def run_command(*words: Any, env: dict[str, str] | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run ``simclr-dali`` with ``words``, as :func:`run_python` runs the interpreter."""
    return run_python("-m", "simclr_dali", *words, env=env, cwd=cwd)


def assert_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The process ended as for a mistake of the user: exit code 2, one line that has all ``words``, no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: "), done.stderr
    for word in words:
        assert word in line


def on_small_disk(kilobytes: int, script: str) -> subprocess.CompletedProcess[str]:
    """Run ``script`` in a mount namespace where /mnt is a tmpfs of that size; skip where that is not allowed."""
    if any(path.startswith("/mnt/") for path in (str(ROOT), sys.executable, tempfile.gettempdir())):
        pytest.skip("a small disk on /mnt would hide the code, the interpreter or the data")
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs /mnt"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no permission for a mount namespace")
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{mount} && {script}"],
        capture_output=True, text=True, timeout=120, cwd=ROOT, check=False,
    )  # fmt: skip


@functools.cache
def fork_server() -> Any:
    """A context of processes that have imported the libraries and our own modules (tests.preload)."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / '.package'}"  # its only way to find them
    try:
        multiprocessing.set_forkserver_preload(["tests.preload", "tests.test_kills"])
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return multiprocessing.get_context("forkserver")


def run_ranks(function: Callable[..., Any], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """Call ``function(rank, *arguments)`` in ``world`` processes joined by gloo; return their results by rank."""
    fork_server()
    start_processes(_rank_main, (function, world, str(folder), arguments), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"result-{world}-{rank}.pt", weights_only=False) for rank in range(world)]


def _rank_main(rank: int, function: Callable[..., Any], world: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # which DeepSpeed asks for
    store = f"file://{folder}/store-{world}-{function.__name__}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        torch.save(function(rank, *arguments), f"{folder}/result-{world}-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
