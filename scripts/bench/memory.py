"""What a training step takes of memory: by the images of a pass, and over many steps.

    python scripts/bench/memory.py --config ds_sqrt_b256.json --batches 64 128 256 --json FILE
    python scripts/bench/memory.py --config imagenette.json --batches 32 --steps 300

Model, engine and loss are those that train/pretrain.py builds from the config (--set works too), on random views that
lie on the device, one process. Each batch is measured in a process of its own: the highest that was taken while --steps
steps were made, and what is held after each tenth of them, which is to stay as it is (on a GPU what torch's allocator
holds; on a CPU what the process has of the machine's memory).
"""

import argparse
import json
import resource
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from simclr_dali.shards.command_line import file_to_write, positive_int
from simclr_dali.shards.errors import run_main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a JSON file, or a preset of train/configs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")
    parser.add_argument("--batches", type=positive_int, nargs="+", default=[64, 128, 256], metavar="N")
    parser.add_argument("--steps", type=positive_int, default=50, metavar="N", help="default: 50")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there too")
    parser.add_argument("--batch", type=positive_int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import torch

from scripts.bench.figures import machine
from scripts.bench.in_turn import output_of
from scripts.bench.step import peak_memory, random_views
from simclr_dali.model.ntxent import NTXent
from simclr_dali.model.process import Process
from simclr_dali.model.simclr import build_model
from simclr_dali.train.config import Config
from simclr_dali.train.config_file import load_config
from simclr_dali.train.engine import build_engine, deepspeed_config, start
from simclr_dali.train.footprint import bytes_per_image
from simclr_dali.train.micro_batches import MicroBatches
from simclr_dali.train.step import train_step

PARTS = 10
PACKAGES = ("torch", "deepspeed")


def main(given: argparse.Namespace) -> None:
    if given.batch:
        print(json.dumps(measure(given)))
        return
    rows: dict[str, dict[str, Any]] = {}
    print(f"{'batch':>6} {'peak, MB':>10} {'of an image':>12} {'kept of it':>11}   held over the steps, MB")
    for batch in given.batches:
        rows[str(batch)] = row = in_own_process(given, batch)
        held = ", ".join(f"{size / 1e6:,.0f}" for size in row["held"])
        of_image, kept = row["peak"] / batch / 1e6, row["kept_of_an_image"] / 1e6
        print(f"{batch:6} {row['peak'] / 1e6:10,.0f} {of_image:12.1f} {kept:11.1f}   {held}", flush=True)
    if given.json:
        about = {"config": given.config, "set": given.set, "steps": given.steps}
        on = machine(rows[str(given.batches[0])]["device"], PACKAGES)
        given.json.write_text(json.dumps({"batches": rows, **about, **on}, indent=1) + "\n")


def in_own_process(given: argparse.Namespace, batch: int) -> dict[str, Any]:
    words = [sys.executable, __file__, "--config", given.config, "--batch", batch, "--steps", given.steps]
    words += [word for one in given.set for word in ("--set", one)]
    found: dict[str, Any] = json.loads(output_of(words, f"batch {batch}").splitlines()[-1])
    return found


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Bytes: the peak, what is held after each part of the steps, and what train/footprint.py expects of an image."""
    batch = [f"train_batch_size={given.batch}", f"train_micro_batch_size_per_gpu={given.batch}", "simclr.lanes=1"]
    config = load_config(given.config, [*given.set, *batch, "optimizer.params.lr=auto"], "unused", "unused")
    process = start(timedelta(minutes=30))
    engine, optimizer = build_engine(build_model(config.architecture(), 0), config, process)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    views, loss, held = random_views(config, process), NTXent(config.simclr.temperature), []
    micro_batches = MicroBatches(process.device, 1)
    engine.train()
    for step in range(given.steps):
        micro_batches.begin(views)
        train_step(engine, micro_batches, loss)
        if (step + 1) * PARTS % given.steps < PARTS:
            held.append(_held(process))
    device = "gpu" if process.device.type == "cuda" else "cpu"
    return {
        "device": device,
        "peak": peak_memory(device),
        "held": held,
        "kept_of_an_image": _expected(config, process),
    }


def _held(process: Process) -> int:
    if process.device.type == "cuda":
        return torch.cuda.memory_reserved(process.device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _expected(config: Config, process: Process) -> int:
    autocast = deepspeed_config(config, process)["torch_autocast"]["enabled"]
    return bytes_per_image(config.architecture(), config.simclr.image_size, autocast=autocast)


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
