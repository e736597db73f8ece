"""Pack images into WebDataset shards.

    scripts/make_shards.sh /data/imagenet                    # -> /data/imagenet-shards
    scripts/make_shards.sh /data/imagenet /fast/imagenet-256 --resize 256 --workers 16
    scripts/make_shards.sh SRC OUT --part 1/4                # on each of four machines, then once with --merge

SRC is an image folder (train/<class>/*, val/<class>/*), any tree of pictures without labels, ImageNet as downloaded or
unpacked, or WebDataset tars. Images are put into one global random order, cut into shards of equal size and written
with width, height, label and crc32. JPEGs and plain 8-bit PNGs keep their bytes; everything else becomes an RGB or gray
JPEG. OUT/report.json counts and names what was encoded anew, what was left out, and pictures that are equal.
Everything is built in OUT.partial and renamed to OUT when complete. The same command goes on where a stopped one was,
and the result does not depend on --workers or --part.
"""

import argparse
import os
import shutil
import sys
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from simclr_dali.shards.claim import claim, clear_leftovers, finish, machines_of, packed_splits, partial_folder
from simclr_dali.shards.command_line import parser_of, positive_int
from simclr_dali.shards.errors import UserError, run_main
from simclr_dali.shards.image import MAX_PIXELS, REENCODE
from simclr_dali.shards.manifest import MANIFEST, read_split, unseal, write_split
from simclr_dali.shards.pack_report import describe, print_summary, write_report
from simclr_dali.shards.pack_shard import (
    PackedShard,
    ShardTask,
    is_done,
    pack_shard,
    read_record,
    record_of,
    remove_cut,
)
from simclr_dali.shards.parallel import map_unordered
from simclr_dali.shards.plan import DECODERS, Options, describe_pack, split_into_shards, tar_bytes
from simclr_dali.shards.sources.find import find_sources, limited, refuse_val_without_labels, relabelled
from simclr_dali.shards.sources.source import DEFAULT_SPLITS, SPLITS, Listing, Source
from simclr_dali.shards.value_range import check_bit_depth, measure_range, parse_range
from simclr_dali.shards.wording import size_text

DEFAULT_MAX_BAD = 0.1  # percent
_NAMED = 10  # pictures in a message


def pack(
    source: Path,
    out: Path,
    options: Options | None = None,
    *,
    workers: int = 1,
    part: tuple[int, int] = (1, 1),
    merge: bool = False,
    max_bad: float = DEFAULT_MAX_BAD,
    auto_range: bool = False,
    dry_run: bool = False,
) -> None:
    """Pack ``source`` into ``out``; see the module's docstring.

    part: (i, n), this is machine i of n and packs its share only. merge: all n are done, make one set of them.
    max_bad: percent of the images that may be lost. auto_range: measure ``options.value_range`` (value_range.py).
    dry_run: only say what would be done.
    Raises UserError for a bad source or option, an ``out`` that holds something else or that another process works on,
    a half-done pack of other images or options, too many bad images, and a disk that refuses.
    """
    options = options or Options()
    options.check()
    number, parts = part
    _check_arguments(workers, number, parts, max_bad)
    # Absolute, so that targets inside of the source are known for what they are, and "." has a name.
    source, out = (Path(os.path.normpath(path.absolute())) for path in (source, out))
    listing = _with_classes_of(out, _listed(source, out, options, max_bad))
    if auto_range:
        options = replace(options, value_range=_range_of(listing.sources, out))
    if dry_run:
        describe(listing, out, options, parts)
        return
    made_with = {one.split: describe_pack(options, one) for one in listing.sources}
    done = packed_splits(out, made_with)
    if not (sources := [one for one in listing.sources if one.split not in done]):
        clear_leftovers(out)
        print(f"{out} is already packed from these images; nothing to do")
        return
    check_bit_depth(sources, options)
    if merge:
        parts = machines_of(partial_folder(out))
    to_do = {one.split: made_with[one.split] for one in sources}
    with claim(out, to_do, sources, 0 if merge else number, parts) as partial:
        tasks = [_tasks(one, partial / one.split, options) for one in sources]
        if not merge:
            mine = [[task for task in split if task.number % parts == number - 1] for split in tasks]
            lost = sum(sum(one.left_out.lost.values()) for one in sources)
            _write(mine, partial, workers, max_bad, share=_share(tasks, mine), lost=lost)
            for one in sources:
                one.check_unchanged()
            if parts > 1:
                print(f"part {number} of {parts} is packed; when all are, the same command with --merge instead")
                return
        packed = _packed(tasks, partial)
        _write_manifests(sources, packed, partial, to_do)
        write_report(replace(listing, sources=sources), tasks, packed, partial, out, auto_range=auto_range)
        finish(partial, out)
    print_summary(out, [one.split for one in sources])


