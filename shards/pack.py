"""Pack images into WebDataset shards.

    scripts/make_shards.sh /data/imagenet                    # -> /data/imagenet-shards
    scripts/make_shards.sh /data/imagenet /fast/imagenet-256 --resize 256 --workers 16
    scripts/make_shards.sh SRC OUT --part 1/4                # on each of four machines, then once with --merge

SRC is an image folder (train/<class>/*, val/<class>/*), a folder with the ILSVRC2012 archives as they are downloaded,
or one with WebDataset tars. Images are put into one global random order, cut into shards of equal size and written
with width, height, label and crc32. JPEG bytes stay as they are; what training's decoder would refuse, or read
otherwise than a person sees it, becomes RGB JPEG; what nobody can decode is left out. OUT/report.json lists both.
Everything is built in OUT.partial and renamed to OUT when complete. The same command goes on where a stopped one was,
and the result does not depend on --workers or --part.
"""

import argparse
import os
import shutil
import sys
import time
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from simclr_dali.shards.claim import claim, finish, is_finished, machines_of, partial_folder
from simclr_dali.shards.command_line import parser_of, positive_int
from simclr_dali.shards.durable import write_durably
from simclr_dali.shards.errors import UserError, run_main
from simclr_dali.shards.manifest import seal, unseal, write_split
from simclr_dali.shards.pack_shard import PackedShard, ShardTask, is_done, pack_shard, read_record, record_of
from simclr_dali.shards.parallel import map_unordered
from simclr_dali.shards.plan import DECODERS, Options, describe_pack, split_into_shards, tar_bytes
from simclr_dali.shards.sources.find import find_sources
from simclr_dali.shards.sources.source import SPLITS, Source

DEFAULT_MAX_BAD = 0.1  # percent


def pack(
    source: Path,
    out: Path,
    options: Options | None = None,
    *,
    workers: int = 1,
    part: tuple[int, int] = (1, 1),
    merge: bool = False,
    max_bad: float = DEFAULT_MAX_BAD,
    dry_run: bool = False,
) -> None:
    """Pack ``source`` into ``out``; see the module's docstring.

    part: (i, n), this is machine i of n and packs its share only. merge: all n are done, make one set of them.
    max_bad: percent of the images that may be left out. dry_run: only say what would be done.
    Raises UserError for a bad source or option, an ``out`` that holds something else or that another process works on,
    a half-done pack of other images or options, too many bad images, and a disk that refuses.
    """
    options = options or Options()
    options.check()
    number, parts = part
    if workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1")
    if not 1 <= number <= parts:
        raise UserError(f"--part is {number}/{parts}; it must be I/N with 1 <= I <= N")
    if not 0 <= max_bad <= 100:
        raise UserError(f"--max-bad is {max_bad}; it must be a percentage, 0 to 100")
    splits = (options.split,) if options.split else SPLITS
    sources = find_sources(source, splits=splits, limit_per_class=options.limit_per_class)
    if dry_run:
        describe(sources, out, options, parts)
        return
    made_with = describe_pack(options, sources)
    if is_finished(out, made_with):
        print(f"{out} is already packed from these images; nothing to do")
        return
    if merge:
        parts = machines_of(partial_folder(out))
    with claim(out, made_with, sources, 0 if merge else number, parts) as partial:
        tasks = [_tasks(one, partial / one.split, options) for one in sources]
        if not merge:
            mine = [[task for task in split if task.number % parts == number - 1] for split in tasks]
            _write(mine, partial, workers, max_bad, share=_share(tasks, mine))
            for one in sources:
                one.check_unchanged()
            if parts > 1:
                print(f"part {number} of {parts} is packed; when all are, the same command with --merge instead")
                return
        _write_manifests(sources, tasks, partial, made_with)
        finish(partial, out)
    _print_summary(sources, out)


