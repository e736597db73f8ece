"""The draws of the views follow the paper's distributions and torchvision's samplers, and are pure."""

from collections import Counter

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import torch
from scipy import stats

from simclr_dali.model.vision import torchvision
from simclr_dali.pipeline.color import LUMA, compose
from simclr_dali.pipeline.draws import BRIGHTNESS, CONTRAST, HUE, PROBE, SATURATION, Draws, Recipe, center, draw

transforms = torchvision.transforms
COUNT = 20_000
IDS = np.arange(COUNT)
# With fixed seeds a test either always passes or always fails; this level only says how odd a result may look.
LEVEL = 1e-4


# The paper's settings for CIFAR-10 (appendix B.9): half the color strength and no blur.
CIFAR = Recipe(strength=0.5, blur=0.0)


def drawn(recipe: Recipe | None = None, *, width: int = 500, height: int = 375, epoch: int = 0, view: int = 0) -> Draws:
    size = np.full(COUNT, width), np.full(COUNT, height)
    return draw(recipe or Recipe(), 17, epoch, IDS, view, *size)


def is_uniform(values: npt.NDArray[np.float64], low: float, high: float) -> bool:
    return bool(stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > LEVEL)


def is_share(flags: npt.NDArray[np.bool_], probability: float) -> bool:
    return bool(stats.binomtest(int(flags.sum()), len(flags), probability).pvalue > LEVEL)


def test_factors_and_probabilities_are_the_papers() -> None:
    d = drawn()
    for factor in (BRIGHTNESS, CONTRAST, SATURATION):
        assert is_uniform(d.factors[:, factor], 0.2, 1.8)
    assert is_uniform(d.factors[:, HUE], -0.2, 0.2)
    assert is_uniform(d.sigma, 0.1, 2.0)
    for flags, probability in ((d.flip, 0.5), (d.jitter, 0.8), (d.gray, 0.2), (d.blur, 0.5)):
        assert is_share(flags, probability)


def test_strength_scales_the_color_ranges() -> None:
    d = drawn(Recipe(strength=0.5))
    assert is_uniform(d.factors[:, SATURATION], 0.6, 1.4) and is_uniform(d.factors[:, HUE], -0.1, 0.1)


def test_a_high_strength_cuts_the_range_at_zero_as_torchvision_does() -> None:
    assert is_uniform(drawn(Recipe(strength=1.5)).factors[:, CONTRAST], 0, 2.2)
    assert transforms.ColorJitter(contrast=1.2).contrast == (0.0, 2.2)


def test_all_orders_of_the_four_factors_are_equally_likely() -> None:
    counts = Counter(map(tuple, drawn().order.tolist()))
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > LEVEL


def torchvision_boxes(width: int, height: int, count: int) -> npt.NDArray[np.float64]:
    """Boxes x0, y0, x1, y1 of torchvision's own sampler, which has no batched form."""
    torch.manual_seed(1)
    sampler, picture = transforms.RandomResizedCrop, PIL.Image.new("L", (width, height))
    rows = (sampler.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count))
    return np.array([(left, top, left + w, top + h) for top, left, h, w in rows], float)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (224, 224), (90, 400), (1000, 200)])
def test_crops_are_distributed_as_torchvisions(width: int, height: int) -> None:
    ours, theirs = drawn(width=width, height=height).box, torchvision_boxes(width, height, 5000)
    for measure in (
        lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]),
        lambda b: (b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1]),
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > LEVEL
    assert ours.min() >= 0 and ours[:, 2].max() <= width and ours[:, 3].max() <= height
    assert np.all(ours[:, 2] > ours[:, 0]) and np.all(ours[:, 3] > ours[:, 1])


def test_color_factors_and_their_order_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(2)
    jitter = transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    theirs = [transforms.ColorJitter.get_params(*ranges) for _ in range(4000)]
    ours = drawn()
    for factor in (BRIGHTNESS, CONTRAST, SATURATION, HUE):
        assert stats.ks_2samp(ours.factors[:, factor], [row[1 + factor] for row in theirs]).pvalue > LEVEL
    orders = sorted(set(map(tuple, ours.order.tolist())))
    counts = [
        Counter(tuple(order) for order in many) for many in (ours.order.tolist(), (r[0].tolist() for r in theirs))
    ]
    table = [[count[order] for order in orders] for count in counts]
    assert sum(table[1]) == len(theirs)
    assert stats.chi2_contingency(table).pvalue > LEVEL


def test_blur_flip_and_gray_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(3)
    ours = drawn()
    theirs = [transforms.GaussianBlur.get_params(0.1, 2.0) for _ in range(4000)]
    assert stats.ks_2samp(ours.sigma, theirs).pvalue > LEVEL
    # How often torchvision's random steps change a picture that each of them changes visibly.
    left_red = PIL.Image.fromarray(np.array([[[255, 0, 0], [0, 0, 0]]], np.uint8))
    before = np.asarray(left_red)
    blurring = transforms.RandomApply([transforms.functional.hflip], 0.5)  # any function that shows
    steps = (transforms.RandomHorizontalFlip(0.5), ours.flip), (transforms.RandomGrayscale(0.2), ours.gray)
    for step, flags in (*steps, (blurring, ours.blur)):
        changed = sum(not np.array_equal(np.asarray(step(left_red)), before) for _ in range(4000))
        table = [[changed, 4000 - changed], [int(flags.sum()), int((~flags).sum())]]
        assert stats.chi2_contingency(table).pvalue > LEVEL


