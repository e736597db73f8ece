"""What a pack is going to make: its options, and which images go into which shard."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.image import REENCODE, Storage
from simclr_dali.shards.sources.source import SPLITS, Item, Source

DECODERS = ("cpu", "gpu", "none")
_HEADERS = 3 * 512  # bytes a sample takes in its tar beside the image: two headers and the label's block
_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Options(Storage):
    """Everything that decides the bytes of the result."""

    samples_per_shard: int = 1000
    """About; shards get equal sizes."""
    shard_size: float | None = None
    """Megabytes per shard instead, about."""
    seed: int = 0
    """Of the global shuffle."""
    limit_per_class: int | None = None
    """How many images of each class are packed, the first by name; None: all."""
    split: str | None = None
    """The only one that is packed; None: train and val, as far as they are there."""
    decoder: str = "cpu"
    """Which one must take every image: DALI's on "cpu" or "gpu", or "none"."""

    def check(self) -> None:
        """Raise UserError for a value that cannot be meant."""
        for name in ("samples_per_shard", "resize", "limit_per_class", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.shard_size is not None and not self.shard_size > 0:
            raise UserError(f"--shard-size is {self.shard_size}; it must be a number of megabytes above 0")
        if self.shard_size is not None and self.resize is not None:
            raise UserError(
                f"--shard-size {self.shard_size:g} needs the images' sizes, which --resize {self.resize} changes; "
                f"give --samples-per-shard"
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed is {self.seed}; it must lie in 0 .. 2^63-1")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}; it must lie in 1 .. 100")
        if self.split is not None and self.split not in SPLITS:
            raise UserError(f"--split is {self.split!r}; it must be one of {', '.join(SPLITS)}")
        if self.reencode is not None and self.reencode not in REENCODE:
            raise UserError(f"--reencode is {self.reencode!r}; it must be {' or '.join(REENCODE)}")
        if self.value_range is not None and not -math.inf < self.value_range[0] < self.value_range[1] < math.inf:
            low, high = self.value_range
            raise UserError(f"--range is {low:g}:{high:g}; it must be LOW:HIGH with LOW below HIGH, such as 0:4095")
        if self.decoder not in DECODERS:
            raise UserError(f"--decoder is {self.decoder!r}; it must be one of {', '.join(DECODERS)}")


def storage_order(samples: int, seed: int, split: str) -> npt.NDArray[np.int64]:
    """A random permutation of 0..samples-1: the order in which a split is stored.

    It sorts words of the raw Philox stream: NumPy keeps its bit generators stable over releases, but not the
    methods of Generator, and a pack that is continued by a newer NumPy must stay byte-identical.
    """
    key = [seed, int.from_bytes(split.encode("ascii"), "little")]
    words = np.random.Philox(key=np.array(key, np.uint64)).random_raw(samples)
    return np.argsort(words, kind="stable")


def split_into_shards(source: Source, options: Options) -> list[npt.NDArray[np.int64]]:
    """Which items go into which shard, in order.

    Shards get equal numbers of samples, within one, because that keeps the lanes of the data order equal.
    """
    order = storage_order(len(source.items), options.seed, source.split)
    if options.shard_size is None:
        count = round(len(order) / options.samples_per_shard)
    else:
        count = round(tar_bytes(source.items) / (options.shard_size * _MEGABYTE))
    return np.array_split(order, min(max(1, count), len(order)))


def tar_bytes(items: list[Item]) -> int:
    """Size of the tar members of ``items`` where their bytes are kept."""
    return sum(-(-item.length // 512) * 512 + _HEADERS for item in items)


def describe_pack(options: Options, source: Source) -> dict[str, Any]:
    """What the manifest of a split says of how it was made, under "made_with"."""
    return as_made_with(asdict(options), source.split) | {"source": source.fingerprint(times=False)}


def as_made_with(found: dict[str, Any], split: str) -> dict[str, Any]:
    """What a manifest says of how ``split`` was made, as this version would say it.

    Options that an older version did not have take their defaults, and which splits were packed together does not
    matter.
    """
    rest = asdict(Options()) | found
    del rest["split"]
    if isinstance(sources := rest.get("source"), dict):
        rest["source"] = sources.get(split)
    if rest["value_range"] is not None:
        rest["value_range"] = list(rest["value_range"])
    return rest