def _check_arguments(workers: int, number: int, parts: int, max_bad: float) -> None:
    if workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1")
    if not 1 <= number <= parts:
        raise UserError(f"--part is {number}/{parts}; it must be I/N with 1 <= I <= N")
    if not 0 <= max_bad <= 100:
        raise UserError(f"--max-bad is {max_bad}; it must be a percentage, 0 to 100")


def _listed(source: Path, out: Path, options: Options, max_bad: float) -> Listing:
    splits = (options.split,) if options.split else DEFAULT_SPLITS
    listing = find_sources(source, splits=splits, exclude=frozenset({out, partial_folder(out)}))
    if listing.note:
        print(listing.note)
    _check_lost(listing.sources, max_bad)
    if options.limit_per_class is None:
        return listing
    return replace(listing, sources=[limited(one, options.limit_per_class) for one in listing.sources])


def _check_lost(sources: list[Source], max_bad: float) -> None:
    """Raise UserError where too many pictures are lost before any was packed, for lack of a label for instance."""
    lost = sum((source.left_out.lost for source in sources), Counter())
    count, packed = sum(lost.values()), sum(len(source.items) for source in sources)
    if count <= (count + packed) * max_bad / 100:
        return
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in lost.most_common(6))
    commonest = lost.most_common(1)[0][0]
    first = next(source.left_out.names[commonest][0] for source in sources if source.left_out.lost[commonest])
    raise UserError(
        f"{count:,} of {count + packed:,} pictures would be left out ({reasons}), more than --max-bad {max_bad:g} %; "
        f"the first is {first}; mend or move them, or allow more"
    )


def _range_of(sources: list[Source], out: Path) -> tuple[float, float]:
    """What --range auto stands for; a split that is added takes the range of those that are there."""
    for split in SPLITS:
        if (path := out / split / MANIFEST).is_file():
            with suppress(ValueError, KeyError, TypeError):
                low, high = unseal(path.read_bytes())["made_with"]["value_range"]
                return float(low), float(high)
    return measure_range(sources)


def _with_classes_of(out: Path, listing: Listing) -> Listing:
    """The listing with the classes that the splits in ``out`` have, where it adds to them.

    Raises UserError where a split that is added has a class that they lack, or no labels where they have some.
    """
    there = [split for split in SPLITS if (out / split / MANIFEST).is_file()]
    names = next((list(found) for split in there if (found := read_split(out / split).classes)), [])
    sources = []
    for source in listing.sources:
        if source.split not in there:
            refuse_val_without_labels(source.root, source, names)
            source = relabelled(source.root, source, names)
        sources.append(source)
    return replace(listing, sources=sources)


def _tasks(source: Source, folder: Path, options: Options) -> list[ShardTask]:
    tasks: list[ShardTask] = []
    start = 0
    for number, chosen in enumerate(split_into_shards(source, options)):
        tar = folder / f"{source.split}-{number:06d}.tar"
        items = [source.items[i] for i in chosen]
        tasks.append(ShardTask(source.root, items, tar, number, start, options))
        start += len(items)
    return tasks