def test_the_variants_draw_what_they_should() -> None:
    cifar, probe = drawn(CIFAR), drawn(PROBE)
    assert not cifar.blur.any() and is_uniform(cifar.factors[:, BRIGHTNESS], 0.6, 1.4) and is_share(cifar.jitter, 0.8)
    assert not (probe.jitter | probe.gray | probe.blur).any() and is_share(probe.flip, 0.5)
    # The same sample is cropped alike by every recipe of the same area: only what a recipe names changes.
    assert np.array_equal(probe.box, drawn().box) and np.array_equal(cifar.box, drawn().box)
    assert Recipe().steps() == {"color", "blur"} and CIFAR.steps() == {"color"} and not PROBE.steps()


def test_solarize_is_drawn_where_a_recipe_asks_for_it_and_changes_no_other_draw() -> None:
    plain, some = drawn(), drawn(Recipe(solarize=0.2, solarize_threshold=100.0))
    assert not plain.solarize.any() and is_share(some.solarize, 0.2) and np.all(some.threshold == 100)
    for name in vars(plain).keys() - {"solarize", "threshold"}:
        assert np.array_equal(getattr(plain, name), getattr(some, name)), name


def test_a_picture_that_no_crop_fits_falls_back_to_its_center() -> None:
    box = draw(Recipe(), 0, 0, IDS[:200], 0, np.full(200, 1000), np.full(200, 3)).box
    fallback = np.array([498.0, 0.0, 502.0, 3.0])
    assert np.all(box == fallback, axis=1).mean() > 0.9


def test_draws_depend_on_seed_epoch_sample_and_view_and_on_nothing_else() -> None:
    width, height = np.full(COUNT, 300), np.full(COUNT, 200)
    whole = draw(Recipe(), 5, 2, IDS, 1, width, height)
    some = np.array([19_000, 3, 77])
    part = draw(Recipe(), 5, 2, some, 1, width[some], height[some])
    for field in Draws.__dataclass_fields__:
        assert np.array_equal(getattr(whole, field)[some], getattr(part, field))
    for other in (
        draw(Recipe(), 6, 2, IDS, 1, width, height),
        draw(Recipe(), 5, 3, IDS, 1, width, height),
        draw(Recipe(), 5, 2, IDS, 0, width, height),
        draw(Recipe(), 5, 2, IDS + COUNT, 1, width, height),
    ):
        correlation = stats.pearsonr(whole.sigma, other.sigma)
        assert correlation.pvalue > LEVEL


def test_draws_are_pinned() -> None:
    # Changing these numbers changes every run that goes on from a checkpoint.
    d = draw(Recipe(), 42, 3, np.array([10]), 1, np.array([500]), np.array([375]))
    assert d.box[0].tolist() == [2.0, 15.0, 354.0, 366.0]
    assert d.factors[0] == pytest.approx([1.15909769, 0.31899825, 1.16789892, -0.15788643], abs=1e-8)
    assert d.order[0].tolist() == [3, 1, 0, 2]
    assert [bool(flag[0]) for flag in (d.flip, d.jitter, d.gray, d.blur)] == [True, False, False, True]
    assert d.sigma[0] == pytest.approx(0.45930538, abs=1e-8)


def test_center_is_the_middle_of_the_short_side() -> None:
    d = center(np.array([400, 100]), np.array([200, 100]), 0.5)
    assert d.box.tolist() == [[150, 50, 250, 150], [25, 25, 75, 75]]
    assert not (d.flip | d.jitter | d.gray | d.blur).any()


def reference_colors(pixels: npt.NDArray[np.float64], d: Draws, row: int) -> npt.NDArray[np.float64]:
    """The drawn steps, one after the other, on pixels (n, 3), without clipping; hue as a rotation in YIQ."""
    x = pixels
    to_yiq = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    for step in d.order[row] if d.jitter[row] else ():
        factor = d.factors[row, step]
        if step == BRIGHTNESS:
            x = factor * x
        elif step == CONTRAST:
            x = factor * x + (1 - factor) * (x @ LUMA).mean()
        elif step == SATURATION:
            x = factor * x + (1 - factor) * (x @ LUMA)[:, None]
        else:
            y, i, q = to_yiq @ x.T
            chroma = (i + 1j * q) * np.exp(-2j * np.pi * factor)
            x = np.linalg.solve(to_yiq, np.stack([y, chroma.real, chroma.imag])).T
    return np.tile((x @ LUMA)[:, None], 3) if d.gray[row] else x


def test_the_composed_map_is_the_steps_in_their_drawn_order() -> None:
    d = drawn(Recipe(gray=0.3))
    pixels = np.random.default_rng(0).uniform(0, 255, (50, 3))
    m, n = compose(d)
    for row in range(300):
        composed = pixels @ m[row].T + n[row] @ pixels.mean(0)
        assert composed == pytest.approx(reference_colors(pixels, d, row), abs=2e-3)
