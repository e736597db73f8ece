"""What the DALI graph computes, against Pillow and torchvision's formulas, sample by sample."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import torch

from simclr_dali.pipeline import graph
from simclr_dali.pipeline.color import compose
from simclr_dali.pipeline.draws import Draws, Recipe, draw
from simclr_dali.pipeline.graph import MEAN, STD, LoaderConfig

SIZE = 48
COUNT = 24
ALL_STEPS = frozenset({"color", "blur", "solarize"})

Pixels = npt.NDArray[np.float64]


def photo_like(random: np.random.Generator) -> PIL.Image.Image:
    """Smooth color fields with some detail, of a random size."""
    width, height = (int(side) for side in random.integers(60, 200, 2))
    coarse = PIL.Image.fromarray(random.integers(60, 196, (7, 7, 3), dtype=np.uint8))
    fine = random.normal(0, 4, (height, width, 1))
    smooth = np.asarray(coarse.resize((width, height), PIL.Image.Resampling.BICUBIC), float)
    return PIL.Image.fromarray(np.clip(smooth + fine, 0, 255).astype(np.uint8))


def photos(count: int) -> list[bytes]:
    """Encoded photo-like pictures, the same for the same count."""
    random = np.random.default_rng(5)
    encoded = []
    for _ in range(count):
        buffer = io.BytesIO()
        photo_like(random).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return photos(COUNT)


def decoded(data: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(data)).convert("RGB")


def draws_for(images: list[bytes], **recipe: Any) -> Draws:
    sizes = np.array([decoded(data).size for data in images])
    return draw(Recipe(**recipe), 3, 0, np.arange(len(images)), 0, sizes[:, 0], sizes[:, 1])


def run(images: list[bytes], draws: Draws, steps: frozenset[str] = ALL_STEPS, **changes: Any) -> Pixels:
    """The graph's view of each image, in levels of 0..255, float64 (n, size, size, 3)."""
    config = LoaderConfig(**{"size": SIZE, "device": torch.device("cpu"), "prefetch": 1, **changes})

    def batches() -> Iterator[list[Any]]:
        yield graph.graph_inputs([np.frombuffer(data, np.uint8) for data in images], [draws], steps, config)

    source = batches()
    pipeline = graph.build(lambda: next(source), config, batch=len(images), views=1, steps=steps)
    (views,) = pipeline.run()
    return np.asarray(views.as_tensor()).astype(np.float64) * STD + MEAN


def cropped(data: bytes, box: npt.NDArray[np.float64]) -> Pixels:
    """torchvision's resized crop of a Pillow image: crop, then antialiased bilinear resize."""
    x0, y0, x1, y1 = (int(side) for side in box)
    crop = decoded(data).crop((x0, y0, x1, y1))
    return np.asarray(crop.resize((SIZE, SIZE), PIL.Image.Resampling.BILINEAR), float)


PLAIN = {"flip": 0.0, "jitter": 0.0, "gray": 0.0, "blur": 0.0}


def test_crop_and_resize_are_torchvisions_within_a_level(images: list[bytes]) -> None:
    draws = draws_for(images, **PLAIN)
    views = run(images, draws)
    for view, data, box in zip(views, images, draws.box, strict=True):
        assert np.abs(view - cropped(data, box)).mean() < 1


def test_no_pixel_outside_of_the_box_reaches_a_view() -> None:
    """A black picture with a white box: its crop, enlarged or made smaller, is white to its edge."""
    buffer = io.BytesIO()
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[16:40, 24:56] = 255
    PIL.Image.fromarray(picture).save(buffer, "JPEG", quality=100, subsampling=0)
    for box in ([24, 16, 56, 40], [32, 24, 40, 32]):
        draws = Draws.neutral(np.array([box], float))
        for size in (16, SIZE, 100):  # larger views are not cut out first: graph.CUT_OUT_BELOW
            assert run([buffer.getvalue()], draws, size=size).min() > 250, (box, size)


def test_flip_mirrors_exactly(images: list[bytes]) -> None:
    plain = run(images, draws_for(images, **PLAIN))
    flipped = run(images, draws_for(images, **{**PLAIN, "flip": 1.0}))
    assert np.array_equal(flipped, plain[:, :, ::-1])


def test_colors_are_the_composed_map(images: list[bytes]) -> None:
    plain = run(images, draws_for(images, **PLAIN))
    draws = draws_for(images, **{**PLAIN, "jitter": 0.8, "gray": 0.3})
    views = run(images, draws)
    m, n = compose(draws)
    for row in range(COUNT):
        expected = plain[row] @ m[row].T + n[row] @ plain[row].mean((0, 1))
        assert np.abs(views[row] - np.clip(expected, 0, 255)).max() < 0.01