def _share(tasks: list[list[ShardTask]], mine: list[list[ShardTask]]) -> float:
    total, own = (sum(len(task.items) for split in some for task in split) for some in (tasks, mine))
    return own / total


def _write(
    splits: list[list[ShardTask]], partial: Path, workers: int, max_bad: float, *, share: float, lost: int
) -> None:
    """Write the shards that are not there yet; raise UserError as soon as too many images had to be left out.

    share: of the whole pack. lost: pictures of the source that never came to be packed.
    """
    todo, given, bad = [], 0, 0
    for task in (task for tasks in splits for task in tasks):
        given += len(task.items)
        if is_done(task):
            bad += len(read_record(record_of(task.tar)).changes.left_out)
        else:
            todo.append(task)
    remove_cut(todo)
    _check_space(todo, partial)
    for tasks in splits:
        if tasks:
            tasks[0].tar.parent.mkdir(exist_ok=True)
    started, todo_images = time.monotonic(), sum(len(task.items) for task in todo)
    with (
        tqdm(total=given, initial=given - todo_images, desc="pack", unit=" images", disable=None) as bar,
        closing(map_unordered(pack_shard, todo, min(workers, max(1, len(todo))))) as results,
    ):
        _check_bad(bad, lost, given, max_bad, splits)
        for images, left_out in results:
            bar.update(images)
            bad += left_out
            _check_bad(bad, lost, given, max_bad, splits)
    seconds = time.monotonic() - started
    if not todo:
        print(f"all {given:,} images were packed before")
        return
    print(
        f"went through {todo_images:,} images{f' ({share:.0%} of all)' if share < 1 else ''} in {seconds:.1f} s "
        f"({todo_images / seconds:,.0f} images/s)"
    )


def _check_space(todo: list[ShardTask], partial: Path) -> None:
    if any(task.options.resize for task in todo):
        return
    needed, free = sum(tar_bytes(task.items) for task in todo), shutil.disk_usage(partial).free
    if needed > free:
        raise UserError(
            f"{partial} needs {size_text(needed)} more and {size_text(free)} are free; make room, choose another "
            f"target, or store smaller images with --resize"
        )


def _check_bad(bad: int, lost: int, images: int, max_bad: float, splits: list[list[ShardTask]]) -> None:
    if not bad or bad + lost <= (images + lost) * max_bad / 100:
        return
    records = (record_of(task.tar) for tasks in splits for task in tasks)
    left_out = [one for path in records if path.exists() for one in read_record(path).changes.left_out]
    named = "; ".join(f"{one[0]} ({one[1]})" for one in left_out[:_NAMED])
    more = f" and {bad - _NAMED} more" if bad > _NAMED else ""
    raise UserError(
        f"{bad} of {images:,} images cannot be decoded{f' and {lost} are lost' if lost else ''}, more than --max-bad "
        f"{max_bad:g} %: {named}{more}; allow more, or repair them and remove {splits[0][0].tar.parent.parent} before "
        "you pack again"
    )


def _packed(tasks: list[list[ShardTask]], partial: Path) -> list[list[PackedShard]]:
    """The records of all shards, by split; raises UserError where some are missing."""
    missing = [task.tar.name for split in tasks for task in split if not is_done(task)]
    if missing:
        raise UserError(
            f"{len(missing)} shards are missing or cut in {partial}, the first is {missing[0]}; pack all parts, and "
            f"copy what other machines packed into it"
        )
    return [[read_record(record_of(task.tar)) for task in split] for split in tasks]


def _write_manifests(
    sources: list[Source], packed: list[list[PackedShard]], partial: Path, made_with: dict[str, dict[str, Any]]
) -> None:
    for source, split in zip(sources, packed, strict=True):
        rows = np.concatenate([one.rows for one in split])
        shards = [one.shard for one in split]
        write_split(partial / source.split, source.split, source.classes, shards, rows, made_with[source.split])


