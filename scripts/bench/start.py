"""How long does a run take to begin, and how much memory does its table of samples take, by the size of the set?

    python scripts/bench/start.py [--samples 240 1281167 100000000] [--processes 2] [--rounds 3] [--json FILE]

For each size a set is made whose table has that many rows; its tars hold one picture each, to which all rows of a
tar lead, so that the real trainer (ResNet-18 of an eighth of the width, 32 px, on the CPU) begins, reads and decodes.
Per size: seconds from the command to the end of the first step (deepspeed's launcher, the libraries and the network
are in it, and show by themselves where the set is small), and the memory of all processes of the run at its highest, a
page that several hold counted once (PSS). 100 million samples take 3.2 GB of disk, once, and about 2 minutes.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from simclr_dali.shards.command_line import file_to_write, positive_int
from simclr_dali.shards.errors import UserError, run_main

FEWEST = 32  # samples


def existing_folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return Path(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--samples", type=positive_int, nargs="+", default=[240, 1_281_167, 100_000_000], metavar="N", help="sizes of "
        "sets")  # fmt: skip
    add("--samples-per-shard", type=positive_int, default=10_000, metavar="N", help="default: 10,000")
    add("--processes", type=positive_int, default=2, metavar="N", help="ranks on this machine (default: 2)")
    add("--rounds", type=positive_int, default=3, metavar="N", help="default: 3")
    add(
        "--folder",
        type=existing_folder,
        metavar="DIR",
        help="where the sets lie meanwhile (default: the system's for such)",
    )
    add("--json", type=file_to_write, metavar="FILE", help="write the figures there too")
    given = parser.parse_args()
    if min(given.samples) < FEWEST:
        parser.error(f"--samples: a set of {min(given.samples)} is too small for a step; give at least {FEWEST}")
    return given


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before the libraries are imported

import numpy as np
import PIL.Image
import psutil

from scripts.bench.figures import extremes, in_words, machine
from scripts.quickstart import TOOLS, launcher_port
from simclr_dali.shards.manifest import SAMPLE, write_split
from simclr_dali.shards.tar import Image, write_shard

LANES = 4  # each has shards of its own to read
CONFIG: dict[str, Any] = {
    "train_batch_size": 16,
    "optimizer": {"type": "LARS", "params": {"lr": "auto"}},
    "simclr": {
        "epochs": 1,
        "warmup_epochs": 0.5,
        "image_size": 32,
        "lanes": LANES,
        "encoder": {"name": "resnet18", "width": 0.125, "stem": "7x7", "projector": [32, 16]},
        "track": [],
        "report": False,
        "log_every": 1,
    },
}
_LOOK_EVERY = 0.2  # seconds


def main(arguments: argparse.Namespace) -> None:
    found: dict[str, Any] = {"rows": {}}
    print(f"{'samples':>12} {'shards':>7} {'seconds to the first step':>28} {'memory of all processes':>34}")
    for samples in arguments.samples:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            row = measure(Path(folder), samples, arguments)
        found["rows"][str(samples)] = row
        took, memory = in_words(row["seconds"], 1), in_words(row["gigabytes"], 2)
        print(f"{samples:>12,} {row['shards']:>7,} {took:>28} {memory:>31} GB", flush=True)
    if arguments.json:
        found |= {"processes": arguments.processes, "rounds": arguments.rounds}
        found |= machine("cpu", ("torch", "deepspeed", "nvidia-dali-cuda120", "numpy"))
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(folder: Path, samples: int, arguments: argparse.Namespace) -> dict[str, Any]:
    shards = make_set(folder / "set", samples, min(arguments.samples_per_shard, samples // LANES))
    config = folder / "config.json"
    config.write_text(json.dumps(CONFIG))
    rounds = [
        begin(arguments.processes, config, folder / "set", folder / f"run-{number}")
        for number in range(arguments.rounds)
    ]
    seconds, gigabytes = zip(*rounds, strict=True)
    return {"shards": shards, "seconds": extremes(list(seconds)), "gigabytes": extremes(list(gigabytes))}


def make_set(data: Path, samples: int, per_shard: int) -> int:
    """A set without labels whose table has so many rows; how many shards it has."""
    picture = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save(picture, "JPEG")
    image = Image("one", picture.getvalue(), 64, 48, -1)
    folder = data / "train"
    folder.mkdir(parents=True)
    shards, table = [], np.empty(samples, SAMPLE)
    for number, at in enumerate(range(0, samples, per_shard)):
        rows = table[at : at + per_shard]
        shard, (row,) = write_shard(folder / f"train-{number:06d}.tar", number, [image])
        rows[:] = row
        shards.append(replace(shard, samples=len(rows)))
    write_split(folder, "train", [], shards, table, {})
    return len(shards)


def begin(processes: int, config: Path, data: Path, run: Path) -> tuple[float, float]:
    """Seconds to the end of the first step of a run, and the most memory in GB until then."""
    command = [TOOLS / "deepspeed", "--quiet", "--num_gpus", processes, *launcher_port(), ROOT / "train/pretrain.py"]
    command += ["--config", config, "--data", data, "--run", run, "--stop-after-steps", 1]
    began, most = time.monotonic(), 0.0
    with tempfile.TemporaryFile("w+") as said:
        trainer = subprocess.Popen(
            [str(word) for word in command], stdout=said, stderr=said, env={**os.environ, "DS_ACCELERATOR": "cpu"}
        )
        try:
            while not (run / "metrics.jsonl").is_file():
                if trainer.poll() is not None:
                    said.seek(0)
                    raise UserError(f"the trainer ended without a step: {said.read()[-1500:]}")
                most = max(most, memory_of(trainer.pid))
                time.sleep(_LOOK_EVERY)
            seconds = time.monotonic() - began
            most = max(most, memory_of(trainer.pid))
            trainer.wait()
        finally:
            trainer.kill()
    return seconds, most


def memory_of(pid: int) -> float:
    """Of a process and all below it, in GB; shared pages count once."""
    found = 0
    with suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                found += process.memory_full_info().pss
    return found / 1e9


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
