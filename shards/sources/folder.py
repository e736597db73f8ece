"""Listing an image folder: ``train/<class>/*`` and, where it exists, ``val/<class>/*``."""

import os
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.sources.source import SPLITS, Item, Source, time_of

# A picture is what has one of these endings; other files in a class folder are named, not silently left out.
PICTURE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff"})


def is_here(root: Path) -> bool:
    """Whether ``root`` has a folder of a split in which no tars lie."""
    return any((root / split).is_dir() and not any((root / split).glob("*.tar")) for split in SPLITS)


def scan(root: Path, splits: tuple[str, ...]) -> list[Source]:
    """List the wanted splits that exist; classes are the sorted folder names of ``train``, as torchvision's.

    Where only ``val`` is wanted and there is no ``train``, ``val`` names the classes. Raises UserError for a missing
    ``train``, a split without classes, a class without pictures, a file that is no picture, or a class that
    ``train`` does not have.
    """
    named_by = root / ("train" if "train" in splits or (root / "train").is_dir() else "val")
    if not named_by.is_dir():
        raise UserError(
            f"{root} has no folder {named_by.name!r}; expected {root}/train/<class>/* and {root}/val/<class>/*"
        )
    classes = _class_names(named_by)
    if not classes:
        raise UserError(f"{named_by} has no class folders; expected {named_by}/<class>/*.jpg")
    return [_scan_split(root, split, classes, named_by) for split in splits if (root / split).is_dir()]


def _scan_split(root: Path, split: str, classes: list[str], named_by: Path) -> Source:
    names = _class_names(root / split)
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UserError(
            f"{root / split} has the class folder {unknown[0]!r}, which {named_by} does not have; add or remove it"
        )
    items: list[Item] = []
    # Folder times come first: what is added while a folder is listed makes it newer than this.
    watched = {f"{split}/{name}": time_of(root / split / name) for name in names} | {split: time_of(root / split)}
    label_of = {name: label for label, name in enumerate(classes)}
    for name in tqdm(names, f"scan {split}", disable=None, leave=False):
        items += _pictures(root, f"{split}/{name}", label_of[name])
    return Source(root, split, classes, items, watched)


def _class_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _pictures(root: Path, folder: str, label: int) -> Iterator[Item]:
    empty = True
    for entry in sorted(os.scandir(root / folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        path = f"{folder}/{entry.name}"
        if Path(entry.name).suffix.lower() not in PICTURE_ENDINGS:
            raise UserError(
                f"{root / path} is not a picture ({', '.join(sorted(PICTURE_ENDINGS))}); move it out of the class "
                f"folder"
            )
        try:
            status = entry.stat()
        except OSError as error:
            raise UserError(f"cannot read {root / path} ({error.strerror}); repair or remove it") from error
        empty = False
        yield Item(path, path, 0, status.st_size, label, status.st_mtime_ns)
    if empty:
        raise UserError(f"class folder {root / folder} is empty; add pictures or remove it")
