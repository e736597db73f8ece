"""Telling what kind of source lies in a folder, split by split, and counting what lies beside the splits."""

import os
from dataclasses import replace
from pathlib import Path

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import MANIFEST
from simclr_dali.shards.sources import folder, ilsvrc, webtars
from simclr_dali.shards.sources.class_list import CLASSES
from simclr_dali.shards.sources.source import DEFAULT_SPLITS, SPLITS, Listing, Source
from simclr_dali.shards.sources.splits import data_folder, split_folder, split_of_name, split_tars
from simclr_dali.shards.sources.walk import (
    HIDDEN,
    PICTURE_ENDINGS,
    RUBBISH,
    LeftOut,
    ending_of,
    is_rubbish,
    walk,
)
from simclr_dali.shards.wording import of_classes

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_USED = frozenset({CLASSES, ilsvrc.TRAIN, ilsvrc.VAL, ilsvrc.DEVKIT, ilsvrc.SOLUTION})


def find_sources(
    root: Path,
    *,
    splits: tuple[str, ...] = DEFAULT_SPLITS,
    limit_per_class: int | None = None,
    without: frozenset[Path] = frozenset(),
) -> Listing:
    """The wanted splits of whatever lies in ``root``; a folder of a split is taken before archives beside it.

    A folder without any split is one tree of pictures without labels, packed as train. ``limit_per_class`` keeps the
    first pictures of each class, in the order of their names; ``without`` are folders in ``root`` that do not belong
    to it. Raises UserError where nothing is found, and what the kinds themselves raise.
    """
    if not root.is_dir():
        raise UserError(f"{root} does not exist or is no folder; give a folder with train/<class>/* and val/<class>/*")
    data = data_folder(root)
    found = [source for split in splits if (source := _scan(data, root, split, without))]
    if not found and not any(_is_here(data, split) for split in SPLITS):
        return _without_splits(root, splits, limit_per_class, without)
    if not found:
        there = " and ".join(split for split in SPLITS if _is_here(data, split))
        raise UserError(f"{root} has nothing for --split {splits[0]}, only {there}; choose another split")
    if [source.split for source in found] == ["val"] and "train" in splits and split_folder(data, "val"):
        raise UserError(
            f"{data} has no folder 'train'; expected {data}/train/<class>/* and {data}/val/<class>/*, or give --split "
            f"val to pack val alone"
        )
    found = _with_same_classes(data, found)
    if limit_per_class is not None:
        found = [_limited(source, limit_per_class) for source in found]
    return Listing(found, _beside(root, data, found, without))


def _is_here(data: Path, split: str) -> bool:
    archive = {"train": ilsvrc.TRAIN, "val": ilsvrc.VAL}.get(split, "")
    has_archive = bool(archive) and (data / archive).is_file()
    return split_folder(data, split) is not None or has_archive or bool(split_tars(data, split))


def _scan(data: Path, root: Path, split: str, without: frozenset[Path]) -> Source | None:
    """One split, or None where it is not there."""
    if (here := split_folder(data, split)) is not None:
        return _scan_folder(data, root, split, here, without)
    if split == "train" and (data / ilsvrc.TRAIN).is_file():
        return ilsvrc.scan_train(data)
    if split == "val" and (data / ilsvrc.VAL).is_file():
        return ilsvrc.scan_val(data)
    if tars := split_tars(data, split):
        return webtars.scan(data, split, tars)
    packed = [path for path in sorted(data.iterdir()) if path.name.lower().endswith(_COMPRESSED)]
    for path in packed:
        if path.name != ilsvrc.DEVKIT and split_of_name(path) == split:
            raise UserError(f"{path} is compressed, and pictures are read in place; unpack it to a .tar first")
    return None


def _scan_folder(data: Path, root: Path, split: str, here: Path, without: frozenset[Path]) -> Source:
    tars = [path for path in sorted(here.glob("*.tar")) if not ilsvrc.CLASS_TAR.fullmatch(path.name)]
    if not tars or any(_has_pictures(here / name) for name in folder.class_names(here)):
        return folder.scan(data, split, here.name, _truth_folders(data, root), without)
    left_out = LeftOut()
    for path, _, _ in walk(data, left_out, below=here.name, without=without):
        if path.lower().endswith(_COMPRESSED):
            raise UserError(f"{data / path} is compressed, and pictures are read in place; unpack it to a .tar first")
        if ending_of(path) == "tar":
            tars = sorted({*tars, data / path})
        elif path.rpartition("/")[2] not in _USED:
            picture = ending_of(path) in PICTURE_ENDINGS
            left_out.add("picture beside tars" if picture else f"no picture (.{ending_of(path)})", path, lost=picture)
    return webtars.scan(data, split, tars, left_out)


def _has_pictures(place: Path) -> bool:
    return any(ending_of(file.path) in PICTURE_ENDINGS for file in walk(place, LeftOut()))


def _truth_folders(data: Path, root: Path) -> list[Path]:
    """Where labels of flat validation pictures may lie; Kaggle's table lies three folders above them."""
    above = list(data.absolute().parents[:3]) if data.absolute().name == "CLS-LOC" else []
    return list(dict.fromkeys([data, root, *above]))


