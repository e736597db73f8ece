"""How fast whole training steps are, ours and others', in one run on the same pictures, network, batch and cores.

    pip install -c scripts/constraints.txt -e '.[bench]'            # lightly, for its row; the others need nothing more
    python scripts/bench/trainers.py /data/imagenette --image-size 64 --json FILE
    python scripts/bench/trainers.py /data/imagenette --device gpu --encoder resnet50 --image-size 224

FOLDER is an image folder with a train split; it is packed for our rows, with a short side of at most 9/8 of the views
where that is smaller, and all get the stored pictures. Contenders:

    ours                 train/pretrain.py's engine (DeepSpeed, LARS, NT-Xent in tiles) as it comes: compiled on a GPU,
                         decoded pictures kept where they fit
    ours, nothing kept   the same for sets that do not fit; only on a GPU, since on a CPU it is the next one
    ours, plain          the same, not compiled either
    lightly              lightly's documented SimCLR: its SimCLRTransform in a DataLoader, its NTXentLoss, SGD
    solo-learn           solo-learn's manner: its DALI pipeline (scripts/bench/rivals.py), a loss over the full matrix,
                         SGD; no rival's documentation compiles its network, so none is compiled
    solo-learn, compiled the same with its network compiled, only on a GPU
    plain                torchvision's transforms in a DataLoader, a loss over the full matrix, SGD

All train the same network (--encoder with a projector of 512 and 128) with bfloat16 autocast on a GPU and float32 on a
CPU, channels_last. Each round runs every contender as a process of its own, one after the other; all have started and
imported torch before the first one begins. Each makes a step on random views before its input begins, so that no batch
lies ready because the first step took long. After a warm-up each trains for --seconds or a little more, in whole waves
of a DataLoader's workers. Figures are medians over the rounds with the extremes; ratios ours/rival are within a round.
"""

import argparse
import importlib.util
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from simclr_dali.shards.command_line import file_to_write, positive_int, positive_number
from simclr_dali.shards.errors import UserError, run_main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="FOLDER", help="image folder; its train split is used")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="default: cpu")
    parser.add_argument("--encoder", default="resnet18", metavar="NAME", help="default: resnet18")
    parser.add_argument("--width", type=positive_number, default=1.0, metavar="W", help="of the encoder (default: 1)")
    parser.add_argument("--image-size", type=positive_int, default=64, metavar="PX", help="of a view (default: 64)")
    parser.add_argument("--batch", type=positive_int, default=64, metavar="N", help="images a step (default: 64)")
    parser.add_argument(
        "--seconds", type=positive_number, default=8.0, metavar="S", help="of training, a row and round (default: 8)"
    )
    parser.add_argument("--rounds", type=positive_int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows, and ours")
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="where to pack (default: the system's)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there too")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import torch
from torch import Tensor, nn

from scripts.bench import loss as losses
from scripts.bench import rivals
from scripts.bench.figures import Table, machine
from scripts.bench.in_turn import Waiting, in_turn
from scripts.bench.loader import pictures
from simclr_dali.model.ntxent import NTXent
from simclr_dali.model.simclr import build_model
from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.loader import central_views
from simclr_dali.train.config import LR_RULES, Config
from simclr_dali.train.engine import build_engine, start
from simclr_dali.train.job import Job, build_order, keep_decoded, view_dtype
from simclr_dali.train.micro_batches import MicroBatches
from simclr_dali.train.step import train_step

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda120", "deepspeed", "lightly")
ENDLESS = 10**6  # epochs
WARM_UP = 3  # steps
SETTINGS = ("encoder", "width", "image_size", "batch", "seconds")
Step = Callable[[], int]
"""One training step; how many images it took."""


def config_of(given: argparse.Namespace, **settings: Any) -> Config:
    """What ours trains with; the network is everybody's."""
    encoder = {"name": given.encoder, "width": given.width, "projector": [512, 128]}
    simclr = {"epochs": ENDLESS, "warmup_epochs": 0.0, "image_size": given.image_size, "encoder": encoder}
    simclr |= {"lanes": math.gcd(16, given.batch), "data": str(given.shards), **settings}
    return Config.model_validate(
        {
            "train_batch_size": given.batch,
            "torch_autocast": {"enabled": True},
            "optimizer": {"type": "LARS", "params": {"lr": LR_RULES["linear"](given.batch)}},
            "simclr": simclr,
        }
    )


def ours(given: argparse.Namespace, **settings: Any) -> Step:
    config = config_of(given, **settings)
    process = start(timedelta(minutes=30))
    engine, _ = build_engine(build_model(config.architecture(), 0), config, process)
    split = Split.local(given.shards, "train")
    kept, _ = keep_decoded(config, split.shards, process, ENDLESS)
    job = Job(config, split, build_order(config, split.shards), process, Path("unused"), kept)
    if kept:  # what the first epoch does
        for _ in central_views(split, replace(job.loader_config(), size=32), batch=given.batch, kept=kept):
            pass
    views, loss = (batch.views for batch in job.views()), NTXent(config.simclr.temperature)
    micro_batches = MicroBatches(process.device, 1)
    engine.train()

    def step(views: Iterator[Tensor] = views) -> int:
        micro_batches.begin(views)
        train_step(engine, micro_batches, loss)
        return int(given.batch)

    step(iter([random_views(given, process.device, view_dtype(config, process.device))]))
    if engine.compiled_by and engine.compiled_by.failed:
        raise UserError("the network could not be compiled, as the warning above says")

    return step


