"""Listing WebDataset tars: those in the folder of a split, or those in one folder whose names hold the split.

Of each sample the picture (``key.jpg`` or another ending of a picture) and, where there are any, the label
(``key.cls``) are taken. Class names come from the manifest, where this packer wrote the tars, or from ``classes.txt``
beside them (a name a line); otherwise classes are called by their numbers.
"""

from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.left_out import LeftOut
from simclr_dali.shards.manifest import MANIFEST, load_split
from simclr_dali.shards.sources.class_list import CLASSES, labels_of_texts, read_classes
from simclr_dali.shards.sources.source import UNLABELLED, Item, Source, read_item, time_of
from simclr_dali.shards.tar import list_members
from simclr_dali.shards.walk import UNREADABLE_ENDINGS, ending_of, is_picture

_LABEL = "cls"


@dataclass
class _Samples:
    """What the tars of a split hold."""

    pictures: list[Item] = field(default_factory=list)
    texts: list[str | None] = field(default_factory=list)
    """What the label of each picture says; None where it has none."""
    orphans: list[str] = field(default_factory=list)
    """Labels without a picture."""


def scan(root: Path, split: str, tars: list[Path], left_out: LeftOut | None = None) -> Source:
    """List the pictures of ``tars``.

    left_out: what lies beside them and was counted before. Raises UserError for a damaged tar, a sample with two
    pictures, a label that cannot be understood, and where there are no pictures at all.
    """
    left_out = left_out or LeftOut()
    watched: dict[str, int] = {}
    samples = _Samples()
    for path in tqdm(tars, f"scan {split}", unit=" tars", disable=None, leave=False):
        name = str(path.relative_to(root))
        watched[name] = time_of(path)
        _list_tar(root, name, watched[name], samples, left_out)
    for orphan in samples.orphans:
        left_out.add("label without a picture", orphan, lost=True)
    if not samples.pictures:
        raise UserError(
            f"the tars of {split} in {root} hold no samples ({str(left_out) or 'they are empty'}); fetch them again, "
            f"or choose another --split"
        )
    texts = [text for text in samples.texts if text is not None]
    if not texts:
        return Source(root, split, [], samples.pictures, watched, left_out)
    labels, classes = labels_of_texts(texts, _class_names(root, split, tars), f"{root}, {split}")
    items, numbers = [], iter(labels)
    for item, text in zip(samples.pictures, samples.texts, strict=True):
        if text is None:
            left_out.add("no label (.cls)", item.name, lost=True)
        else:
            items.append(item._replace(label=next(numbers)))
    return Source(root, split, classes, items, watched, left_out)


def _list_tar(root: Path, path: str, modified: int, samples: _Samples, left_out: LeftOut) -> None:
    pictures: dict[str, Item] = {}
    labels: dict[str, Item] = {}
    lost: set[str] = set()  # samples that were counted with their picture
    for member, offset, length in list_members(root / path, left_out):
        found = Item(path, member, offset, length, UNLABELLED, modified)
        folder, slash, base = member.rpartition("/")
        stem = folder + slash + (base.rpartition(".")[0] or base)
        if ending_of(member) == _LABEL:
            if stem in labels and _text(root, labels[stem]) != _text(root, found):
                raise UserError(f"{root / path}: sample {stem!r} has two labels; pack it anew with one each")
            labels[stem] = found
        elif not is_picture(root / path, member, left_out, offset, length):
            if ending_of(member) in UNREADABLE_ENDINGS:
                lost.add(stem)
        else:
            if stem in pictures:
                raise UserError(f"{root / path}: sample {stem!r} has two pictures; pack it anew with one each")
            pictures[stem] = found
    keys = _keys(root / path, pictures, labels)
    for stem, item in pictures.items():
        key = keys[stem]
        if key is None:
            left_out.add("other picture of a sample", item.name)
            continue
        samples.pictures.append(item)
        samples.texts.append(_text(root, labels.pop(key)) if key in labels else None)
    samples.orphans += [item.name for stem, item in labels.items() if stem not in lost]


def _keys(path: Path, pictures: dict[str, Item], labels: dict[str, Item]) -> dict[str, str | None]:
    """The key of each picture, by its name without the last ending; None for one that is not a sample of its own.

    WebDataset ends a key at its first dot. But people put dots into keys too (``shot_2.3.png``), so the whole name
    counts where it has a label or nothing else has the shorter key.
    """
    keys: dict[str, str | None] = {}
    of_short: dict[str, str] = {}
    for stem in pictures:
        folder, slash, base = stem.rpartition("/")
        short = folder + slash + base.partition(".")[0]
        if stem in labels or short == stem:
            keys[stem] = stem
        elif short in pictures:
            keys[stem] = None  # such as 0007.mask.png beside 0007.jpg
        elif short not in labels:
            keys[stem] = stem
        elif short in of_short:
            raise UserError(f"{path}: sample {short!r} has two pictures; pack it anew with one each")
        else:
            keys[stem] = of_short[short] = short
    return keys


def _text(root: Path, found: Item) -> str | None:
    """What a label says; None where it is empty."""
    return read_item(root, found)[:1000].decode("utf-8", "replace").strip("\ufeff\0 \t\r\n") or None


def _class_names(root: Path, split: str, tars: list[Path]) -> list[str] | None:
    if (root / split / MANIFEST).is_file():
        return list(load_split(root, split).classes) or None
    for folder in (tars[0].parent, root):
        if (folder / CLASSES).is_file():
            return read_classes(folder / CLASSES)
    return None