def _part(text: str) -> tuple[int, int]:
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, like 2/4")
    return int(number), int(parts)


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add(
        "source",
        type=Path,
        metavar="SRC",
        help="It is a folder with images, the ILSVRC2012 archives, or WebDataset tars.",
    )
    add("out", type=Path, nargs="?", metavar="OUT", help="This folder is created (default: SRC-shards).")
    add(
        "--workers",
        type=positive_int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="Pack in N processes (default: all cores).",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--samples-per-shard", type=positive_int, default=1000, metavar="N", help="Put about N images "
        "into each tar (default: 1000).")  # fmt: skip
    size.add_argument("--shard-size", type=float, metavar="MB", help="Make tars of about this many megabytes instead.")
    add("--seed", type=int, default=0, metavar="N", help="Seed the global shuffle with N (default: 0).")
    add("--resize", type=positive_int, metavar="PX", help="Shrink images whose short side is longer than PX pixels, "
        "by Lanczos (default: none is).")  # fmt: skip
    add("--quality", type=int, default=95, metavar="Q", help="Encode new JPEGs at this quality, above 90 with 4:4:4 "
        "(default: 95).")  # fmt: skip
    add("--reencode", choices=REENCODE, help="Make JPEGs of PNGs, too (default: plain 8-bit PNGs keep their bytes).")
    add("--range", dest="value_range", metavar="LOW:HIGH", help="Map these values of pictures of more than 8 bits to "
        "black and white; auto takes the set's 0.1 and 99.9 percentile (default: 0:65535, of 16 bits).")  # fmt: skip
    add("--max-pixels", type=positive_int, default=MAX_PIXELS, metavar="N", help="Refuse pictures of more pixels "
        f"(default: {MAX_PIXELS:,}, which take 270 MB once decoded).")  # fmt: skip
    add("--limit-per-class", type=positive_int, metavar="N", help="Pack the first N images of each class, by name.")
    add("--split", choices=SPLITS, help="Pack this split only, or add it to OUT (default: train and val).")
    add("--part", type=_part, default=(1, 1), metavar="I/N", help="Pack the I-th of N shares, on one of N machines.")
    add("--merge", action="store_true", help="Make one set of all parts, which lie in OUT.partial.")
    add("--decoder", choices=DECODERS, default="cpu", help="Require that this decoder of DALI takes each image; none "
        "asks none (default: cpu).")  # fmt: skip
    add("--max-bad", type=float, default=DEFAULT_MAX_BAD, metavar="PERCENT", help="Fail where more of the pictures are "
        f"lost: not decodable, or without the label that others have (default: {DEFAULT_MAX_BAD}).")  # fmt: skip
    add("--dry-run", action="store_true", help="Say what would be packed, and write nothing.")
    return parser.parse_args(_with_joined_range(sys.argv[1:]))


def _with_joined_range(words: list[str]) -> list[str]:
    """``--range -1000:3000`` as ``--range=-1000:3000``: argparse takes what begins with a dash for an option."""
    at = words.index("--range") if "--range" in words[:-1] else None
    return words if at is None else [*words[:at], f"--range={words[at + 1]}", *words[at + 2 :]]


def main() -> None:
    given = parse_arguments()
    source = Path(os.path.normpath(given.source.absolute()))
    if given.out is None and not source.name:
        raise UserError(f"the target must be named where {source} is packed; give OUT")
    out = given.out or source.with_name(f"{source.name}-shards")
    auto_range = given.value_range == "auto"
    try:
        given.value_range = None if auto_range or given.value_range is None else parse_range(given.value_range)
    except ValueError as error:
        raise UserError(f"--range is {given.value_range}; it must be LOW:HIGH, such as 0:4095, or auto") from error
    options = Options(**{field.name: getattr(given, field.name) for field in fields(Options)})
    try:
        pack(
            source,
            out,
            options,
            workers=given.workers,
            part=given.part,
            merge=given.merge,
            max_bad=given.max_bad,
            auto_range=auto_range,
            dry_run=given.dry_run,
        )
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_main(main)
