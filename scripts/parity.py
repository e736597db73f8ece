"""Does our graph do what torchvision does? The same draws through both, stage by stage.

    python scripts/parity.py IMAGES... --html out.html      # JPEG files or folders of them

Each stage is run alone: the reference is torchvision's function with the same numbers, applied to the crop that our
graph made (for the crop itself, to Pillow's picture). It runs on floats, as our graph does; on bytes, torchvision cuts
the fraction off after each step, which alone is half a level a step. Differences are in levels of 0..255. Stages with
a limit fail above it, and the exit code is then 1.

Three differences are by construction and are stated, not limited. Hue is a rotation in YIQ here and a shift in HSV
there; DALI has no operator that goes to HSV and back, so there is no option to have it. torchvision clips after each
color step, we clip once; without clipping the order of the steps changes nothing. And in views of 128 pixels and more
DALI mixes the pixel beside a crop that is enlarged into its border, where Pillow repeats the last one inside; smaller
views are cut out first (pipeline/graph.py, CUT_OUT_BELOW), as --size shows.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from simclr_dali.pipeline.image_files import find_images
from simclr_dali.shards.command_line import positive_int
from simclr_dali.shards.errors import UserError, run_main

SIZE = 224  # of a view, in pixels, where --size says nothing else


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare with torchvision.")
    parser.add_argument("images", type=Path, nargs="+", help="JPEG files, or folders of them")
    parser.add_argument("--html", type=Path, metavar="OUT", help="write the report with pictures and histograms")
    parser.add_argument("--most", type=positive_int, default=24, metavar="N", help="images to use (default: 24)")
    parser.add_argument("--size", type=positive_int, default=SIZE, metavar="PX", help=f"of a view (default: {SIZE})")
    parser.add_argument("--draws", type=positive_int, default=4, metavar="N", help="views of each (default: 4)")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch

from scripts.parity_page import Pixels, Result, Stage, Step, page
from simclr_dali.model.vision import torchvision
from simclr_dali.pipeline import graph
from simclr_dali.pipeline.color import LUMA
from simclr_dali.pipeline.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws, Recipe, draw
from simclr_dali.shards.durable import refusals_named
from simclr_dali.shards.image import rgb

RECIPE = Recipe(solarize=0.2)  # what can be drawn must be in the graph
ALL_STEPS = RECIPE.steps()
_F = torchvision.transforms.functional
_NEUTRAL = np.array([1.0, 1.0, 1.0, 0.0])


def compare(images: list[bytes], draws_per_image: int = 4, size: int = SIZE) -> list[Result]:
    """Run all stages. A stage that no view qualifies for is left out."""
    pictures = [rgb(data) for data in images for _ in range(draws_per_image)]
    encoded = [data for data in images for _ in range(draws_per_image)]
    width, height = np.array([picture.size for picture in pictures]).T
    drawn = draw(RECIPE, 0, 0, np.arange(len(pictures)), 0, width, height)
    always = np.ones(len(pictures), np.bool_)
    plain = replace(Draws.neutral(drawn.box), factors=drawn.factors, order=drawn.order, sigma=drawn.sigma)
    crops = _ours(encoded, plain, size)

    def only(*factors: int) -> Callable[[Draws], Draws]:
        kept = np.tile(_NEUTRAL, (len(pictures), 1))
        kept[:, factors] = drawn.factors[:, factors]
        return lambda d: replace(d, jitter=always, factors=kept)

    def jittered(*factors: int) -> Callable[[Draws, int], list[Step]]:
        return lambda d, row: [_ADJUST[step] for step in d.order[row] if step in factors]

    simple, all_four = (BRIGHTNESS, CONTRAST, SATURATION), (BRIGHTNESS, CONTRAST, SATURATION, HUE)
    stages = [
        Stage("flip", lambda d: replace(d, flip=always), lambda d, row: [_flip], 0.0),
        Stage("brightness", only(BRIGHTNESS), jittered(BRIGHTNESS), 1.5),
        Stage("contrast", only(CONTRAST), jittered(CONTRAST), 1.5),
        Stage("saturation", only(SATURATION), jittered(SATURATION), 1.5),
        Stage("gray", lambda d: replace(d, gray=always), lambda d, row: [_gray], 1.5),
        Stage("these three, nothing clipped between", only(*simple), jittered(*simple), 1.5, _stays_inside),
        Stage("these three, clipped between", only(*simple), jittered(*simple), None, lambda *x: not _stays_inside(*x)),
        Stage("hue", only(HUE), jittered(HUE), None),
        Stage("all four", only(*all_four), jittered(*all_four), None),
        Stage("blur", lambda d: replace(d, blur=always), lambda d, row: [_blur], 1.0),
        Stage("solarize", lambda d: replace(d, solarize=always), lambda d, row: [_solarize], 1.0),
        Stage("whole view, as drawn", lambda d: drawn, _whole, None),
    ]
    reference_crops = np.stack([_reference_crop(*pair, size) for pair in zip(pictures, drawn.box, strict=True)])
    results = [_result(Stage("crop and resize", lambda d: d, lambda d, row: [], 1.0), crops, reference_crops)]
    for stage in stages:
        changed = stage.change(plain)
        rows = [row for row in range(len(crops)) if stage.keep(crops[row], changed, row)]
        if rows:
            theirs = [_reference(crops[row], changed, row, stage.steps(changed, row)) for row in rows]
            results.append(_result(stage, _ours(encoded, changed, size)[rows], np.stack(theirs)))
    return results


def _result(stage: Stage, ours: Pixels, theirs: Pixels) -> Result:
    difference = np.abs(ours - theirs)
    return Result(stage, float(difference.mean()), float(difference.max()), ours, theirs)


def _ours(encoded: list[bytes], draws: Draws, size: int) -> Pixels:
    """Our graph's views, in levels; the normalisation is taken back and its rounding with it."""

    def batches() -> Iterator[list[Any]]:
        yield graph.graph_inputs([np.frombuffer(data, np.uint8) for data in encoded], [draws], ALL_STEPS, config)

    config = graph.LoaderConfig(size, torch.device("cpu"), threads=1, prefetch=1)
    source = batches()
    pipeline = graph.build(lambda: next(source), config, batch=len(encoded), views=1, steps=ALL_STEPS)
    (views,) = pipeline.run()
    levels: Pixels = np.asarray(views.as_tensor()).astype(np.float64) * graph.STD + graph.MEAN
    return levels.round(3)


