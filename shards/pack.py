"""Pack an image folder into WebDataset shards.

    scripts/make_shards.sh /data/imagenet                    # -> /data/imagenet-shards
    python -m shards.pack /data/imagenet /fast/imagenet-shards --workers 16

The folder holds ``train/<class>/*`` and, if there is one, ``val/<class>/*``. Images are put into one global random
order (by ``--seed``), cut into shards of equal size and written with their width, height, label and crc32; JPEG
bytes stay as they are. Everything is built in ``OUT.partial`` and renamed to ``OUT`` when complete; the same command
again goes on where a stopped one was, and the result does not depend on ``--workers``.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from shards.durable import sync_folder, write_durably
from shards.errors import UserError, run_main
from shards.folder import Source, read_image, scan
from shards.manifest import SAMPLE, Shard, write_split
from shards.tar import write_shard


def storage_order(samples: int, seed: int, split: str) -> npt.NDArray[np.int64]:
    """A random permutation of 0..samples-1: the order in which a split is stored.

    It sorts words of the raw Philox stream: NumPy keeps its bit generators stable over releases, but not the
    methods of Generator, and a pack that is continued by a newer NumPy must stay byte-identical.
    """
    key = [seed, int.from_bytes(split.encode("ascii"), "little")]
    words = np.random.Philox(key=np.array(key, np.uint64)).random_raw(samples)
    return np.argsort(words, kind="stable")


def pack(source: Path, out: Path, *, samples_per_shard: int = 1000, workers: int = 1, seed: int = 0) -> None:
    """Pack ``source`` into ``out``; see the module's docstring.

    Raises UserError for a bad source, an ``out`` that holds something else, or a half-done pack of other options.
    """
    if samples_per_shard < 1:
        raise UserError(f"--samples-per-shard is {samples_per_shard}; it must be at least 1")
    if workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}; it must lie in 0 .. 2^63-1")
    sources = scan(source)
    options = {
        "samples_per_shard": samples_per_shard,
        "seed": seed,
        "source": {split.split: split.fingerprint(times=False) for split in sources},
    }
    # File times tell whether a source changed under a stopped pack, but must not reach the result: a copy of the
    # same folder packs to the same bytes.
    plan = {**options, "times": {split.split: split.fingerprint(times=True) for split in sources}}
    if out.exists():
        _check_finished(out, options)
        print(f"{out} is already packed from these images; nothing to do")
        return
    partial = out.with_name(f"{out.name}.partial")
    _claim(partial, plan)

    started = time.monotonic()
    total = sum(len(split.files) for split in sources)
    try:
        with ProcessPoolExecutor(workers) as pool, tqdm(total=total, desc="pack", unit=" images", disable=None) as bar:
            for split in sources:
                parts = _pack_split(pool, split, partial / split.split, options, bar, 2 * workers)
                shards = [part for part, _ in parts]
                samples = np.concatenate([rows for _, rows in parts])
                write_split(partial / split.split, split.split, split.classes, shards, samples, options)
    except UserError:
        # The picture must be repaired or removed, and then this is a pack of other images: its shards are of no use.
        shutil.rmtree(partial)
        raise
    for split in sources:
        for leftover in (partial / split.split).glob("*.part.npz"):
            leftover.unlink()
    sync_folder(partial)
    partial.rename(out)
    # After the rename: until then the plan is what lets a killed pack go on.
    (out / "plan.json").unlink()
    sync_folder(out.parent)
    seconds = time.monotonic() - started
    counts = ", ".join(f"{len(split.files):,} {split.split}" for split in sources)
    print(
        f"packed {counts} images of {len(sources[0].classes)} classes into {out} in {seconds:.1f} s "
        f"({total / seconds:,.0f} images/s)"
    )


def _check_finished(out: Path, options: dict[str, Any]) -> None:
    manifest = out / "train" / "manifest.json"
    if not manifest.is_file():
        raise UserError(f"{out} exists and is not a packed data set; choose another target or remove it")
    try:
        made_with = json.loads(manifest.read_text())["made_with"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest} is not a manifest of this packer ({error}); choose another target") from error
    # A kill between the last rename and this left the plan behind.
    (out / "plan.json").unlink(missing_ok=True)
    if made_with != options:
        raise UserError(f"{out} was packed from other images or with other options; choose another target or remove it")


def _claim(partial: Path, plan: dict[str, Any]) -> None:
    """Create the folder of a new pack, or make sure that the one found is the same pack, stopped halfway."""
    plan_path = partial / "plan.json"
    partial.mkdir(parents=True, exist_ok=True)
    if not plan_path.exists():
        if any(entry.name != "plan.json.tmp" for entry in partial.iterdir()):
            raise UserError(f"{partial} exists and is not a half-done pack; remove it")
        write_durably(plan_path, json.dumps(plan).encode())
    elif json.loads(plan_path.read_text()) != plan:
        raise UserError(f"{partial} is a half-done pack of other images or options; remove it, or repeat its command")


def _pack_split(
    pool: ProcessPoolExecutor, source: Source, folder: Path, options: dict[str, Any], bar: "tqdm[None]", in_flight: int
) -> list[tuple[Shard, npt.NDArray[Any]]]:
    """Write the shards that are not there yet; return every shard's description and rows, in order."""
    folder.mkdir(exist_ok=True)
    order = storage_order(len(source.files), options["seed"], source.split)
    # Equal sizes (within one sample) keep the lanes of the data order equal too.
    pieces = np.array_split(order, max(1, round(len(order) / options["samples_per_shard"])))
    starts = np.cumsum([0, *(len(piece) for piece in pieces)])
    for number, piece in enumerate(pieces):
        if _part_path(folder, source.split, number).exists():
            bar.update(len(piece))
    running: set[Future[int]] = set()

    def collect(futures: Iterator[Future[int]]) -> None:
        for future in futures:
            bar.update(future.result())

    try:
        for number, piece in enumerate(pieces):
            if _part_path(folder, source.split, number).exists():
                continue
            if len(running) >= in_flight:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                collect(iter(done))
            running.add(pool.submit(_pack_one, source, folder, number, piece, int(starts[number])))
        collect(iter(running))
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    return [_read_part(_part_path(folder, source.split, number)) for number in range(len(pieces))]


