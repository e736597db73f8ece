"""Draw a labelled set of pictures for the quickstart: twelve classes that differ in shape and texture only.

    python scripts/draw_pictures.py OUT

Each class is one of four outlines (disc, square, triangle, cross) filled with one of three textures (stripes, checks,
dots). Colors, background, position, size, rotation, scale of the texture and noise are drawn at random for every
picture and independently of the class; outlines cover the same area and textures are half one tone, half the other,
so neither mean color nor brightness tells a class.
"""

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image
from tqdm import tqdm

Plane = npt.NDArray[np.float64]

SHAPES = ("disc", "square", "triangle", "cross")
TEXTURES = ("stripes", "checks", "dots")
CLASSES = tuple(f"{texture}-{shape}" for texture in TEXTURES for shape in SHAPES)
PICTURE_SIZE = 96  # pixels
TRAIN_PER_CLASS, VAL_PER_CLASS = 200, 60


def outline(shape: str, x: Plane, y: Plane) -> Plane:
    """True inside a shape of area pi around the origin; x and y in units of the disc's radius."""
    inside: Plane
    if shape == "disc":
        inside = x * x + y * y < 1
    elif shape == "square":
        inside = np.maximum(np.abs(x), np.abs(y)) < np.sqrt(np.pi) / 2
    elif shape == "triangle":
        inradius = np.sqrt(np.pi / (3 * np.sqrt(3)))
        angles = np.deg2rad([90.0, 210.0, 330.0])
        inside = np.all([x * np.cos(a) + y * np.sin(a) < inradius for a in angles], axis=0)
    else:  # a cross of five squares
        arm = np.sqrt(np.pi / 5) / 2
        along, across = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        inside = (across < arm) & (along < 3 * arm)
    return inside


def texture_pattern(texture: str, x: Plane, y: Plane) -> Plane:
    """True on half of the plane; x and y in units of the texture's period."""
    pattern: Plane
    if texture == "stripes":
        pattern = x % 1 < 0.5
    elif texture == "checks":
        pattern = (np.floor(2 * x) + np.floor(2 * y)) % 2 == 0
    else:
        pattern = np.hypot(x % 1 - 0.5, y % 1 - 0.5) < np.sqrt(0.5 / np.pi)
    return pattern


def rotated(x: Plane, y: Plane, angle: float) -> tuple[Plane, Plane]:
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def draw_picture(name: str, random: np.random.Generator) -> PIL.Image.Image:
    """One picture of class ``name``."""
    texture, shape = name.split("-")
    y, x = np.mgrid[:PICTURE_SIZE, :PICTURE_SIZE] + 0.5
    radius = PICTURE_SIZE * random.uniform(0.24, 0.34)
    at_x, at_y = random.uniform(1.05 * radius, PICTURE_SIZE - 1.05 * radius, 2)
    tilt = random.uniform(0, 2 * np.pi)
    x0, y0 = rotated(x - at_x, y - at_y, tilt)
    inside = outline(shape, x0 / radius, y0 / radius)
    period = radius * random.uniform(0.35, 0.6)
    tx, ty = rotated(x + random.uniform(0, period), y + random.uniform(0, period), random.uniform(0, 2 * np.pi))
    pattern = texture_pattern(texture, tx / period, ty / period)

    tones = random.uniform(0, 255, (2, 3))
    while np.abs(tones[0] - tones[1]).mean() < 60:  # the texture must be visible
        tones = random.uniform(0, 255, (2, 3))
    corner, slope = random.uniform(30, 225, 3), random.uniform(-60, 60, (2, 3))
    background = corner + (x / PICTURE_SIZE)[..., None] * slope[0] + (y / PICTURE_SIZE)[..., None] * slope[1]
    fill = np.where(pattern[..., None], tones[0], tones[1])
    picture = np.where(inside[..., None], fill, background) + random.normal(0, 8, (PICTURE_SIZE, PICTURE_SIZE, 1))
    return PIL.Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def draw_set(
    out: Path, train_per_class: int = TRAIN_PER_CLASS, val_per_class: int = VAL_PER_CLASS, seed: int = 0
) -> None:
    """Write ``out/{train,val}/<class>/<number>.jpg``; the same seed draws the same pictures."""
    random = np.random.default_rng(seed)
    for split, count in (("train", train_per_class), ("val", val_per_class)):
        for name in tqdm(CLASSES, f"draw {split}", disable=None, leave=False):
            folder = out / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                draw_picture(name, random).save(folder / f"{number:04d}.jpg", quality=92)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the quickstart's pictures.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    draw_set(parser.parse_args().out)
