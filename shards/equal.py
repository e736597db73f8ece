"""Byte-equal pictures of a packed set: in train and val, in two classes, or twice in one."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from simclr_dali.shards.manifest import ShardSet, member_name

_LISTED = 1000  # groups that are named; the counts are of all
ACROSS_SPLITS, ACROSS_CLASSES, WITHIN_A_CLASS = "in two splits", "in two classes", "twice in one class"


@dataclass(frozen=True)
class _Place:
    split: str
    label: int
    class_name: str | None
    name: str


def equal_images(splits: Iterable[ShardSet], originals: dict[str, list[str]]) -> dict[str, Any]:
    """Counts of groups of equal pictures by kind, and the names of the first thousand groups.

    A group counts once, by the first kind that it is of. Pictures of one crc32 and size are read and compared by
    their sha256; others are not read. originals: of a split, the names in its source by the position that keys begin
    with; names in the tars are given where they are not known any more.
    """
    counts = dict.fromkeys((ACROSS_SPLITS, ACROSS_CLASSES, WITHIN_A_CLASS), 0)
    listed: list[dict[str, Any]] = []
    for group in _groups(list(splits), originals):
        kind = _kind(group)
        counts[kind] += 1
        if len(listed) < _LISTED:
            listed.append({"kind": kind, "images": [_named(place) for place in group]})
    return {"counts": counts, "groups": listed}


def _kind(group: list[_Place]) -> str:
    if len({place.split for place in group}) > 1:
        return ACROSS_SPLITS
    return ACROSS_CLASSES if len({place.label for place in group}) > 1 else WITHIN_A_CLASS


def _named(place: _Place) -> dict[str, str | None]:
    return {"split": place.split, "class": place.class_name, "name": place.name}


def _groups(splits: list[ShardSet], originals: dict[str, list[str]]) -> Iterator[list[_Place]]:
    """Groups of two and more equal pictures, in the order in which they are stored."""
    keys = np.concatenate(
        [shards.samples["crc32"].astype(np.uint64) << np.uint64(32) | shards.samples["length"] for shards in splits]
    )
    starts = np.cumsum([0, *map(len, splits)])
    order = np.argsort(keys, kind="stable")
    same_as_next = np.flatnonzero(np.diff(keys[order]) == 0)
    runs = np.split(same_as_next, np.flatnonzero(np.diff(same_as_next) > 1) + 1) if len(same_as_next) else []
    candidates = [order[run[0] : run[-1] + 2] for run in runs]
    for group in sorted(candidates, key=lambda group: int(group[0])):
        equal: defaultdict[bytes, list[_Place]] = defaultdict(list)
        for place in group:
            split = int(np.searchsorted(starts, place, "right")) - 1
            digest, found = _read(splits[split], int(place - starts[split]), originals.get(splits[split].split))
            equal[digest].append(found)
        yield from (places for places in equal.values() if len(places) > 1)


def _read(shards: ShardSet, sample: int, originals: list[str] | None) -> tuple[bytes, _Place]:
    row = shards.samples[sample]
    tar_name = shards.shards[row["shard"]].name
    with (shards.folder / tar_name).open("rb") as tar:
        name = member_name(tar, int(row["offset"]), int(row["length"]))
        tar.seek(int(row["offset"]))
        digest = hashlib.sha256(tar.read(int(row["length"]))).digest()
    label = int(row["label"])
    class_name = shards.classes[label] if label >= 0 else None
    known = originals[int(name.partition("_")[0])] if originals and name else f"{tar_name}: {name}"
    return digest, _Place(shards.split, label, class_name, known)