def random_views(given: argparse.Namespace, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    size = given.image_size
    return torch.randn(2 * given.batch, size, size, 3, device=device, dtype=dtype).permute(0, 3, 1, 2)


def rival(given: argparse.Namespace, views: Iterator[Tensor], loss: losses.Loss, *, compiled: bool = False) -> Step:
    """The loop of a tutorial, with the precision and the memory format that ours has. ``views`` begin when the first
    is asked for."""
    device = torch.device("cuda", 0) if given.device == "gpu" else torch.device("cpu")
    network: nn.Module = build_model(config_of(given).architecture(), 0)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
    network.train()
    if compiled:
        network.compile(dynamic=False)

    def step(views: Iterator[Tensor] = views) -> int:
        images = next(views).to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            z = network(images)
        value = loss(*z.float().chunk(2))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return len(images) // 2

    step(iter([random_views(given, device)]))
    return step


CONTENDERS: dict[str, Callable[[argparse.Namespace, rivals.Given], Step]] = {
    "ours": lambda given, _: ours(given),
    "ours, nothing kept": lambda given, _: ours(given, keep_decoded="no"),
    "ours, plain": lambda given, _: ours(given, compile="no", keep_decoded="no"),
    "lightly": lambda given, asked: rival(given, rivals.lightly(asked), losses.lightly()),
    "solo-learn": lambda given, asked: rival(given, rivals.solo_learn(asked), losses.full_matrix()),
    "solo-learn, compiled": lambda given, asked: rival(
        given, rivals.solo_learn(asked), losses.full_matrix(), compiled=True
    ),
    "plain": lambda given, asked: rival(given, rivals.torchvision_v1(asked), losses.full_matrix()),
}
ON_A_GPU = ("ours, nothing kept", "solo-learn, compiled")


def main(given: argparse.Namespace) -> None:
    if given.contender:
        print(json.dumps(images_per_s(given)))
        return
    if given.device == "gpu" and not torch.cuda.is_available():
        raise UserError("--device is gpu, and torch sees no GPU here; give --device cpu")
    rows = [row for row in CONTENDERS if given.device == "gpu" or row not in ON_A_GPU]
    if unknown := [row for row in given.only or [] if row not in rows]:
        raise UserError(f"--only {unknown[0]} is none of the rows: {'; '.join(rows)}")
    rows = [row for row in rows if not given.only or row == "ours" or row in given.only]
    if not importlib.util.find_spec("lightly") and "lightly" in rows:
        rows.remove("lightly")
        print("lightly is not installed, so its row is left out: pip install -e '.[bench]'", file=sys.stderr)
    table = Table(rows)
    on = machine(given.device, PACKAGES)
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        images, shards = pictures(given.images, 9 * given.image_size // 8, Path(scratch))
        print(
            f"{on['machine']}, {on['cores']} cores, {given.encoder} of width {given.width:g} at {given.image_size} px, "
            f"batch {given.batch}, {given.rounds} rounds of {given.seconds:g} s"
        )
        about = {name: getattr(given, name) for name in (*SETTINGS, "rounds")}
        about |= {
            "stored": 9 * given.image_size // 8,
            "images": len(Split.local(shards, "train").shards),
            "precision": "bfloat16 autocast" if given.device == "gpu" else "float32",
        }
        for _ in range(given.rounds):
            for row, found in in_turn({row: command(given, images, shards, row) for row in rows}):
                table.add(row, found)
                if given.json:  # after each, since the next may take long
                    given.json.write_text(json.dumps({**table.result(), **about, **on}, indent=1) + "\n")
    table.print()


def command(given: argparse.Namespace, images: Path, shards: Path, row: str) -> list[Any]:
    """What measures a row."""
    words = [sys.executable, __file__, images, "--contender", row, "--shards", shards]
    for name in ("device", *SETTINGS):
        words += [f"--{name.replace('_', '-')}", getattr(given, name)]
    return words


def images_per_s(given: argparse.Namespace) -> float:
    if given.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    Waiting.until_told()
    cores = len(os.sched_getaffinity(0))
    device = torch.device("cuda", 0) if given.device == "gpu" else torch.device("cpu")
    asked = rivals.Given(given.images, given.shards, device, given.batch, cores, given.image_size, wave=given.batch)
    step = CONTENDERS[given.contender](given, asked)
    # Workers of a DataLoader deliver together, one batch each.
    wave = cores if given.contender in ("lightly", "plain") else 1
    for _ in range(max(WARM_UP, wave)):
        step()
    _wait(device)
    images, steps, started = 0, 0, time.perf_counter()
    while time.perf_counter() - started < given.seconds or steps % wave:
        images += step()
        steps += 1
    _wait(device)
    return images / (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
