"""Telling what kind of source lies in a folder, split by split, and counting what lies beside the splits."""

import os
from dataclasses import replace
from pathlib import Path

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.left_out import LeftOut
from simclr_dali.shards.manifest import MANIFEST, TABLE
from simclr_dali.shards.sources import folder, ilsvrc, webtars
from simclr_dali.shards.sources.class_list import CLASSES
from simclr_dali.shards.sources.source import DEFAULT_SPLITS, SPLITS, Listing, Source, folders_in, tars_in
from simclr_dali.shards.sources.splits import data_folder, split_folder, split_tars, splits_in_name
from simclr_dali.shards.walk import PICTURE_ENDINGS, ending_of, is_picture, path_passed_over, walk
from simclr_dali.shards.wording import counted, of_classes

_ARCHIVES = {"train": ilsvrc.TRAIN, "val": ilsvrc.VAL}
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".rar", ".7z")
# Beside the archives and tars that were listed, what says something of them.
_USED = frozenset({CLASSES, MANIFEST, TABLE, ilsvrc.DEVKIT, ilsvrc.SOLUTION})


def find_sources(
    root: Path,
    *,
    splits: tuple[str, ...] = DEFAULT_SPLITS,
    exclude: frozenset[Path] = frozenset(),
) -> Listing:
    """The wanted splits of whatever lies in ``root``; a folder of a split is taken before archives beside it.

    A folder without any split is one tree of pictures without labels, packed as train. ``exclude`` are folders in
    ``root`` that do not belong to it. Raises UserError where nothing is found, and what the kinds themselves raise.
    """
    if not root.is_dir():
        raise UserError(f"{root} does not exist or is no folder; give a folder with train/<class>/* and val/<class>/*")
    data = data_folder(root)
    found = [source for split in splits if (source := _scan(data, root, split, exclude))]
    if not found and not any(_is_here(data, split) for split in SPLITS):
        return _without_splits(root, splits, exclude)
    if not found:
        there = " and ".join(split for split in SPLITS if _is_here(data, split))
        raise UserError(f"{root} has nothing for --split {splits[0]}, only {there}; choose another split")
    if [source.split for source in found] == ["val"] and "train" in splits and split_folder(data, "val"):
        raise UserError(
            f"{data} has no folder 'train'; expected {data}/train/<class>/* and {data}/val/<class>/*, or give --split "
            f"val to pack val alone"
        )
    found = _with_same_classes(data, found)
    return Listing(found, _beside(root, data, found, exclude))


def _is_here(data: Path, split: str) -> bool:
    return split_folder(data, split) is not None or _has_archive(data, split) or bool(split_tars(data, split))


def _has_archive(place: Path, split: str) -> bool:
    return split in _ARCHIVES and (place / _ARCHIVES[split]).is_file()


def _scan(data: Path, root: Path, split: str, exclude: frozenset[Path]) -> Source | None:
    """One split, or None where it is not there."""
    here = split_folder(data, split)
    if here is not None and not (_has_archive(data, split) and _is_empty(here)):
        if _has_archive(here, split) and not _has_pictures(here):
            return _scan_archive(data, root, split, f"{here.name}/{_ARCHIVES[split]}")
        return _scan_folder(data, root, split, here, exclude)
    if _has_archive(data, split):
        return _scan_archive(data, root, split, _ARCHIVES[split])
    if tars := split_tars(data, split):
        return webtars.scan(data, split, tars)
    for path in sorted(data.iterdir()):
        if _is_compressed(path) and path.name != ilsvrc.DEVKIT and split in splits_in_name(path):
            raise UserError(f"{path} is compressed, and pictures are read in place; unpack it first")
    return None


def _is_compressed(path: Path) -> bool:
    return path.name.lower().endswith(_COMPRESSED) and path.is_file()


def _is_empty(folder: Path) -> bool:
    return next(walk(folder, LeftOut()), None) is None


def _scan_archive(data: Path, root: Path, split: str, archive: str) -> Source:
    if split == "train":
        return ilsvrc.scan_train(data, archive)
    return ilsvrc.scan_val(data, [*_truth_folders(data, root), (data / archive).parent], archive)


def _scan_folder(data: Path, root: Path, split: str, here: Path, exclude: frozenset[Path]) -> Source:
    """A folder of pictures or class archives; where it has neither, the tars in and under it."""
    if folder.class_tars(here) or any(map(_has_pictures, folders_in(here))):
        tars = []
    elif not (tars := tars_in(here)) and not _has_pictures(here):
        tars = [data / file.path for file in walk(data, LeftOut(), below=here.name) if _is_tar(file.path)]
    if not tars:
        return folder.scan(data, split, here.name, [*_truth_folders(data, root), here], exclude)
    left_out = LeftOut()
    tars = []
    for path, _, _ in walk(data, left_out, below=here.name, exclude=exclude):
        if _is_compressed(data / path):
            raise UserError(f"{data / path} is compressed, and pictures are read in place; unpack it first")
        if _is_tar(path):
            tars.append(data / path)
        elif path.rpartition("/")[2] in _USED:
            continue
        elif is_picture(data / path, path, left_out):
            left_out.add("picture beside tars", path, lost=True)
    return webtars.scan(data, split, sorted(tars), left_out)


