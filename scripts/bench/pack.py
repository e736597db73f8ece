"""How fast packing is, against the floor, a rival and bare decoding, all in one run on the same files.

    python scripts/bench/pack.py /data/imagenet --files 5000 --rounds 5

Each round runs, one after the other and each as a process of its own from its start to its end:

    tar           GNU tar of the folder into one file: the floor for reading and writing, without any order or check
    ShardWriter   webdataset.ShardWriter in one process, the same files, 1000 a shard
    decode        every file read and decoded by DALI on all cores, nothing written
    ours, none    make_shards.sh --decoder none: headers are looked at, nothing is decoded
    ours          make_shards.sh: every image decoded

The folder is an image folder; its files are copied, and repeated under other names up to --files. The page cache is
warm. Figures are medians over the rounds with the extremes; ratios are taken within a round.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / ".package")]

from simclr_dali.shards.command_line import file_to_write, positive_int
from simclr_dali.shards.errors import UserError, run_main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", type=Path, metavar="FOLDER", help="image folder; its train split is used")
    parser.add_argument("--files", type=positive_int, default=5000, metavar="N", help="at least (default: 5000)")
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--workers", type=positive_int, default=os.cpu_count() or 1, metavar="N", help="all cores")
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="where to write (default: the system's)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there too")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

from scripts.bench.figures import extremes, machine, spread
from simclr_dali.shards.sources.find import find_sources

PACKAGES = ("nvidia-dali-cuda120", "webdataset", "numpy")
BASES = ("tar", "decode", "ShardWriter")
SHARD_WRITER = """
import sys, pathlib, webdataset
source, out = map(pathlib.Path, sys.argv[1:])
classes = {path.name: label for label, path in enumerate(sorted((source / "train").iterdir()))}
with webdataset.ShardWriter(str(out / "train-%06d.tar"), maxcount=1000, maxsize=1e12, verbose=0) as writer:
    for path in sorted((source / "train").rglob("*.*")):
        writer.write({"__key__": path.stem, "jpg": path.read_bytes(), "cls": classes[path.parent.name]})
"""
DECODE = """
import sys, os, pathlib
from nvidia.dali import fn, pipeline_def
from simclr_dali.shards.decode import decoded
paths = [str(path) for path in sorted((pathlib.Path(sys.argv[1]) / "train").rglob("*.*"))]
batch, threads = 64, int(sys.argv[2])
@pipeline_def(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=2)
def graph():
    encoded, _ = fn.readers.file(files=paths, name="files")
    return decoded(encoded, on_gpu=False)
pipeline = graph()
pipeline.build()
for _ in range(-(-len(paths) // batch)):
    pipeline.run()
"""


def copied(images: Path, folder: Path, files: int) -> Path:
    """An image folder with at least ``files`` files: all of ``images``' train split, repeated.

    The number of the repetition is written behind each picture's end, so that no two files are equal.
    """
    (source,) = find_sources(images, splits=("train",)).sources
    rounds = max(1, -(-files // len(source.items)))
    for repeat in range(rounds):
        for item in source.items:
            path = folder / item.path
            path.parent.mkdir(parents=True, exist_ok=True)
            data = (source.root / item.path).read_bytes() + b"%d" % repeat
            path.with_stem(f"{path.stem}_{repeat}").write_bytes(data)
    return folder


def seconds(command: list[Any], target: Path | None) -> float:
    """Wall time of one process; what it wrote is removed afterwards, outside the measurement."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / '.package'}"}
    started = time.perf_counter()
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    taken = time.perf_counter() - started
    if done.returncode:
        raise UserError(f"{command[0]} failed: {done.stderr[-500:]}")
    if target and target.is_dir():
        shutil.rmtree(target)
    elif target:
        target.unlink()
    return taken


def contestants(source: Path, scratch: Path, workers: int) -> dict[str, Callable[[], float]]:
    pack = [sys.executable, "-m", "simclr_dali.shards.pack", source, scratch / "ours", "--workers", workers]

    def shard_writer() -> float:
        (scratch / "theirs").mkdir()
        return seconds([sys.executable, "-c", SHARD_WRITER, source, scratch / "theirs"], scratch / "theirs")

    return {
        "tar": lambda: seconds(["tar", "cf", scratch / "all.tar", "-C", source, "."], scratch / "all.tar"),
        "ShardWriter": shard_writer,
        "decode": lambda: seconds([sys.executable, "-c", DECODE, source, workers], None),
        "ours, none": lambda: seconds([*pack, "--decoder", "none"], scratch / "ours"),
        "ours": lambda: seconds(pack, scratch / "ours"),
    }


def main(given: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=given.scratch) as name:
        scratch = Path(name)
        source = copied(given.images, scratch / "images", given.files)
        sizes = [path.stat().st_size for path in (source / "train").rglob("*.*")]
        runs = contestants(source, scratch, given.workers)
        taken: dict[str, list[float]] = {who: [] for who in runs}
        for run in runs.values():
            run()  # once unmeasured: caches, compiled files
        for _ in range(given.rounds):
            for who, run in runs.items():
                taken[who].append(run())
    megabytes = sum(sizes) / 1e6
    print(f"{len(sizes):,} files, {megabytes:,.0f} MB, {given.workers} workers, {given.rounds} rounds")
    print(f"{'':12} {'seconds':>24} {'images/s':>28} {'MB/s':>24} {'x tar':>20} {'x decode':>20} {'x ShardWriter':>22}")
    ratios = {}
    for who, times in taken.items():
        against = {base: [b / t for b, t in zip(taken[base], times, strict=True)] for base in BASES}
        ratios.update({f"{who} / {base}": extremes(values) for base, values in against.items() if base != who})
        print(
            f"{who:12} {spread(times, 2):>24} {spread([len(sizes) / t for t in times], 0):>28} "
            f"{spread([megabytes / t for t in times], 0):>24} {spread(against['tar'], 2):>20} "
            f"{spread(against['decode'], 2):>20} {spread(against['ShardWriter'], 2):>22}"
        )
    if given.json:
        figures = {"files": len(sizes), "megabytes": megabytes, "workers": given.workers, "rounds": given.rounds}
        figures |= {"seconds": taken, "ratios": ratios, **machine("cpu", PACKAGES)}
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
