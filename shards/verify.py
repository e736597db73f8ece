"""Check a packed data set against its own description.

    simclr-dali verify /data/imagenet-shards            # sizes, tables, indexes, first and last header: seconds
    simclr-dali verify /data/imagenet-shards --full     # every byte, and every image decoded

Every damage found is named on its own line, by tar and sample; the exit code is 1 if there is any, 0 if there is none.
"""

import hashlib
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from simclr_dali.shards.command_line import parser_of, positive_int
from simclr_dali.shards.durable import unreadable_named
from simclr_dali.shards.errors import UserError, run_main
from simclr_dali.shards.manifest import (
    BLOCK,
    MANIFEST,
    TABLE,
    Shard,
    ShardSet,
    member_name,
    read_split,
    size_damage,
    unseal,
)
from simclr_dali.shards.parallel import map_unordered
from simclr_dali.shards.sources.source import SPLITS
from simclr_dali.shards.tar import END_OF_ARCHIVE, around_image
from simclr_dali.shards.wording import counted

_ENDINGS = ("jpg", "png")  # of stored images
_THREADS = 16  # that wait for a file system


class _Task(NamedTuple):
    """One shard to check: its place in ``split``'s row of shards, its tar, what is said of it, its rows."""

    number: int
    path: Path
    shard: Shard
    rows: npt.NDArray[Any]
    full: bool
    decoder: str


def verify_split(shards: ShardSet, *, full: bool, workers: int = 1, decoder: str = "cpu") -> list[str]:
    """One sentence per damage in the tars and indexes of a split that ``load_split`` or ``read_split`` gave.

    Fast: each index has the entries that the sample table implies, and the headers of the first and last sample of
    each tar are sound. full: also the sha256 of each tar, the crc32 of each sample, and whether DALI's ``decoder``
    ("cpu", "gpu" or "none") takes it at its size.
    """
    tasks = _tasks(shards, full=full, decoder=decoder)
    damages: dict[int, list[str]] = {}
    with tqdm(total=len(shards), desc=f"verify {shards.split}", unit=" images", disable=None, leave=False) as bar:
        for number, found in map_unordered(_check_shard, tasks, workers):
            damages[number] = found
            bar.update(shards.shards[number].samples)
    return [damage for number in sorted(damages) for damage in damages[number]]


def _tasks(shards: ShardSet, *, full: bool, decoder: str = "cpu") -> list[_Task]:
    rows = np.split(shards.samples, np.cumsum(shards.shard_sizes())[:-1])
    return [
        _Task(number, shards.folder / shard.name, shard, rows[number], full, decoder)
        for number, shard in enumerate(shards.shards)
    ]


def damage_at_start(shards: ShardSet) -> str | None:
    """The first damage that headers of tars show, in a sentence; for a split that ``load_split`` gave.

    Of each tar the headers of the first and the last sample are read, by many threads: a network file system takes
    milliseconds for each. Indexes are not looked at; nothing of ours reads them.
    """

    def look(task: _Task) -> str | None:
        rows = task.rows[[0, -1]]
        if (rows["shard"] != task.number).any():
            return _other_shards(task.path)
        try:
            with unreadable_named(task.path), task.path.open("rb") as tar:
                return next((damage for _, damage in _headers(tar, task) if damage), None)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(_THREADS) as pool:
        found = next(filter(None, pool.map(look, _tasks(shards, full=False))), None)
        pool.shutdown(cancel_futures=True)
        return found


def _check_shard(task: _Task) -> tuple[int, list[str]]:
    return task.number, list(_damages(task))


def _damages(task: _Task) -> Iterator[str]:
    path, rows = task.path, task.rows
    if (rows["shard"] != task.number).any():
        yield _other_shards(path)
        return
    if damage := size_damage(path, task.shard):
        yield damage
        yield from _index_damage(path.with_suffix(".idx"), rows, None)
        return
    names = []
    with path.open("rb") as tar:
        for name, damage in _headers(tar, task):
            if damage:
                yield damage
            names.append(name)
    if not task.full:
        yield from _index_damage(path.with_suffix(".idx"), rows, None)
        return
    images = _image_names(task, names)
    yield from _index_damage(path.with_suffix(".idx"), rows, images)
    yield from _content_damage(task, names, images)