def _is_tar(path: str) -> bool:
    return ending_of(path) == "tar"


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
        refuse_val_without_labels(data, source, names)
        if _are_indices(names) and _are_indices(source.classes) and len(source.classes) > len(names):
            names = source.classes
    return [relabelled(data, source, names) for source in found]


def refuse_val_without_labels(data: Path, source: Source, names: list[str]) -> None:
    """Raise UserError where val has no labels and train has: evaluations could not read it."""
    if source.split == "val" and names and not source.classes:
        raise UserError(
            f"the {counted(len(source.items), 'picture')} of val in {data} have no labels, and those of train have; "
            f"sort them into class folders, or put {ilsvrc.DEVKIT} or Kaggle's {ilsvrc.SOLUTION} into {data} (for "
            f"ILSVRC2012_val_*.JPEG), or pack with --split train"
        )


def _are_indices(names: list[str]) -> bool:
    return names == [str(number) for number in range(len(names))]


def relabelled(data: Path, source: Source, names: list[str]) -> Source:
    """``source`` with labels that are places in ``names``; raises UserError where those lack one of its classes."""
    if not names or not source.classes or source.classes == names:
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


def _without_splits(root: Path, splits: tuple[str, ...], exclude: frozenset[Path]) -> Listing:
    """What lies in a folder that has no splits: class archives, a tree of pictures, or tars; all of it is train."""
    if splits[0] != "train":
        raise UserError(f"{root} has no splits, so there is nothing for --split {splits[0]}; leave it out")
    tars = tars_in(root)
    beside = LeftOut()
    if tars and all(ilsvrc.CLASS_TAR.fullmatch(path.name) for path in tars):
        source = folder.scan(root, "train", "", [root], exclude)
    elif (tree := folder.scan_tree(root, "train", exclude)) is not None:
        source = tree
    elif tars:
        source = webtars.scan(root, "train", tars)
        beside = _beside(root, root, [source], exclude)
    else:
        raise UserError(
            f"{root} has no pictures to pack; expected {root}/train/<class>/*.jpg, or {ilsvrc.TRAIN}, or WebDataset "
            f"tars (train/*.tar or *train*.tar), or any tree of pictures without labels"
        )
    classes = of_classes(len(source.classes)) if source.classes else "without labels (classes would be train/<class>)"
    note = f"{root} has no folder train: {counted(len(source.items), 'picture')} in it are train, {classes}"
    return Listing([source], beside, note)


def of_split(split: str) -> str:
    """The reason for which files of a split are left out that was not asked for."""
    return f"of the split {split} (--split {split} packs it, where it has labels as the others have)"


def _beside(root: Path, data: Path, found: list[Source], exclude: frozenset[Path]) -> LeftOut:
    """Count what lies in ``root`` and belongs to no split that was listed."""
    left_out = LeftOut()
    folders = {here: split for split in SPLITS if (here := split_folder(data, split)) is not None}
    listed = {source.split for source in found}
    used = {data / path for source in found for path in source.watched}
    listed_folders = {(path.stat().st_dev, path.stat().st_ino) for path in used if path.is_dir()}
    for inside, names, files in os.walk(root):
        place = Path(inside)
        if place != root and (place.stat().st_dev, place.stat().st_ino) in listed_folders:
            names.clear()
            continue  # its files were listed through a link
        for name in names:
            if (place / name).is_symlink() and place / name not in folders:
                left_out.add("link to a folder beside the splits", str((place / name).relative_to(root)))
        names[:] = [name for name in names if place / name not in exclude and folders.get(place / name) not in listed]
        here_is = next((split for path, split in folders.items() if path == place or path in place.parents), None)
        for name in files:
            below = str((place / name).relative_to(root))
            split = here_is or (_split_of_tar(place / name) if place == data else None)
            if reason := path_passed_over(below):
                left_out.add(reason, below)
            elif split is not None and split not in listed:
                left_out.add(of_split(split), below)
            elif place / name not in used and name not in _USED:
                left_out.add("beside the splits", below)
    return left_out


def _split_of_tar(path: Path) -> str | None:
    if path.suffix != ".tar":
        return None
    named = splits_in_name(path)
    return named[0] if len(named) == 1 else None  # one of two splits is unpacked beside it, or it would not come here


def limited(source: Source, limit_per_class: int) -> Source:
    """The first pictures of each class, in the order of their names; those without labels count as one class.

    The others are counted as left out.
    """
    taken: dict[int, int] = {}
    items = []
    for item in sorted(source.items, key=lambda item: item.name):
        taken[item.label] = taken.get(item.label, 0) + 1
        if taken[item.label] <= limit_per_class:
            items.append(item)
        else:
            source.left_out.add("beyond --limit-per-class", item.name)
    return replace(source, items=items)
