"""Telling what kind of source lies in a folder."""

from pathlib import Path

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.sources import folder, ilsvrc, webtars
from simclr_dali.shards.sources.source import SPLITS, Source


def find_sources(root: Path, *, splits: tuple[str, ...] = SPLITS, limit_per_class: int | None = None) -> list[Source]:
    """The wanted splits of whatever lies in ``root``; an image folder is taken before archives beside it.

    ``limit_per_class`` keeps the first pictures of each class, in the order of their names. Raises UserError where
    nothing is found, and what the kinds themselves raise.
    """
    if not root.is_dir():
        raise UserError(f"{root} does not exist or is no folder; give a folder with train/<class>/* and val/<class>/*")
    for kind in (folder, ilsvrc, webtars):
        if kind.is_here(root):
            found = kind.scan(root, splits)
            break
    else:
        raise UserError(
            f"{root} has no pictures to pack; expected {root}/train/<class>/*.jpg, or {ilsvrc.TRAIN}, or WebDataset "
            f"tars (train/*.tar or *train*.tar)"
        )
    if not found:
        raise UserError(f"{root} has nothing for --split {splits[0]}; choose another split")
    if limit_per_class is not None:
        found = [_limited(source, limit_per_class) for source in found]
    return found


def _limited(source: Source, limit_per_class: int) -> Source:
    taken = [0] * len(source.classes)
    items = []
    for item in sorted(source.items, key=lambda item: item.name):
        taken[item.label] += 1
        if taken[item.label] <= limit_per_class:
            items.append(item)
    return Source(source.root, source.split, source.classes, items, source.watched)