@pytest.mark.parametrize(("size", "taps"), [(16, 1), (32, 3), (48, 5), (64, 7), (96, 9), (224, 23)])
def test_blur_is_the_papers_at_every_size(size: int, taps: int, images: list[bytes]) -> None:
    """google-research/simclr, data_util.py, gaussian_blur, with kernel_size = height // 10, at reflected borders."""
    plain = run(images[:8], draws_for(images[:8], **PLAIN), size=size)
    draws = draws_for(images[:8], **{**PLAIN, "blur": 0.7})
    views = run(images[:8], draws, size=size)
    assert 0 < draws.blur.sum() < 8
    for row in range(8):
        if not draws.blur[row]:
            assert np.array_equal(views[row], plain[row])
            continue
        radius = taps // 2
        kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / draws.sigma[row]) ** 2)
        kernel /= kernel.sum()
        padded = np.pad(plain[row], ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
        rows = sum(k * padded[i : i + size] for i, k in enumerate(kernel))
        expected = sum(k * rows[:, i : i + size] for i, k in enumerate(kernel))
        assert np.abs(views[row] - expected).mean() < 0.02 and np.abs(views[row] - expected).max() < 1


def test_solarize_inverts_from_the_threshold_on(images: list[bytes]) -> None:
    plain = run(images, draws_for(images, **PLAIN))
    draws = draws_for(images, **{**PLAIN, "solarize": 0.5, "solarize_threshold": 100.0})
    views = run(images, draws)
    assert 0 < draws.solarize.sum() < COUNT
    inverted = np.where(plain >= 100, 255 - plain, plain)
    for row, solarized in enumerate(draws.solarize):
        # A level that lies at the threshold may fall to either side, by the rounding of the normalisation.
        near = np.abs(plain[row] - 100) < 0.01
        expected = inverted[row] if solarized else plain[row]
        assert np.abs(views[row] - expected)[~near].max() < 0.01


def test_a_step_that_no_view_draws_changes_nothing_by_being_in_the_graph(images: list[bytes]) -> None:
    draws = draws_for(images)
    assert not draws.solarize.any()
    assert np.array_equal(run(images, draws, steps=Recipe().steps()), run(images, draws))


def test_nothing_but_the_inputs_decides_the_pixels(images: list[bytes]) -> None:
    draws = draws_for(images)
    assert np.array_equal(run(images, draws, threads=1), run(images, draws, threads=2))
    backwards = [images[i] for i in range(COUNT)][::-1]
    reversed_draws = Draws(**{name: getattr(draws, name)[::-1] for name in Draws.__dataclass_fields__})
    assert np.array_equal(run(backwards, reversed_draws)[::-1], run(images, draws))


def test_half_output_is_the_rounded_full_output(images: list[bytes]) -> None:
    draws = draws_for(images)
    assert np.abs(run(images, draws, dtype=torch.float16) - run(images, draws)).max() < 0.2


def test_neutral_parameters_instead_of_conditionals_give_the_same_views(images: list[bytes]) -> None:
    draws = draws_for(images, solarize=0.3)
    assert np.abs(run(images, draws, conditionals=False) - run(images, draws)).max() < 0.01


@pytest.mark.parametrize(("size", "border"), [(SIZE, 0), (graph.CUT_OUT_BELOW, 12)])
def test_decoding_a_region_gives_the_same_views(size: int, border: int, images: list[bytes]) -> None:
    """But for the border of large views: where a crop is enlarged, they see one pixel beside the box."""
    draws = draws_for(images)
    difference = np.abs(run(images, draws, region=True, size=size) - run(images, draws, size=size))
    assert difference[:, border : size - border, border : size - border].max() < 1.01 and difference.mean() < 0.1


def test_exif_rotation_is_ignored_as_in_torchvision() -> None:
    """The box was drawn for the picture as stored; a decoder that turns it would crop outside."""
    picture = photo_like(np.random.default_rng(1)).resize((120, 60))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    plain, rotated = io.BytesIO(), io.BytesIO()
    picture.save(plain, "JPEG", quality=90)
    picture.save(rotated, "JPEG", quality=90, exif=exif)
    draws = draw(Recipe(flip=0, jitter=0, gray=0, blur=0), 0, 0, np.arange(2), 0, np.full(2, 120), np.full(2, 60))
    same_box = Draws(**{name: getattr(draws, name)[[0, 0]] for name in Draws.__dataclass_fields__})
    views = run([plain.getvalue(), rotated.getvalue()], same_box)
    assert np.array_equal(views[0], views[1])
