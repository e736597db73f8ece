"""Check a packed data set against its own description.

    python -m shards.verify /data/imagenet-shards            # sizes, tables, indexes, first and last header: seconds
    python -m shards.verify /data/imagenet-shards --full     # every byte: sha256 of each tar, crc32 of each image

Every damage found is named on its own line, by tar and sample; the exit code is 1 if there is any, 0 if there is none.
"""

import argparse
import hashlib
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from shards.errors import UserError, run_main
from shards.manifest import ShardSet, load_split
from shards.tar import BLOCK

SPLITS = ("train", "val")


def verify_split(shards: ShardSet, *, full: bool) -> Iterator[str]:
    """Yield one sentence per damage in the tars and indexes of a split that ``load_split`` has accepted.

    Fast: each index has the entries that the sample table implies, and the headers of the first and last sample of
    each tar are sound. full: also the sha256 of each tar and, where that differs, the crc32 of each of its samples.
    """
    rows_by_shard = np.split(shards.samples, np.cumsum(shards.shard_sizes())[:-1])
    for number, shard in enumerate(tqdm(shards.shards, f"verify {shards.split}", disable=None, leave=False)):
        path, rows = shards.folder / shard.name, rows_by_shard[number]
        if (rows["shard"] != number).any():
            yield f"{shards.folder / 'samples.npy'} lists samples of other shards under {shard.name}"
            continue
        names = []
        with path.open("rb") as tar:
            for i in range(len(rows)) if full else sorted({0, len(rows) - 1}):
                name = _member_name(tar, int(rows[i]["offset"]), int(rows[i]["length"]))
                if name is None:
                    yield f"{path}: the header of sample {i}, before offset {rows[i]['offset']}, is damaged"
                names.append(name)
        yield from _index_damage(path.with_suffix(".idx"), rows, names if full else None)
        if full:
            yield from _content_damage(path, shard.sha256, rows, names)


def _member_name(tar: BinaryIO, offset: int, length: int) -> str | None:
    """The name in the header before ``offset``, or None where that is no sound header of a file of ``length`` bytes."""
    tar.seek(offset - BLOCK)
    try:
        header = tarfile.TarInfo.frombuf(tar.read(BLOCK), "ascii", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError):
        return None
    return header.name if header.size == length and header.isreg() else None


def _index_damage(path: Path, rows: npt.NDArray[Any], names: list[str | None] | None) -> Iterator[str]:
    """Compare a DALI index with the sample table, and with the member names where they are known."""
    if not path.is_file():
        yield f"index {path} is missing"
        return
    try:
        first, *lines = path.read_bytes().decode("ascii").split("\n")
    except UnicodeDecodeError:
        yield f"index {path} is damaged"
        return
    if first != f"v1.2 {len(rows)}" or len(lines) != len(rows) + 1 or lines[-1]:
        yield f"index {path} is damaged: it should list {len(rows)} samples"
        return
    for i, (line, row) in enumerate(zip(lines, rows, strict=False)):
        label_at = int(row["offset"]) + -(-int(row["length"]) // BLOCK) * BLOCK + BLOCK
        label_length = len(str(row["label"]))
        words = line.split(" ")
        expected = ["jpg", row["offset"], row["length"], None, "cls", label_at, label_length, None]
        same = len(words) == 8 and all(e is None or str(e) == w for e, w in zip(expected, words, strict=True))
        if same and names is not None and names[i] is not None:
            same = words[3] == names[i] and words[7] == f"{Path(str(names[i])).stem}.cls"
        if not same:
            yield f"index {path} is damaged: line {i + 2} does not describe sample {i}"
            return


def _content_damage(path: Path, sha256: str, rows: npt.NDArray[Any], names: list[str | None]) -> Iterator[str]:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() == sha256:
        return
    named = False
    for i, row in enumerate(rows):
        start = int(row["offset"])
        if zlib.crc32(data[start : start + int(row["length"])]) != row["crc32"]:
            named = True
            yield f"{path}: sample {i}, {names[i] or 'name unreadable'}, at offset {start}: its bytes are damaged"
    if not named:
        yield f"{path}: its sha256 differs; the images are whole, a label, header or padding is not"


def verify(data: Path, *, full: bool) -> list[str]:
    """All damages of a packed data set, one sentence each; empty where it is sound.

    Raises UserError where ``data`` holds no split at all.
    """
    found = [split for split in SPLITS if (data / split).exists()]
    if not found:
        raise UserError(f"{data} holds no packed split (train or val); give the folder made by scripts/make_shards.sh")
    damages: list[str] = []
    for split in found:
        try:
            damages += verify_split(load_split(data, split), full=full)
        except UserError as error:
            damages.append(str(error))
    return damages


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m shards.verify", description="Check a packed data set.")
    parser.add_argument("data", type=Path, metavar="DIR", help="folder made by scripts/make_shards.sh")
    parser.add_argument("--full", action="store_true", help="read every byte")
    arguments = parser.parse_args()
    damages = verify(arguments.data, full=arguments.full)
    for damage in damages:
        print(damage)
    print(f"{arguments.data}: {len(damages)} damages found" if damages else f"{arguments.data} is sound")
    sys.exit(1 if damages else 0)


if __name__ == "__main__":
    run_main(main)