def _other_shards(path: Path) -> str:
    return f"{path.parent / TABLE} lists samples of other shards under {path.name}"


def _headers(tar: BinaryIO, task: _Task) -> Iterator[tuple[str | None, str]]:
    """Of all samples of a tar, or the first and the last: the name in its header, or None and a sentence."""
    rows = task.rows
    for i in range(len(rows)) if task.full else sorted({0, len(rows) - 1}):
        name = member_name(tar, int(rows[i]["offset"]), int(rows[i]["length"]))
        at = rows[i]["offset"]
        yield name, "" if name is not None else f"{task.path}: the header of sample {i}, before offset {at}, is damaged"


def _label_at(row: Any) -> int:
    """Offset of a sample's label, which follows the image's padding and a header."""
    return int(row["offset"]) + -(-int(row["length"]) // BLOCK) * BLOCK + BLOCK


def _index_damage(path: Path, rows: npt.NDArray[Any], images: list[str | None] | None) -> Iterator[str]:
    """Compare a DALI index with the sample table, and with the images' names where they are known."""
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
        label_at = _label_at(row)
        label_length = len(str(row["label"]))
        words = line.split(" ")
        expected = [None, row["offset"], row["length"], None, "cls", label_at, label_length, None]
        same = len(words) == 8 and words[0] in _ENDINGS and words[3].endswith(f".{words[0]}")
        same = same and all(e is None or str(e) == w for e, w in zip(expected, words, strict=True))
        if same and images is not None and images[i] is not None:
            same = words[3] == images[i] and words[7] == f"{_key(images[i])}.cls"
        if not same:
            yield f"index {path} is damaged: line {i + 2} does not describe sample {i}"


def _content_damage(task: _Task, names: list[str | None], images: list[str | None]) -> Iterator[str]:
    data = task.path.read_bytes()
    spans = [(int(row["offset"]), int(row["offset"]) + int(row["length"])) for row in task.rows]
    sound = [zlib.crc32(data[start:end]) == row["crc32"] for (start, end), row in zip(spans, task.rows, strict=True)]
    decodes = _decodes(task, [data[start:end] for start, end in spans], sound)
    for i, (start, _) in enumerate(spans):
        if not sound[i] or not decodes[i]:
            what = "its bytes are damaged" if not sound[i] else "it does not decode to its size"
            yield f"{task.path}: sample {i}, {names[i] or 'name unreadable'}, at offset {start}: {what}"
    if hashlib.sha256(data).hexdigest() != task.shard.sha256:
        others = list(_damage_around_images(task, data, names, images))
        yield from others
        if not others and all(sound) and all(names):
            yield f"{task.path}: its sha256 is not its manifest's, though all that it holds is as it should be"


def _damage_around_images(task: _Task, data: bytes, names: list[str | None], images: list[str | None]) -> Iterator[str]:
    """Name each header, padding and label that is not what the packer wrote; unreadable headers were named before."""
    for i, (row, name, image) in enumerate(zip(task.rows, names, images, strict=True)):
        who = f"sample {i}, {image or 'name unreadable'}"
        at, length = int(row["offset"]), int(row["length"])
        around = around_image(image or "", length, int(row["label"]))
        label_at = _label_at(row)
        places = (at - BLOCK, at + length, label_at - BLOCK, label_at)
        for part, expected, start in zip(around._fields, around, places, strict=True):
            if data[start : start + len(expected)] != expected and not (part == "header" and name is None):
                what = "label's header" if part == "label_header" else part
                yield f"{task.path}: {who}: its {what}, at offset {start}, is damaged"
    if not data.endswith(END_OF_ARCHIVE):
        yield f"{task.path}: its end is damaged"


def _image_names(task: _Task, names: list[str | None]) -> list[str | None]:
    """The name of each image, as most of its header, its label's header and the index say it; of a tie, the first.

    names: those in the images' headers. None where none of the three can be read.
    """
    try:
        lines = task.path.with_suffix(".idx").read_text("ascii").split("\n")[1:-1]
    except (OSError, UnicodeDecodeError):
        lines = []
    split_lines = [text.split(" ") for text in lines]
    indexed = [words if len(words) == 8 else None for words in split_lines]
    if len(indexed) != len(task.rows):
        indexed = [None] * len(task.rows)
    images: list[str | None] = []
    with task.path.open("rb") as tar:
        for row, name, line in zip(task.rows, names, indexed, strict=True):
            label = member_name(tar, _label_at(row), len(str(row["label"])))
            said = [word for word in (name, label, *([line[3], line[7]] if line else [])) if word]
            keys = Counter(_key(word) for word in said)
            endings = Counter(ending for word in said if (ending := word.rpartition(".")[2]) in _ENDINGS)
            ending = endings.most_common(1)[0][0] if endings else _ENDINGS[0]
            images.append(f"{keys.most_common(1)[0][0]}.{ending}" if keys else None)
    return images


def _key(name: str | None) -> str:
    return (name or "").rpartition(".")[0]


def _decodes(task: _Task, images: list[bytes], sound: list[bool]) -> list[bool]:
    """Whether each sound image decodes; damaged ones are not asked."""
    if task.decoder == "none":
        return [True] * len(images)
    from simclr_dali.shards.decode import decoder  # here, because the fast check must not wait for DALI's import

    asked = [i for i in range(len(images)) if sound[i]]
    sizes = [(int(task.rows[i]["width"]), int(task.rows[i]["height"])) for i in asked]
    answers = dict(zip(asked, decoder(task.decoder).accepts([images[i] for i in asked], sizes), strict=True))
    return [answers.get(i, True) for i in range(len(images))]


def verify(data: Path, *, full: bool, workers: int = 1, decoder: str = "cpu") -> list[str]:
    """All damages of a packed data set, one sentence each; empty where it is sound. See :func:`verify_split`.

    Raises UserError where ``data`` holds no split at all.
    """
    found = [split for split in SPLITS if (data / split).exists()]
    described = [*(data / split / name for split in found for name in (MANIFEST, TABLE)), data / "report.json"]
    if not any(path.exists() for path in described):  # pictures, perhaps, that are not packed yet
        raise UserError(
            f"{data} holds no packed split (train, val or test); give the folder made by scripts/make_shards.sh"
        )
    damages: list[str] = []
    for split in found:
        try:
            damages += verify_split(read_split(data / split), full=full, workers=workers, decoder=decoder)
        except UserError as error:
            damages.append(str(error))
    try:
        unseal((data / "report.json").read_bytes())
    except (OSError, ValueError) as error:
        damages.append(f"{data / 'report.json'} is missing or damaged ({error}); copy it again")
    return damages


def main() -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("data", type=Path, metavar="DIR", help="It is a folder made by scripts/make_shards.sh.")
    add("--full", action="store_true", help="Read every byte and decode every image.")
    add("--workers", type=positive_int, default=os.cpu_count() or 1, metavar="N", help="With --full, read in N "
        "processes (default: all cores).")  # fmt: skip
    add("--decoder", choices=("cpu", "gpu", "none"), default="cpu", help="With --full, decode by this decoder of DALI "
        "(default: cpu).")  # fmt: skip
    given = parser.parse_args()
    damages = verify(given.data, full=given.full, workers=given.workers if given.full else 1, decoder=given.decoder)
    for damage in damages:
        print(damage)
    print(f"{given.data}: {counted(len(damages), 'damage')} found" if damages else f"{given.data} is sound")
    sys.exit(1 if damages else 0)


if __name__ == "__main__":
    run_main(main)
