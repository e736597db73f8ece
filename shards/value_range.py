"""What the values of pictures with more than 8 bits mean: looked at before anything is packed."""

from typing import Any

import numpy as np
import numpy.typing as npt

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.image import RangeError, Storage, UnusableError, convert, deep_values, is_deep
from simclr_dali.shards.sources.source import Item, Source, read_item
from simclr_dali.shards.sources.walk import ending_of, endings

PERCENTILES = (0.1, 99.9)
_MEASURED = 500  # pictures of a set, spread evenly
_VALUES = 20_000  # of each of them
_CHECKED = 64  # pictures of a split that are tried before its packing begins
_EIGHT_BIT_ENDINGS = endings("jpg jpeg jpe jfif jif gif webp bmp dib")


def parse_range(text: str) -> tuple[float, float]:
    """``LOW:HIGH`` as two numbers; raises ValueError."""
    low, colon, high = text.partition(":")
    if not colon:
        raise ValueError(f"{text!r} is not LOW:HIGH")
    return float(low), float(high)


def measure_range(sources: list[Source]) -> tuple[float, float]:
    """The 0.1 and 99.9 percentile of the values of up to 500 pictures of more than 8 bits, over all splits.

    Raises UserError where there is none of them, or their values are all the same.
    """
    found: list[npt.NDArray[Any]] = []
    candidates = [(source.root, item) for source in sources for item in _candidates(source)]
    for root, item in _spread(candidates, _MEASURED):
        try:
            values = deep_values(read_item(root, item))
        except UnusableError:
            continue
        if values is not None:
            finite = values[np.isfinite(values)].astype(np.float64)
            found.append(finite[:: max(1, len(finite) // _VALUES)])
    if not found:
        raise UserError("--range auto: no picture of more than 8 bits was found; leave --range out")
    low, high = (float(value) for value in np.percentile(np.concatenate(found), PERCENTILES))
    if not low < high:
        raise UserError(f"--range auto: all values of the pictures are {low:g}; give --range LOW:HIGH")
    return low, high


def check_depth(sources: list[Source], how: Storage) -> None:
    """Raise UserError where one of some pictures of each split has more than 8 bits, and no range says what they mean.

    The rest is found while packing; this keeps most such sets from being refused after an hour.
    """
    for source in sources:
        for item in _spread(_candidates(source), _CHECKED):
            try:
                encoded = read_item(source.root, item)
                if is_deep(encoded):
                    convert(encoded, how)
            except RangeError as error:
                raise UserError(f"{source.root / item.path}{item.inside()}: {error}") from error
            except UnusableError:
                continue  # counted when it is packed


def _candidates(source: Source) -> list[Item]:
    return [item for item in source.items if ending_of(item.name) not in _EIGHT_BIT_ENDINGS]


def _spread(things: list[Any], count: int) -> list[Any]:
    return [things[i] for i in np.unique(np.linspace(0, len(things) - 1, min(count, len(things))).astype(int))]