def describe(sources: list[Source], out: Path, options: Options, parts: int) -> None:
    """Print what would be packed."""
    for source in sources:
        shards = len(split_into_shards(source, options))
        size = sum(item.length for item in source.items)
        print(
            f"{source.split}: {len(source.items):,} images of {len(source.classes):,} classes, {size / 1e9:.3f} GB, in "
            f"{shards:,} shards of about {len(source.items) / shards:,.0f} images, {size / shards / 1e6:.1f} MB"
            + (f", resized to a short side of {options.resize} at most" if options.resize else "")
        )
    free = shutil.disk_usage(_existing(out)).free
    print(f"target {out}{f', packed by {parts} machines' if parts > 1 else ''}; {free / 1e9:,.1f} GB are free there")


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _tasks(source: Source, folder: Path, options: Options) -> list[ShardTask]:
    tasks: list[ShardTask] = []
    start = 0
    for number, chosen in enumerate(split_into_shards(source, options)):
        tar = folder / f"{source.split}-{number:06d}.tar"
        items = [source.items[i] for i in chosen]
        how = options.resize, options.quality, options.decoder
        tasks.append(ShardTask(source.root, items, tar, number, start, *how))
        start += len(items)
    return tasks


def _share(tasks: list[list[ShardTask]], mine: list[list[ShardTask]]) -> float:
    total, own = (sum(len(task.items) for split in some for task in split) for some in (tasks, mine))
    return own / total


def _write(splits: list[list[ShardTask]], partial: Path, workers: int, max_bad: float, share: float) -> None:
    """Write the shards that are not there yet; raise UserError as soon as too many images had to be left out."""
    todo, given, bad = [], 0, 0
    for task in (task for tasks in splits for task in tasks):
        given += len(task.items)
        if is_done(task):
            bad += len(read_record(record_of(task.tar)).changes.left_out)
        else:
            todo.append(task)
    _check_space(todo, partial)
    for tasks in splits:
        if tasks:
            tasks[0].tar.parent.mkdir(exist_ok=True)
    started, todo_images = time.monotonic(), sum(len(task.items) for task in todo)
    with (
        tqdm(total=given, initial=given - todo_images, desc="pack", unit=" images", disable=None) as bar,
        closing(map_unordered(pack_shard, todo, min(workers, max(1, len(todo))))) as results,
    ):
        _check_bad(bad, given, max_bad, splits)
        for images, left_out in results:
            bar.update(images)
            bad += left_out
            _check_bad(bad, given, max_bad, splits)
    seconds = time.monotonic() - started
    print(
        f"packed {todo_images:,} images{f' ({share:.0%} of all)' if share < 1 else ''} in {seconds:.1f} s "
        f"({todo_images / seconds:,.0f} images/s)"
    )


def _check_space(todo: list[ShardTask], partial: Path) -> None:
    if any(task.resize for task in todo):
        return
    needed, free = sum(tar_bytes(task.items) for task in todo), shutil.disk_usage(partial).free
    if needed > free:
        raise UserError(
            f"{partial} needs {needed / 1e9:.3f} GB more and {free / 1e9:.3f} GB are free; make room, choose another "
            f"target, or store smaller images with --resize"
        )


def _check_bad(bad: int, images: int, max_bad: float, splits: list[list[ShardTask]]) -> None:
    if bad <= images * max_bad / 100:
        return
    records = (record_of(task.tar) for tasks in splits for task in tasks)
    left_out = (read_record(path).changes.left_out for path in records if path.exists())
    first = next(filter(None, left_out))[0]
    raise UserError(
        f"{bad} of {images:,} images cannot be decoded, more than --max-bad {max_bad:g} %; one is {first[0]} "
        f"({first[1]}); allow more, or repair them and remove {splits[0][0].tar.parent.parent} before you pack again"
    )


