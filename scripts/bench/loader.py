"""How fast the input pipeline is, against the ways others feed SimCLR, all in one run on the same images and cores.

    pip install -c scripts/constraints.txt -e '.[bench]'            # lightly, for its row; the others need nothing more
    python scripts/bench/loader.py /data/imagenet --json FILE
    python scripts/bench/loader.py /data/imagenet --device gpu      # rows of our own settings too

FOLDER is an image folder with a train split; it is packed for our row. Each round runs every contender (what each is:
scripts/bench/rivals.py) as a process of its own, one after the other: after the warm-up batches it takes --images
images out of the endless stream, in whole batches, and counts the time between receiving the last warm-up batch and
the last batch (on a GPU: until its pixels are there). Figures are medians over the rounds with the extremes; ratios
ours/rival are taken within a round.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from simclr_dali.shards.command_line import file_to_write, positive_int
from simclr_dali.shards.errors import UserError, run_main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="FOLDER", help="image folder; its train split is used")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="where views are made (default: cpu)")
    parser.add_argument("--batch", type=positive_int, default=64, metavar="N", help="images a batch (default: 64)")
    parser.add_argument(
        "--images", dest="count", type=positive_int, default=1024, metavar="N", help="measured a round (default: 1024)"
    )
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="where to pack (default: the system's)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there too")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tuning", default="{}", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import torch

from scripts.bench.figures import extremes, machine, spread
from scripts.bench.rivals import CONTENDERS
from simclr_dali.shards.pack import pack
from simclr_dali.shards.plan import Options

WARM_UP = 16  # batches; until then DALI's buffers still grow to the largest images, and workers start
# What a GPU changes is for measuring: each is one more row beside "ours".
GPU_TUNINGS: dict[str, dict[str, Any]] = {
    **{f"engine share {share:g}": {"engine_share": share} for share in (0.0, 0.65, 0.85, 1.0)},
    "decode whole": {"region": False},
    "conditionals": {"conditionals": True},
    "prefetch 2": {"prefetch": 2},
    "half the threads": {"threads": max(1, (os.cpu_count() or 2) // 2)},
}
PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda120", "lightly", "Pillow")


def main(given: argparse.Namespace) -> None:
    if given.contender:
        print(json.dumps(images_per_s(given)))
        return
    names = [name for name in CONTENDERS if name != "lightly" or importlib.util.find_spec("lightly")]
    if "lightly" not in names:
        print("lightly is not installed, so its row is left out: pip install -e '.[bench]'", file=sys.stderr)
    tunings = GPU_TUNINGS if given.device == "gpu" else {}
    rows: dict[str, list[float]] = {name: [] for name in (*names, *(f"ours, {name}" for name in tunings))}
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        shards = Path(scratch) / "shards"
        pack(given.images, shards, Options(samples_per_shard=100))
        for _ in range(given.rounds):
            for row in rows:
                contender, _, tuning = row.partition(", ")
                rows[row].append(measure(given, shards, contender, tunings.get(tuning, {})))
    report(given, rows)


def measure(given: argparse.Namespace, shards: Path, contender: str, tuning: dict[str, Any]) -> float:
    """images/s of one contender in a process of its own."""
    command: list[Any] = [
        sys.executable, __file__, given.images, "--contender", contender, "--shards", shards, "--tuning",
        json.dumps(tuning), "--device", given.device, "--batch", given.batch, "--images", given.count,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{contender} failed: {done.stderr[-1500:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def images_per_s(given: argparse.Namespace) -> float:
    device = torch.device("cuda", 0) if given.device == "gpu" else torch.device("cpu")
    torch.set_num_threads(1)  # the cores belong to the loaders; only the concatenation of views runs here
    stream = CONTENDERS[given.contender](
        given.images, given.shards, device, given.batch, len(os.sched_getaffinity(0)), **json.loads(given.tuning)
    )
    for _ in range(WARM_UP):
        check(next(stream), given)
    started = time.perf_counter()
    batches = -(-given.count // given.batch)
    for _ in range(batches):
        views = next(stream)
    if given.device == "gpu":
        torch.cuda.synchronize()
    taken = time.perf_counter() - started
    check(views, given)
    return batches * given.batch / taken


def check(views: torch.Tensor, given: argparse.Namespace) -> None:
    """The output that all have to deliver; a contender that does not would be measured for less work."""
    assert views.shape == (2 * given.batch, 3, 224, 224), views.shape
    assert views.dtype in (torch.float32, torch.float16) and views.is_cuda == (given.device == "gpu")
    assert abs(views.float().mean()) < 1 and 0.5 < views.float().std() < 2


def report(given: argparse.Namespace, rows: dict[str, list[float]]) -> None:
    on = machine(given.device, PACKAGES)
    print(
        f"{on['machine']}, {on['cores']} cores, batch {given.batch}, {given.rounds} rounds of {given.count} "
        f"images: {given.images}"
    )
    ratios = {}
    print(f"{'':28} {'images/s':>24} {'ours is faster by':>22}")
    for name, rates in rows.items():
        against = [ours / rate for ours, rate in zip(rows["ours"], rates, strict=True)]
        ratios[name] = extremes(against)
        faster = "" if name == "ours" else spread(against, 2)
        print(f"{name:28} {spread(rates, 1):>24} {faster:>22}")
    if given.json:
        result = {
            "ratios": {name: ratio for name, ratio in ratios.items() if name != "ours"},
            "images_per_s": {name: extremes(rates) for name, rates in rows.items()},
            "batch": given.batch,
            "rounds": given.rounds,
            **on,
        }
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