def _shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def _part_path(folder: Path, split: str, number: int) -> Path:
    """The finished shard's rows and description, until the manifest takes them up."""
    return folder / f"{_shard_name(split, number)}.part.npz"


def _pack_one(source: Source, folder: Path, number: int, piece: npt.NDArray[np.int64], start: int) -> int:
    """Write shard ``number``. Runs in a worker process; returns the number of images."""
    images = (read_image(source, int(file), start + i) for i, file in enumerate(piece))
    path = folder / _shard_name(source.split, number)
    try:
        shard, rows = write_shard(path, number, images)
    except UserError:
        path.with_suffix(".tar.tmp").unlink(missing_ok=True)
        raise
    part = _part_path(folder, source.split, number)
    temporary = part.with_name(f"{part.name}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, rows=rows, shard=np.array(json.dumps(asdict(shard))))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(part)
    return len(rows)


def _read_part(path: Path) -> tuple[Shard, npt.NDArray[Any]]:
    with np.load(path, allow_pickle=False) as part:
        rows = part["rows"]
        shard = Shard(**json.loads(str(part["shard"])))
    assert rows.dtype == SAMPLE
    return shard, rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="make_shards.sh", description="Pack an image folder into WebDataset shards.")
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="folder with train/<class>/* and, if there is one, val/<class>/*"
    )
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder to create (default: SRC-shards)")
    parser.add_argument(
        "--samples-per-shard", type=int, default=1000, metavar="N", help="images per tar, about (default: 1000)"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: all cores)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the global shuffle (default: 0)")
    arguments = parser.parse_args()
    source = Path(os.path.normpath(arguments.source))
    out = arguments.out or source.with_name(f"{source.name}-shards")
    pack(source, out, samples_per_shard=arguments.samples_per_shard, workers=arguments.workers, seed=arguments.seed)


if __name__ == "__main__":
    run_main(main)
