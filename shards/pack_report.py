"""What a pack says of itself: before, in ``report.json``, and in the lines at its end."""

import shutil
from pathlib import Path
from typing import Any

from simclr_dali.shards.claim import REPORT
from simclr_dali.shards.durable import write_durably
from simclr_dali.shards.equal import equal_images
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.left_out import LeftOut
from simclr_dali.shards.manifest import MANIFEST, read_split, seal, unseal
from simclr_dali.shards.pack_shard import PackedShard, ShardTask
from simclr_dali.shards.plan import Options, split_into_shards
from simclr_dali.shards.sources.find import of_split
from simclr_dali.shards.sources.source import SPLITS, Listing, Source
from simclr_dali.shards.wording import counted, of_classes, size_text


def describe(listing: Listing, out: Path, options: Options, parts: int) -> None:
    """Print what would be packed."""
    for source in listing.sources:
        shards = len(split_into_shards(source, options))
        size = sum(item.length for item in source.items)
        print(
            f"{source.split}: {counted(len(source.items), 'image')} {of_classes(len(source.classes))}, "
            f"{size_text(size)}, in {counted(shards, 'shard')} of about {len(source.items) / shards:,.0f} images, "
            f"{size_text(size / shards)}"
            + (f", resized to a short side of {options.resize} at most" if options.resize else "")
        )
        if source.left_out.counts:
            print(f"{source.split}: left out: {source.left_out}")
    if listing.beside.counts:
        print(f"left out: {listing.beside}")
    free = shutil.disk_usage(_existing(out)).free
    print(f"target {out}{f', packed by {parts} machines' if parts > 1 else ''}; {size_text(free)} are free there")


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def write_report(
    listing: Listing,
    tasks: list[list[ShardTask]],
    packed: list[list[PackedShard]],
    partial: Path,
    out: Path,
    *,
    auto_range: bool,
) -> None:
    """Write the report of the splits in ``partial``, and of those that lie in ``out`` already.

    Raises UserError where the report in ``out`` is damaged.
    """
    # A kill may have left a report in ``partial`` whose splits have moved to ``out`` in part.
    report = {**_earlier(out), **(unseal((partial / REPORT).read_bytes()) if (partial / REPORT).is_file() else {})}
    for source, split, done in zip(listing.sources, tasks, packed, strict=True):
        report[source.split] = _reported(source, done)
        if (value_range := split[0].options.value_range) is not None:
            report[source.split]["range"] = {
                "black": value_range[0],
                "white": value_range[1],
                "from": "the set's 0.1 and 99.9 percentile" if auto_range else "--range",
            }
    packed_before = {of_split(split) for split in SPLITS if split in report}
    report["beside"] = [one for one in listing.beside.as_report() if one["reason"] not in packed_before]
    originals = {
        source.split: [item.name for task in split for item in task.items]
        for source, split in zip(listing.sources, tasks, strict=True)
    }
    folders = [folder / split for folder in (out, partial) for split in SPLITS]
    present = [read_split(folder) for folder in folders if (folder / MANIFEST).is_file()]
    report["equal_images"] = equal_images(present, originals)
    write_durably(partial / REPORT, seal(report))


def _earlier(out: Path) -> dict[str, Any]:
    if not out.exists():
        return {}
    try:
        return unseal((out / REPORT).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{out / REPORT} is missing or damaged ({error}); run simclr-dali verify {out}") from error


def _reported(source: Source, packed: list[PackedShard]) -> dict[str, Any]:
    changes = [one.changes for one in packed]

    def listed(kind: str) -> list[dict[str, str]]:
        return [{"image": name, "reason": reason} for one in changes for name, reason in getattr(one, kind)]

    return {
        "stored": sum(len(one.rows) for one in packed),
        "classes": len(source.classes),
        "resized": sum(one.resized for one in changes),
        "converted": listed("converted"),
        "left_out": listed("left_out"),
        "not_packed": source.left_out.as_report(),
    }


def print_summary(out: Path, splits: list[str]) -> None:
    """Print what was packed, what was left out and why, and which pictures are there twice."""
    path = out / REPORT
    report = unseal(path.read_bytes())
    counts = ", ".join(
        f"{counted(report[split]['stored'], f'{split} image')} {of_classes(report[split]['classes'])}"
        for split in splits
    )
    print(f"{out}: {counts}")
    converted = sum(len(report[split]["converted"]) for split in splits)
    if converted:
        print(f"encoded anew: {counted(converted, 'image')}, see {path}")
    left_out = _as_left_out(report, splits)
    if left_out.counts:
        print(f"left out: {left_out}; see {path}")
    equal = {kind: count for kind, count in report["equal_images"]["counts"].items() if count}
    if equal:
        print(
            "byte-equal pictures: "
            + ", ".join(f"{counted(count, 'group')} {kind}" for kind, count in equal.items())
            + f"; see {path}"
        )


def _as_left_out(report: dict[str, Any], splits: list[str]) -> LeftOut:
    found = LeftOut()
    for split in splits:
        if undecodable := len(report[split]["left_out"]):
            found.counts["cannot be decoded"] += undecodable
        for one in report[split]["not_packed"]:
            found.counts[one["reason"]] += one["count"]
    for one in report["beside"]:
        found.counts[one["reason"]] += one["count"]
    return found
