"""Draw a labelled set of pictures for the quickstart: twelve classes that differ in shape and texture only.

    python scripts/draw_pictures.py OUT

Each class is a pattern in two tones that covers the picture. Tones, scale, rotation, position, a brightness gradient
and noise are drawn at random for every picture, independently of its class, and every pattern is half one tone and
half the other, so neither mean color nor brightness tells a class.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageFilter
from tqdm import tqdm

Plane = npt.NDArray[np.float64]

PICTURE_SIZE = (96, 96)  # width and height in pixels
TRAIN_PER_CLASS, VAL_PER_CLASS = 200, 60


def _stripes(x: Plane, y: Plane) -> Plane:
    return x % 1


def _waves(x: Plane, y: Plane) -> Plane:
    return (x + 0.35 * np.sin(np.pi * y)) % 1


def _zigzag(x: Plane, y: Plane) -> Plane:
    return (x + np.abs(y % 2 - 1)) % 1


def _checks(x: Plane, y: Plane) -> Plane:
    return (np.floor(2 * x) + np.floor(2 * y)) % 2


def _bricks(x: Plane, y: Plane) -> Plane:
    row = np.floor(2 * y)
    return np.minimum(_to_edge(2 * y), _to_edge(x + 0.5 * row) * 2)


def _dots(x: Plane, y: Plane) -> Plane:
    return np.hypot(_from_middle(x), _from_middle(y))


def _crosses(x: Plane, y: Plane) -> Plane:
    return np.minimum(np.abs(_from_middle(x)), np.abs(_from_middle(y)))


def _triangles(x: Plane, y: Plane) -> Plane:
    return sum(np.floor(2 * (x * np.cos(a) + y * np.sin(a))) for a in np.deg2rad([0.0, 120.0, 240.0])) % 2


def _rings(x: Plane, y: Plane) -> Plane:
    return np.hypot(x, y) % 1


def _rays(x: Plane, y: Plane) -> Plane:
    return np.arctan2(y, x) / (2 * np.pi) * 9 % 1


def _spiral(x: Plane, y: Plane) -> Plane:
    return (np.hypot(x, y) + 2 * np.arctan2(y, x) / (2 * np.pi)) % 1


def _eyes(x: Plane, y: Plane) -> Plane:
    return _dots(x, y) * 4 % 1


def _from_middle(x: Plane) -> Plane:
    return x % 1 - 0.5


def _to_edge(x: Plane) -> Plane:
    return 0.5 - np.abs(_from_middle(x))


PATTERNS: dict[str, Callable[[Plane, Plane], Plane]] = {
    function.__name__[1:]: function
    for function in (
        _bricks,
        _checks,
        _crosses,
        _dots,
        _eyes,
        _rays,
        _rings,
        _spiral,
        _stripes,
        _triangles,
        _waves,
        _zigzag,
    )
}
CLASSES = tuple(sorted(PATTERNS))


def draw_picture(name: str, random: np.random.Generator, size: tuple[int, int] = PICTURE_SIZE) -> PIL.Image.Image:
    """One picture of class ``name``; size: width and height in pixels."""
    wide, tall = size
    y, x = np.mgrid[:tall, :wide] + 0.5
    x, y = x - wide * random.uniform(0.3, 0.7), y - tall * random.uniform(0.3, 0.7)
    period = min(size) / random.uniform(3, 5)
    angle = random.uniform(0, 2 * np.pi)
    height = PATTERNS[name](
        (x * np.cos(angle) + y * np.sin(angle)) / period, (y * np.cos(angle) - x * np.sin(angle)) / period
    )
    # Cut at the median: half of the picture is one tone, half the other, and which of them is up to chance.
    on = (height < 0.5) if set(np.unique(height)) <= {0.0, 1.0} else height < np.median(height)

    tones = random.uniform(0, 255, (2, 3))
    while np.abs(tones[0] - tones[1]).mean() < 70:  # the pattern must be visible
        tones = random.uniform(0, 255, (2, 3))
    slope = random.uniform(-40, 40, (2, 3)) / min(size)
    light = x[..., None] * slope[0] + y[..., None] * slope[1] + random.normal(0, 6, (*x.shape, 1))
    picture = np.where(on[..., None], tones[0], tones[1]) + light
    return PIL.Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def draw_set(
    out: Path,
    train_per_class: int = TRAIN_PER_CLASS,
    val_per_class: int = VAL_PER_CLASS,
    seed: int = 0,
    size: tuple[int, int] = PICTURE_SIZE,
) -> None:
    """Write ``out/{train,val}/<class>/<number>.jpg``; the same seed draws the same pictures."""
    random = np.random.default_rng(seed)
    for split, count in (("train", train_per_class), ("val", val_per_class)):
        for name in tqdm(CLASSES, f"draw {split}", disable=None, leave=False):
            draw_class(out / split / name, count, random, size)


def draw_class(folder: Path, count: int, random: np.random.Generator, size: tuple[int, int]) -> None:
    """Write ``folder/<number>.jpg``, pictures of the class that the folder is named after."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        draw_picture(folder.name, random, size).save(folder / f"{number:04d}.jpg", quality=92)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the quickstart's pictures.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    draw_set(parser.parse_args().out)