def _with_same_classes(data: Path, found: list[Source]) -> list[Source]:
    """Let labels of all splits mean the same classes: those of train, or of the first that has any."""
    names = next((source.classes for source in found if source.split == "train"), None)
    if names is None:
        names = _classes_of_train(data)
    if names is None:
        names = next((source.classes for source in found if source.classes), [])
    for source in found:
        if source.split == "val" and names and not source.classes:
            raise UserError(
                f"the {len(source.items):,} pictures of val in {data} have no labels, and those of train have; sort "
                f"them into class folders, or put {ilsvrc.DEVKIT} or Kaggle's {ilsvrc.SOLUTION} into {data} (for "
                f"ILSVRC2012_val_*.JPEG), or pack with --split train"
            )
        if _are_numbers(names) and _are_numbers(source.classes) and len(source.classes) > len(names):
            names = source.classes
    return [source if not source.classes else _relabelled(data, source, names) for source in found]


def _are_numbers(names: list[str]) -> bool:
    return names == [str(number) for number in range(len(names))]


def _relabelled(data: Path, source: Source, names: list[str]) -> Source:
    if not names or source.classes == names:
        return source
    label_of = {name: label for label, name in enumerate(names)}
    unknown = sorted(set(source.classes) - label_of.keys())
    if unknown:
        raise UserError(
            f"{source.split} in {data} has the class {unknown[0]!r}, which train does not have; add it there or remove "
            f"it here (numbers of tars get names from {CLASSES})"
        )
    items = [item._replace(label=label_of[source.classes[item.label]]) for item in source.items]
    return replace(source, classes=names, items=items)


def _classes_of_train(data: Path) -> list[str] | None:
    """The names of train's classes where train itself is not listed, as far as they can be told from names."""
    if (here := split_folder(data, "train")) is not None:
        return folder.class_names(here) or None
    if (data / ilsvrc.TRAIN).is_file():
        return ilsvrc.classes_of_archive(data)
    return None


def _without_splits(
    root: Path, splits: tuple[str, ...], limit_per_class: int | None, without: frozenset[Path]
) -> Listing:
    """What lies in a folder that has no splits: tars, or a tree of pictures, all of it train and without labels."""
    tars = sorted(root.glob("*.tar"))
    source = None
    if splits[0] == "train" and tars and not all(ilsvrc.CLASS_TAR.fullmatch(path.name) for path in tars):
        source = webtars.scan(root, "train", tars)
    elif splits[0] == "train" and tars:
        source = folder.scan(root, "train", "", [root], without)
    elif splits[0] == "train":
        source = folder.scan_tree(root, "train", without)
    if source is None:
        raise UserError(
            f"{root} has no pictures to pack; expected {root}/train/<class>/*.jpg, or {ilsvrc.TRAIN}, or WebDataset "
            f"tars (train/*.tar or *train*.tar), or any tree of pictures without labels"
        )
    print(
        f"{root} has no folder train: all its {len(source.items):,} pictures are train, "
        + (of_classes(len(source.classes)) if source.classes else "without labels (classes would be train/<class>)")
    )
    if limit_per_class is not None:
        source = _limited(source, limit_per_class)
    return Listing([source], _beside(root, root, [source], without) if tars else LeftOut())


def _beside(root: Path, data: Path, found: list[Source], without: frozenset[Path]) -> LeftOut:
    """Count what lies in ``root`` and belongs to no split that was listed."""
    left_out = LeftOut()
    folders = {here: split for split in SPLITS if (here := split_folder(data, split)) is not None}
    listed = {source.split for source in found}
    used = {data / path for source in found for path in source.watched} | {root / MANIFEST}
    listed_folders = {(path.stat().st_dev, path.stat().st_ino) for path in used if path.is_dir()}
    for inside, names, files in os.walk(root):
        place = Path(inside)
        if place != root and (place.stat().st_dev, place.stat().st_ino) in listed_folders:
            continue  # its files were listed through a link
        names[:] = [name for name in names if place / name not in without and folders.get(place / name) not in listed]
        split = next((split for path, split in folders.items() if path == place or path in place.parents), None)
        for name in files:
            below = (place / name).relative_to(root)
            words, path = below.parts, str(below)
            if any(map(is_rubbish, words)):
                left_out.add(RUBBISH, path)
            elif any(word.startswith(".") for word in words):
                left_out.add(HIDDEN, path)
            elif split:
                left_out.add(f"of the split {split} (pack it with --split {split})", path)
            elif place / name not in used and name not in _USED:
                left_out.add("beside the splits", path)
    return left_out


def _limited(source: Source, limit_per_class: int) -> Source:
    taken: dict[int, int] = {}
    items = []
    for item in sorted(source.items, key=lambda item: item.name):
        taken[item.label] = taken.get(item.label, 0) + 1
        if taken[item.label] <= limit_per_class:
            items.append(item)
    return replace(source, items=items)
