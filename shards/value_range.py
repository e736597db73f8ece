"""What the values of pictures with more than 8 bits mean: looked at before anything is packed."""

from typing import Any

import numpy as np
import numpy.typing as npt

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.image import RangeError, Storage, UnusableError, convert, deep_values, is_high_bit_depth
from simclr_dali.shards.sources.source import Item, Source, read_item
from simclr_dali.shards.walk import ending_of, endings

PERCENTILES = (0.1, 99.9)
_LOOKED_AT, _MEASURED = 20_000, 500  # pictures of a set
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

    They are looked for among up to 20,000 pictures of endings that may have so many bits, spread evenly.

    Raises UserError where there is none of them, or their values are all the same.
    """
    found: list[npt.NDArray[Any]] = []
    color = False
    candidates = [(source.root, item) for source in sources for item in _candidates(source)]
    for root, item in _spread(candidates, _LOOKED_AT):
        if len(found) == _MEASURED:
            break
        try:
            encoded = read_item(root, item)
        except UnusableError:
            continue
        values = deep_values(encoded)
        color = color or (values is None and is_high_bit_depth(encoded))
        if values is not None:
            finite = values[np.isfinite(values)].astype(np.float64)
            found.append(finite[:: max(1, len(finite) // _VALUES)])
    if not found and color:
        raise UserError("--range auto: the pictures of more than 8 bits are color, which no range scales; leave it out")
    if not sum(map(len, found)):
        raise UserError("--range auto: no picture of more than 8 bits was found that has values; leave --range out")
    low, high = (float(value) for value in np.percentile(np.concatenate(found), PERCENTILES))
    if not low < high:
        raise UserError(f"--range auto: all values of the pictures are {low:g}; give --range LOW:HIGH")
    return low, high


def check_bit_depth(sources: list[Source], storage: Storage) -> None:
    """Raise UserError where one of some pictures of each split has more than 8 bits, and no range says what they mean.

    The rest is found while packing; this keeps most such sets from being refused after an hour.
    """
    for source in sources:
        for item in _spread(_candidates(source), _CHECKED):
            try:
                encoded = read_item(source.root, item)
                if is_high_bit_depth(encoded):
                    convert(encoded, storage)
            except RangeError as error:
                raise UserError(f"{source.root / item.path}{item.inside()}: {error}") from error
            except UnusableError:
                continue  # counted when it is packed


def _candidates(source: Source) -> list[Item]:
    return [item for item in source.items if ending_of(item.name) not in _EIGHT_BIT_ENDINGS]


def _spread(things: list[Any], count: int) -> list[Any]:
    """Up to ``count`` of the things, evenly spread, in an order in which every beginning is spread as well."""
    places = np.unique(np.linspace(0, len(things) - 1, min(count, len(things))).astype(int))
    golden = np.argsort(np.arange(len(places)) * 0.6180339887498949 % 1, kind="stable")
    return [things[i] for i in places[golden]]
