"""Starting the trainer in tests: a tiny configuration, with and without the deepspeed launcher."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import ROOT, TIMEOUT, run_python

TOOLS = Path(sys.executable).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

# 15 steps an epoch on the drawn pictures of the tests.
TINY: dict[str, Any] = {
    "train_batch_size": 16,
    "optimizer": {"type": "LARS", "params": {"lr": 0.01875, "trust_coefficient": 0.02}},
    "simclr": {
        "epochs": 2,
        "warmup_epochs": 1.0,
        "image_size": 32,
        "lanes": 4,
        "encoder": {"name": "resnet18", "width": 0.125, "stem": "7x7", "projector": [32, 16]},
        "track": [],
        "report": False,
        "log_every": 4,
        "checkpoint_every": 10,
        "keep_checkpoints": 2,
    },
}


def tiny_config(folder: Path) -> Path:
    path = folder / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def pretrain(config: Path, data: Path | str, run: Path, *words: Any) -> subprocess.CompletedProcess[str]:
    """One process, without the launcher."""
    arguments = ["--config", config, "--data", data, "--run", run, *words]
    return run_python(ROOT / "train/pretrain.py", *arguments)


def launch(processes: int, config: Path, data: Path, run: Path, *words: Any) -> subprocess.CompletedProcess[str]:
    """As a user starts it, by the deepspeed launcher."""
    arguments = ["--config", config, "--data", data, "--run", run, *words]
    return launch_script(processes, ROOT / "train/pretrain.py", *arguments)


def environment() -> dict[str, str]:
    """Of who activated the virtual environment, on the CPU."""
    return {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}


def free_port() -> int:
    """Below those that the system gives to whoever connects, so that none takes it before it is used."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def launcher(processes: int, *words: Any) -> list[Any]:
    """The deepspeed command on a free port."""
    return [TOOLS / "deepspeed", "--quiet", "--num_gpus", processes, "--master_port", free_port(), *words]


def launch_script(processes: int, script: Path, *words: Any) -> subprocess.CompletedProcess[str]:
    """Run any script of ours by the deepspeed launcher on the CPU."""
    return subprocess.run(
        [str(word) for word in launcher(processes, script, *words)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment(),
        check=False,
    )


def torchrun(processes: int, script: Path, *words: Any) -> subprocess.CompletedProcess[str]:
    """Run any script of ours by torch's launcher on the CPU."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    return run_python(*launcher, script, *words)


@contextmanager
def running(command: list[Any]) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own; whatever is left of it and its children is killed at the end."""
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in family(process.pid):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.communicate()


def trainer(processes: int, config: Path, data: Path, run: Path, *words: Any) -> list[Any]:
    """The command of a run, by the launcher; 0 processes: without it."""
    script = [ROOT / "train/pretrain.py", "--config", config, "--data", data, "--run", run, *words]
    return launcher(processes, *script) if processes else [sys.executable, *script]


def family(pid: int) -> list[psutil.Process]:
    """The living processes below ``pid``, the launcher's ranks among them."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def left(processes: list[psutil.Process], seconds: float) -> bool:
    """Whether all have ended, or end within that time; who has no parent any more may wait long to be buried."""
    limit = time.monotonic() + seconds
    while any(map(_runs, processes)):
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 240
) -> None:
    """Wait for ``condition``; fail where it does not come true, or ``process`` ends before."""
    limit = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None and not condition():
            raise AssertionError(f"the process ended with {process.returncode}: {process.communicate()}")
        assert time.monotonic() < limit, "it took too long"
        time.sleep(0.02)


def kill_between(state: Path, result: Path, command: list[Any], tries: int = 10) -> None:
    """Kill ``command``, which writes both files into one folder, when there is ``state`` and no ``result`` yet.

    Where it was faster than its killer, the folder is removed and it starts anew.
    """
    for _ in range(tries):
        with running(command) as process:
            while process.poll() is None and not state.is_file():
                time.sleep(0.005)
            process.kill()
            out, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), out + err
        if state.is_file() and not result.exists():
            return
        shutil.rmtree(state.parent)
    raise AssertionError(f"it was done before it could be killed, {tries} times")


def reached(run: Path, step: int) -> Callable[[], bool]:
    """Whether the metrics of ``step`` are written."""
    path = run / "metrics.jsonl"
    return lambda: path.is_file() and f'"step": {step},' in path.read_text()


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
