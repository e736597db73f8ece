"""Training on a part of a set: which samples, their names, and the order over them alone."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.order import Ids, Order
from simclr_dali.pipeline.philox import SUBSET, permutation
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import ShardSet, member_name
from simclr_dali.shards.tar import key_of

# Below this share of a set its samples are read one by one; above, whole shards are fetched ahead.
SPARSE = 0.25


@dataclass(frozen=True, eq=False)
class Subset:
    """As :class:`Order`, over the samples ``ids`` (in storage order) alone."""

    shards: ShardSet
    ids: Ids
    global_batch: int
    lanes: int
    window: int
    seed: int
    _order: Order = field(init=False)
    _numbers: Ids = field(init=False)  # of the shards that hold any of them

    def __post_init__(self) -> None:
        numbers, sizes = np.unique(self.shards.samples["shard"][self.ids], return_counts=True)
        order = Order(tuple(sizes.tolist()), self.global_batch, self.lanes, self.window, self.seed)
        object.__setattr__(self, "_order", order)
        object.__setattr__(self, "_numbers", numbers)

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps_per_epoch

    def after(self, epoch: int, step: int) -> tuple[int, int]:
        return self._order.after(epoch, step)

    def local_batch(self, world: int) -> int:
        return self._order.local_batch(world)

    def batch(self, epoch: int, step: int, rank: int = 0, world: int = 1) -> Ids:
        return self.ids[self._order.batch(epoch, step, rank, world)]

    def windows(self, epoch: int, step: int, rank: int = 0, world: int = 1) -> tuple[list[int], list[int]]:
        if len(self.ids) < SPARSE * len(self.shards):
            return [], []
        current, upcoming = self._order.windows(epoch, step, rank, world)
        return self._numbers[current].tolist(), self._numbers[upcoming].tolist()

    def fingerprint(self) -> str:
        """sha256 of the ids."""
        return hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()


def class_balanced(labels: npt.NDArray[np.int32], classes: int, fraction: float, seed: int) -> Ids:
    """Ids, in storage order, of ``fraction`` of the samples: as many of each class, or one more.

    A pure function of its arguments. A class that has fewer gives all it has, and the fraction 1 is all samples, of
    whatever class. Raises UserError where that is less than one per class.
    """
    total = round(fraction * len(labels))
    each, more = divmod(total, classes)
    if each < 1:
        raise UserError(
            f"a fraction of {fraction:g} of {len(labels)} images is {total}, less than one for each of {classes} "
            "classes; give a larger --fraction"
        )
    if fraction == 1:
        return np.arange(len(labels))
    favoured = set(permutation(classes, seed, SUBSET, 0)[:more].tolist())
    shuffled = permutation(len(labels), seed, SUBSET, 1)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    starts = np.searchsorted(labels[by_class], np.arange(classes))
    ends = np.searchsorted(labels[by_class], np.arange(classes), "right")
    parts = [
        by_class[start : min(end, start + each + (label in favoured))]
        for label, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    return np.sort(np.concatenate(parts))


def keys(split: Split, ids: Ids | None = None) -> list[str]:
    """The WebDataset key of each of ``ids`` (default: all), which names the picture it was packed from.

    Raises UserError where a tar is damaged there.
    """
    shards, files, found = split.shards, split.open_files(), []
    try:
        for sample in range(len(shards)) if ids is None else ids:
            row = shards.samples[sample]
            with files.opened(int(row["shard"])) as descriptor, open(descriptor, "rb", 0, closefd=False) as tar:
                name = member_name(tar, int(row["offset"]), int(row["length"]))
            if name is None:
                raise UserError(f"damaged name of the sample in {shards.where(int(sample))}; copy the shard again")
            found.append(name.rpartition(".")[0])
    finally:
        files.close()
    return found


def ids_of_names(names: Iterable[str], split: Split, what: str) -> Ids:
    """Ids, in storage order, of the samples whose pictures are named: ``n01440764_10026.JPEG``, or ``class/name``.

    what: the list, for a message. Raises UserError where a name is not in the set, or is there more than once.
    """
    places: dict[tuple[str, str], list[int]] = {}
    shards = split.shards
    labels = shards.samples["label"]
    for sample, key in enumerate(keys(split)):
        stem = _stem(key)
        for folder in {"", shards.class_name(int(labels[sample]))}:
            places.setdefault((folder, stem), []).append(sample)
    wanted = {}
    for name in filter(None, map(str.strip, names)):
        folder = name.rpartition("/")[0].rpartition("/")[2]
        wanted[name] = (folder if folder in shards.classes else "", _stem(key_of(0, name)))
    if not wanted:
        raise UserError(f"{what} names no pictures; give one per line")
    missing = sorted(name for name, place in wanted.items() if place not in places)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(wanted)} names of {what} are not in {shards.folder}: "
            f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; give the list of this data set"
        )
    twice = sorted(name for name, place in wanted.items() if len(places[place]) > 1)
    if twice:
        raise UserError(
            f"{what}: {twice[0]} is the name of {len(places[wanted[twice[0]]])} samples of {shards.folder}; write it "
            "as class/name"
        )
    return np.unique([places[place][0] for place in wanted.values()])


def _stem(key: str) -> str:
    """A key without the position that it begins with."""
    return key.partition("_")[2]