def _reference(crop: Pixels, draws: Draws, row: int, steps: list[Step]) -> Pixels:
    """torchvision's steps on our crop."""
    image = torch.from_numpy(crop / 255).permute(2, 0, 1)
    for step in steps:
        image = step(image, draws, row)
    return 255 * image.permute(1, 2, 0).numpy()


def _reference_crop(picture: PIL.Image.Image, box: npt.NDArray[np.float64], size: int) -> Pixels:
    x0, y0, x1, y1 = (int(side) for side in box)
    return np.asarray(_F.resized_crop(picture, y0, x0, y1 - y0, x1 - x0, [size, size]), np.float64)


def _flip(image: torch.Tensor, draws: Draws, row: int) -> torch.Tensor:
    return _F.hflip(image)


def _gray(image: torch.Tensor, draws: Draws, row: int) -> torch.Tensor:
    return _F.rgb_to_grayscale(image, 3)


def _blur(image: torch.Tensor, draws: Draws, row: int) -> torch.Tensor:
    kernel = 2 * (image.shape[-1] // 10 // 2) + 1  # pixels, a tenth of the view, as the paper's
    return _F.gaussian_blur(image, [kernel, kernel], [float(draws.sigma[row])] * 2)


def _solarize(image: torch.Tensor, draws: Draws, row: int) -> torch.Tensor:
    return _F.solarize(image, draws.threshold[row] / 255)


_ADJUST: dict[int, Step] = {
    BRIGHTNESS: lambda image, draws, row: _F.adjust_brightness(image, draws.factors[row, BRIGHTNESS]),
    CONTRAST: lambda image, draws, row: _F.adjust_contrast(image, draws.factors[row, CONTRAST]),
    SATURATION: lambda image, draws, row: _F.adjust_saturation(image, draws.factors[row, SATURATION]),
    HUE: lambda image, draws, row: _F.adjust_hue(image, draws.factors[row, HUE]),
}


def _whole(draws: Draws, row: int) -> list[Step]:
    """The steps of a view in torchvision's order: flip, jitter, gray, blur, solarize."""
    steps: list[Step] = [_flip] if draws.flip[row] else []
    steps += [_ADJUST[step] for step in draws.order[row]] if draws.jitter[row] else []
    steps += [_gray] * bool(draws.gray[row]) + [_blur] * bool(draws.blur[row])
    return steps + [_solarize] * bool(draws.solarize[row])


def _stays_inside(crop: Pixels, draws: Draws, row: int) -> bool:
    """Whether no color step but the last leaves 0..255, so that clipping after each changes nothing."""
    x = crop
    for step in [step for step in draws.order[row] if step != HUE][:-1]:
        factor = draws.factors[row, step]
        if step == BRIGHTNESS:
            x = factor * x
        else:
            gray = x @ LUMA
            x = factor * x + (1 - factor) * (gray.mean() if step == CONTRAST else gray[..., None])
        if x.min() < 0 or x.max() > 255:
            return False
    return True


def _read(paths: list[Path], most: int) -> list[bytes]:
    files = find_images(paths)
    chosen = [files[place] for place in np.unique(np.linspace(0, len(files) - 1, min(most, len(files))).astype(int))]
    images = []
    for file in chosen:
        data = file.read_bytes()
        try:
            rgb(data)
        except OSError as error:
            raise UserError(f"{file} cannot be decoded ({error}); leave it out") from error
        images.append(data)
    return images


def main(given: argparse.Namespace) -> None:
    images = _read(given.images, given.most)
    results = compare(images, given.draws, given.size)
    print(f"{len(images)} images, {given.draws} draws each, {given.size} px; differences in levels of 0..255")
    print(f"{'':38} views     mean    worst    limit of the mean")
    for result in results:
        limit = "stated only" if result.stage.limit is None else f"{result.stage.limit:g}"
        verdict = "" if result.within else "  EXCEEDED"
        print(f"{result.stage.name:38} {len(result.ours):5} {result.mean:8.3f} {result.worst:8.1f}    {limit}{verdict}")
    if given.html:
        with refusals_named(given.html):
            given.html.write_text(page(__doc__ or "", results))
        print(f"report: {given.html}")
    if not all(result.within for result in results):
        sys.exit(1)


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
