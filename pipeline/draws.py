"""What each view draws: crop box, flip, color factors and their order, gray, blur. Pure NumPy, no state.

Source of every distribution and default: SimCLR (Chen et al. 2020), appendix A and its reference code
(google-research/simclr, data_util.py): crop area U(0.08, 1) and aspect log-uniform in (3/4, 4/3), flip 1/2; with
probability 0.8 brightness, contrast, saturation in U(1 - 0.8 s, 1 + 0.8 s) and hue in U(-0.2 s, 0.2 s) turns, in a
random order; gray with probability 0.2; blur with probability 0.5 and sigma U(0.1, 2) pixels. The crop is drawn as
torchvision's RandomResizedCrop draws it: ten tries, then the largest central box of an allowed aspect.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt

from simclr_dali.pipeline.philox import VIEW, philox, uniform

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_ORDERS = np.array(list(permutations(range(4))), np.int64)  # (24, 4)
_CROP_TRIES = 10
_ASPECT = (3 / 4, 4 / 3)  # width / height
# Words a view uses: 2 per try, 2 for the position, and one each for flip, jitter, 4 factors, order, gray, blur, sigma.
_WORDS = 2 * _CROP_TRIES + 2 + 10


@dataclass(frozen=True)
class Recipe:
    """Probabilities and strengths of one view; the defaults are SimCLR's for ImageNet.

    strength: s above, scales all four color ranges. area: range of the crop's share of the picture.
    sigma: range of the blur's standard deviation, in pixels of the view.
    """

    area: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    jitter: float = 0.8
    strength: float = 1.0
    gray: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)

    def changes_pixels(self) -> bool:
        """Whether anything beyond crop and flip can be drawn."""
        return max(self.jitter, self.gray, self.blur) > 0


# The paper's settings for CIFAR-10 (appendix B.9): half the color strength and no blur.
CIFAR = Recipe(strength=0.5, blur=0.0)
# What a linear probe is trained on (appendix B.8): random crops and flips only.
PROBE = Recipe(jitter=0.0, gray=0.0, blur=0.0)


@dataclass(frozen=True)
class Draws:
    """One view of n samples.

    box: float64 (n, 4), x0, y0, x1, y1 in pixels of the stored picture. flip, jitter, gray, blur: bool (n,).
    factors: float64 (n, 4), brightness, contrast, saturation (1 = unchanged), hue in turns (0 = unchanged).
    order: int64 (n, 4), the order in which the factors apply. sigma: float64 (n,), pixels of the view.
    """

    box: Floats
    flip: Bools
    jitter: Bools
    factors: Floats
    order: npt.NDArray[np.int64]
    gray: Bools
    blur: Bools
    sigma: Floats


def draw(
    recipe: Recipe,
    seed: int,
    epoch: int,
    ids: npt.NDArray[np.int64],
    view: int,
    width: npt.NDArray[np.int64],
    height: npt.NDArray[np.int64],
) -> Draws:
    """Draw view ``view`` of samples ``ids`` (n,), whose stored pictures have ``width`` and ``height`` (n,) pixels.

    A pure function: the row of a sample does not depend on the others in the call.
    """
    u = _uniforms(seed, epoch, ids, view)
    tries, rest = u[:, : 2 * _CROP_TRIES].reshape(-1, _CROP_TRIES, 2), u[:, 2 * _CROP_TRIES :]
    spread = 0.8 * recipe.strength
    least = max(0.0, 1 - spread)  # at a strength over 1.25 the range would reach below 0; torchvision cuts it there
    low = np.array([least, least, least, -0.2 * recipe.strength])
    high = np.array([1 + spread, 1 + spread, 1 + spread, 0.2 * recipe.strength])
    factors = low + (high - low) * rest[:, 4:8]
    return Draws(
        box=_crop(recipe.area, tries, rest[:, 0], rest[:, 1], width, height),
        flip=rest[:, 2] < recipe.flip,
        jitter=rest[:, 3] < recipe.jitter,
        factors=factors,
        order=_ORDERS[(rest[:, 8] * len(_ORDERS)).astype(np.int64)],
        gray=rest[:, 9] < recipe.gray,
        blur=rest[:, 10] < recipe.blur,
        sigma=recipe.sigma[0] + (recipe.sigma[1] - recipe.sigma[0]) * rest[:, 11],
    )


def center_fraction(size: int) -> float:
    """Share of the short side that an evaluation sees at views of ``size`` pixels: 0.875, small pictures whole.

    google-research/simclr, data_util.py (CROP_PROPORTION) and data.py (no test cropping up to 32 pixels).
    """
    return 0.875 if size > 32 else 1.0


def center(width: npt.NDArray[np.int64], height: npt.NDArray[np.int64], fraction: float) -> Draws:
    """The evaluation view: the central square of ``fraction`` of the short side, nothing else.

    224/256 is "resize the short side to 256, take the central 224" in one resampling instead of two.
    """
    count = len(width)
    side = fraction * np.minimum(width, height).astype(np.float64)
    x0, y0 = (width - side) / 2, (height - side) / 2
    never = np.zeros(count, np.bool_)
    return Draws(
        box=np.stack([x0, y0, x0 + side, y0 + side], axis=1),
        flip=never,
        jitter=never,
        factors=np.tile([1.0, 1.0, 1.0, 0.0], (count, 1)),
        order=np.tile(np.arange(4), (count, 1)),
        gray=never,
        blur=never,
        sigma=np.ones(count),
    )


def _uniforms(seed: int, epoch: int, ids: npt.NDArray[np.int64], view: int) -> Floats:
    """Uniform numbers, float64 (n, at least _WORDS)."""
    blocks = -(-_WORDS // 4)
    counters = np.empty((len(ids), blocks, 4), np.uint32)
    counters[..., 0] = ids[:, None]
    counters[..., 1] = np.arange(blocks) | view << 16
    counters[..., 2] = epoch
    counters[..., 3] = VIEW
    return uniform(philox(seed, counters.reshape(-1, 4))).reshape(len(ids), 4 * blocks)


def _crop(
    area_range: tuple[float, float],
    tries: Floats,
    u_x: Floats,
    u_y: Floats,
    width: npt.NDArray[np.int64],
    height: npt.NDArray[np.int64],
) -> Floats:
    """RandomResizedCrop's box, float64 (n, 4), in whole pixels: the first of the tries that fits, else the fallback."""
    width_n, height_n = width.astype(np.float64), height.astype(np.float64)
    area = (width_n * height_n)[:, None] * (area_range[0] + (area_range[1] - area_range[0]) * tries[..., 0])
    log_low, log_high = np.log(_ASPECT)
    aspect = np.exp(log_low + (log_high - log_low) * tries[..., 1])
    w = np.rint(np.sqrt(area * aspect))
    h = np.rint(np.sqrt(area / aspect))
    fits = (w >= 1) & (w <= width_n[:, None]) & (h >= 1) & (h <= height_n[:, None])
    first = fits.argmax(axis=1)
    rows = np.arange(len(first))
    w, h, found = w[rows, first], h[rows, first], fits[rows, first]
    x0 = np.floor(u_x * (width_n - w + 1))
    y0 = np.floor(u_y * (height_n - h + 1))

    whole_aspect = width_n / height_n
    fallback_w = np.where(whole_aspect > _ASPECT[1], np.rint(height_n * _ASPECT[1]), width_n)
    fallback_h = np.where(whole_aspect < _ASPECT[0], np.rint(width_n / _ASPECT[0]), height_n)
    w, h = np.where(found, w, fallback_w), np.where(found, h, fallback_h)
    x0 = np.where(found, x0, (width_n - w) // 2)
    y0 = np.where(found, y0, (height_n - h) // 2)
    return np.stack([x0, y0, x0 + w, y0 + h], axis=1)