def _write_manifests(
    sources: list[Source], tasks: list[list[ShardTask]], partial: Path, made_with: dict[str, Any]
) -> None:
    """Write manifests, tables and the report from the records of the finished shards."""
    missing = [task.tar.name for split in tasks for task in split if not is_done(task)]
    if missing:
        raise UserError(
            f"{len(missing)} shards are missing or cut in {partial}, the first is {missing[0]}; pack all parts, and "
            f"copy what other machines packed into it"
        )
    report: dict[str, Any] = {}
    for source, split in zip(sources, tasks, strict=True):
        packed = [read_record(record_of(task.tar)) for task in split]
        rows = np.concatenate([one.rows for one in packed])
        folder = partial / source.split
        write_split(folder, source.split, source.classes, [one.shard for one in packed], rows, made_with)
        report[source.split] = _reported(packed)
    write_durably(partial / "report.json", seal(report))


def _reported(packed: list[PackedShard]) -> dict[str, Any]:
    changes = [one.changes for one in packed]

    def listed(kind: str) -> list[dict[str, str]]:
        return [{"image": name, "reason": reason} for one in changes for name, reason in getattr(one, kind)]

    return {
        "stored": sum(len(one.rows) for one in packed),
        "resized": sum(one.resized for one in changes),
        "converted": listed("converted"),
        "left_out": listed("left_out"),
    }


def _print_summary(sources: list[Source], out: Path) -> None:
    report = unseal((out / "report.json").read_bytes())
    counts = ", ".join(f"{report[source.split]['stored']:,} {source.split}" for source in sources)
    changed, lost = (sum(len(report[source.split][kind]) for source in sources) for kind in ("converted", "left_out"))
    print(f"{out}: {counts} images of {len(sources[0].classes):,} classes")
    if changed or lost:
        print(f"{changed:,} images were encoded anew and {lost:,} left out, see {out / 'report.json'}")


def _part(text: str) -> tuple[int, int]:
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, like 2/4")
    return int(number), int(parts)


def parse_arguments() -> argparse.Namespace:
    about, _, rest = (__doc__ or "").partition("\n")
    parser = parser_of(about, rest)
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="folder with images, the ILSVRC2012 archives, or WebDataset tars")
    add("out", type=Path, nargs="?", metavar="OUT", help="folder to create (default: SRC-shards)")
    add("--workers", type=positive_int, default=os.cpu_count() or 1, metavar="N", help="processes (default: all cores)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--samples-per-shard", type=positive_int, default=1000, metavar="N", help="about (default: 1000)")
    size.add_argument("--shard-size", type=float, metavar="MB", help="megabytes per tar instead, about")
    add("--seed", type=int, default=0, metavar="N", help="of the global shuffle (default: 0)")
    add("--resize", type=positive_int, metavar="PX", help="make the short side PX at most (Lanczos); default: do not")
    add("--quality", type=int, default=95, metavar="Q", help="of JPEGs encoded anew; above 90 with 4:4:4 (default: 95)")
    add("--limit-per-class", type=positive_int, metavar="N", help="pack the first N images of each class, by name")
    add("--split", choices=SPLITS, help="pack this split only (default: those that are there)")
    add("--part", type=_part, default=(1, 1), metavar="I/N", help="pack the I-th of N shares, on one of N machines")
    add("--merge", action="store_true", help="all parts are packed (or copied) into OUT.partial: make one set of them")
    add("--decoder", choices=DECODERS, default="cpu", help="DALI's that must take each image, or none (default: cpu)")
    add("--max-bad", type=float, default=DEFAULT_MAX_BAD, metavar="PERCENT", help="of the images that nobody can "
        f"decode and that are left out; more stop the pack (default: {DEFAULT_MAX_BAD})")  # fmt: skip
    add("--dry-run", action="store_true", help="say what would be packed, write nothing")
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    source = Path(os.path.normpath(given.source))
    out = given.out or source.with_name(f"{source.name}-shards")
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
            dry_run=given.dry_run,
        )
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_main(main)
