"""How fast the input pipeline is, against the ways others feed SimCLR, all in one run on the same images and cores.

    pip install -c scripts/constraints.txt -e '.[bench]'            # lightly, for its row; the others need nothing more
    python scripts/bench/loader.py /data/imagenet --json FILE
    python scripts/bench/loader.py /data/imagenet --stored 32 64 144               # the same pictures made smaller, too
    python scripts/bench/loader.py /data/imagenet --device gpu --seconds 2 --rounds 1    # rows of our own settings, too
    python scripts/bench/loader.py /data/imagenet --only ours solo-learn

FOLDER is an image folder with a train split; it is packed for our rows. Each round runs every contender (what each is:
scripts/bench/rivals.py) as a process of its own, one after the other: all have started and imported torch and DALI
before the first one begins, and each has warmed up before it is measured. It then counts the images of whole batches
that it takes out of the endless stream in --seconds or a little more (on a GPU: until their pixels are there). Figures
are medians over the rounds with the extremes; ratios ours/rival are taken within a round.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from simclr_dali.shards.command_line import file_to_write, positive_int, positive_number
from simclr_dali.shards.errors import UserError, run_main

# Side of the views, by that of the stored pictures; 224 for larger ones.
VIEWS = {32: 32, 64: 64, 144: 128}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="FOLDER", help="image folder; its train split is used")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="where views are made (default: cpu)")
    parser.add_argument("--batch", type=positive_int, default=64, metavar="N", help="images a batch (default: 64)")
    parser.add_argument(
        "--seconds",
        type=positive_number,
        default=8.0,
        metavar="S",
        help="that a row is measured in each round (default: 8)",
    )
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="rows whose names hold one of these words; and ours, for the ratios"
    )
    parser.add_argument(
        "--stored", type=positive_int, nargs="+", default=[], metavar="PX",
        help="tables of the pictures made smaller, too, to a short side of 32, 64, 144 or 224 pixels, say",
    )  # fmt: skip
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="where to pack (default: the system's)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there too")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--view", type=positive_int, default=224, help=argparse.SUPPRESS)
    parser.add_argument("--tuning", default="{}", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import torch

from scripts.bench.figures import Table, machine
from scripts.bench.in_turn import Waiting, in_turn
from scripts.bench.rivals import CONTENDERS, WAVE, Given
from simclr_dali.pipeline.files import Split
from simclr_dali.shards.image import ending_of_image
from simclr_dali.shards.pack import pack
from simclr_dali.shards.plan import Options

WARM_UP = 16  # batches; until then DALI's buffers still grow to the largest images, and workers start
# What is ours to choose: each is one more row beside "ours".
TUNINGS: dict[str, dict[str, Any]] = {"decoded kept": {"keep_decoded": "auto"}}
GPU_TUNINGS: dict[str, dict[str, Any]] = {
    **{f"engine share {share:g}": {"engine_share": share} for share in (0.0, 0.65, 0.75, 0.85, 1.0)},
    "decoded kept in host memory": {"keep_decoded": "host"},
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
    rows = chosen_rows(given.only, given.device)
    on = machine(given.device, PACKAGES)
    print(f"{on['machine']}, {on['cores']} cores, batch {given.batch}, {given.rounds} rounds of {given.seconds:g} s")
    tables: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        for stored in [None, *given.stored]:
            name = f"{stored} px" if stored else "as they are"
            images, shards = pictures(given.images, stored, Path(scratch) / name)
            view = VIEWS.get(stored or 0, 224)
            print(f"{given.images}, {name}, views of {view} px")
            table = Table(rows)
            for _ in range(given.rounds):
                for row, found in in_turn(commands(given, images, shards, view, rows)):
                    table.add(row, found)
                    tables[name] = table.result()
                    write(given, tables, on)  # after each, since the next may take long
            table.print()


def write(given: argparse.Namespace, tables: dict[str, dict[str, Any]], on: dict[str, Any]) -> None:
    if given.json:
        first, *others = tables
        result = {**tables[first], "stored": {name: tables[name] for name in others}}
        result |= {"batch": given.batch, "rounds": given.rounds, "seconds": given.seconds, **on}
        given.json.write_text(json.dumps(result, indent=2) + "\n")


def chosen_rows(only: list[str] | None, device: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Contender and its settings by row. Raises UserError where ``only`` names none."""
    rows: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in CONTENDERS}
    tunings = {**TUNINGS, **(GPU_TUNINGS if device == "gpu" else {})}
    rows |= {f"ours, {name}": ("ours", tuning) for name, tuning in tunings.items()}
    if not importlib.util.find_spec("lightly"):
        del rows["lightly"]
        print("lightly is not installed, so its row is left out: pip install -e '.[bench]'", file=sys.stderr)
    if only:
        kept = [row for row in rows if any(word in row for word in only)]
        if not kept:
            raise UserError(f"--only {' '.join(only)} names none of the rows: {'; '.join(rows)}")
        rows = {row: rows[row] for row in rows if row == "ours" or row in kept}
    return rows


