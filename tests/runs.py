"""Starting the trainer in tests: a tiny configuration, with and without the deepspeed launcher."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, TIMEOUT, run_python

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
    return run_python(ROOT / "train/pretrain.py", *arguments, env={"DS_ACCELERATOR": "cpu"})


def launch(processes: int, config: Path, data: Path, run: Path, *words: Any) -> subprocess.CompletedProcess[str]:
    """As a user starts it, by the deepspeed launcher."""
    arguments = ["--config", config, "--data", data, "--run", run, *words]
    return launch_script(processes, ROOT / "train/pretrain.py", *arguments)


def launch_script(processes: int, script: Path, *words: Any) -> subprocess.CompletedProcess[str]:
    """Run any script of ours by the deepspeed launcher on the CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tools = Path(sys.executable).parent
    command = [tools / "deepspeed", "--quiet", "--num_gpus", processes, "--master_port", port, script, *words]
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment,
        check=False,
    )


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
