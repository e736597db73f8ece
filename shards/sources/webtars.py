"""Listing WebDataset tars: ``train/*.tar`` and ``val/*.tar``, or tars of both in one folder told apart by name.

Of each sample the picture (``key.jpg`` or another ending of PICTURES) and the label (``key.cls``, a number) are taken.
Class names come from the manifest, where this packer wrote the tars, or from ``classes.txt`` beside them (a name a
line); otherwise classes are called by their numbers.
"""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import load_split
from simclr_dali.shards.sources.folder import PICTURE_ENDINGS
from simclr_dali.shards.sources.source import SPLITS, Item, Source, read_item, time_of
from simclr_dali.shards.tar import list_members

PICTURES = frozenset(ending.removeprefix(".") for ending in PICTURE_ENDINGS)
_WORDS = {"train": r"train(ing)?", "val": r"val(id|idation)?"}
_CLASSES = "classes.txt"


def is_here(root: Path) -> bool:
    """Whether ``root`` holds tars of a split."""
    return any(_tars(root, split) for split in SPLITS)


def scan(root: Path, splits: tuple[str, ...]) -> list[Source]:
    """List the wanted splits that exist; members of other kinds are counted and left out, with a line that says so.

    Raises UserError for a damaged tar, a sample without picture or label, a label that is no number or has no name.
    """
    found = [_scan_split(root, split) for split in splits if _tars(root, split)]
    count = 1 + max((item.label for source in found for item in source.items), default=-1)
    return [replace(source, classes=_class_names(root, source.split, count)) for source in found]


def _tars(root: Path, split: str) -> list[Path]:
    if (root / split).is_dir():
        return sorted((root / split).glob("*.tar"))
    word = re.compile(rf"(^|[^a-z]){_WORDS[split]}([^a-z]|$)")
    return sorted(path for path in root.glob("*.tar") if word.search(path.stem.lower()))


def _scan_split(root: Path, split: str) -> Source:
    items: list[Item] = []
    watched: dict[str, int] = {}
    left_out: Counter[str] = Counter()
    for path in tqdm(_tars(root, split), f"scan {split}", disable=None, leave=False):
        name = str(path.relative_to(root))
        watched[name] = time_of(path)
        pictures: dict[str, Item] = {}
        labels: dict[str, int] = {}
        for member, offset, length in list_members(path):
            folder, slash, base = member.rpartition("/")
            key, _, ending = base.partition(".")
            key = folder + slash + key
            found = Item(name, member, offset, length, -1, watched[name])
            if ending.lower() in PICTURES:
                if key in pictures:
                    raise UserError(f"{path}: sample {key!r} has two pictures; pack it anew with one each")
                pictures[key] = found
            elif ending.lower() == "cls":
                labels[key] = _label(root, found)
            else:
                left_out[ending] += 1
        if pictures.keys() != labels.keys():
            key = min(pictures.keys() ^ labels.keys())
            lacks = "label (.cls)" if key in pictures else f"picture (.{', .'.join(sorted(PICTURES))})"
            raise UserError(f"{path}: sample {key!r} has no {lacks}; pack it anew with both")
        items += [item._replace(label=labels[key]) for key, item in pictures.items()]
    for ending, count in sorted(left_out.items()):
        print(f"{split}: {count:,} members .{ending} are left out")
    if not items:
        raise UserError(f"the tars of {split} in {root} hold no samples; fetch them again, or choose another --split")
    return Source(root, split, [], items, watched)


def _label(root: Path, found: Item) -> int:
    text = read_item(root, found).strip()
    if not re.fullmatch(rb"\d{1,9}", text):
        raise UserError(f"{root / found.path}: {found.name!r} holds {text[:20]!r}, not the number of a class")
    return int(text)


def _class_names(root: Path, split: str, count: int) -> list[str]:
    """Names of at least ``count`` classes, by label."""
    if (root / split / "manifest.json").is_file():
        names = list(load_split(root, split).classes)
    elif (root / _CLASSES).is_file():
        names = (root / _CLASSES).read_text(encoding="utf-8").splitlines()
    else:
        return [str(number) for number in range(count)]
    if len(names) < count:
        raise UserError(f"{root} names {len(names)} classes, but a picture has label {count - 1}; complete {_CLASSES}")
    return names