def pictures(images: Path, stored: int | None, scratch: Path) -> tuple[Path, Path]:
    """A folder of pictures, made smaller where ``stored`` says so, and the same packed."""
    shards = scratch / "shards"
    pack(images, shards, Options(samples_per_shard=100, resize=stored))
    if stored is None:
        return images, shards
    split = Split.local(shards, "train").shards
    smaller = scratch / "pictures"
    for sample, row in enumerate(split.samples):
        with (split.folder / split.shards[row["shard"]].name).open("rb") as tar:
            tar.seek(int(row["offset"]))
            encoded = tar.read(int(row["length"]))
        folder = smaller / "train" / (split.class_name(int(row["label"])) or "pictures")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{sample:08d}.{ending_of_image(encoded)}").write_bytes(encoded)
    return smaller, shards


def commands(
    given: argparse.Namespace, images: Path, shards: Path, view: int, rows: dict[str, tuple[str, dict[str, Any]]]
) -> dict[str, list[Any]]:
    """What measures each row."""
    return {
        row: [
            sys.executable, __file__, images, "--contender", contender, "--shards", shards, "--tuning",
            json.dumps(tuning), "--device", given.device, "--batch", given.batch, "--seconds", given.seconds,
            "--view", view,
        ]
        for row, (contender, tuning) in rows.items()
    }  # fmt: skip


def images_per_s(given: argparse.Namespace) -> float:
    Waiting.until_told()
    device = torch.device("cuda", 0) if given.device == "gpu" else torch.device("cpu")
    torch.set_num_threads(1)  # the cores belong to the loaders; only the concatenation of views runs here
    cores = len(os.sched_getaffinity(0))
    asked = Given(given.images, given.shards, device, given.batch, cores, given.view)
    stream = CONTENDERS[given.contender](asked, **json.loads(given.tuning))
    for _ in range(WARM_UP):
        views = next(stream)
    check(views, given)
    images, started = 0, time.perf_counter()
    while time.perf_counter() - started < given.seconds:
        views = next(stream)
        images += len(views) // 2
    if given.device == "gpu":
        torch.cuda.synchronize()
    taken = time.perf_counter() - started
    check(views, given)
    return images / taken


def check(views: torch.Tensor, given: argparse.Namespace) -> None:
    """The output that all have to deliver; a contender that does not would be measured for less work."""
    assert len(views) in (2 * given.batch, 2 * min(given.batch, WAVE)), len(views)
    assert views.shape[1:] == (3, given.view, given.view), views.shape
    assert views.dtype in (torch.float32, torch.float16) and views.is_cuda == (given.device == "gpu")
    assert abs(views.float().mean()) < 1 and 0.5 < views.float().std() < 2


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
