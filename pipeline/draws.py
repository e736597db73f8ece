"""What each view draws: crop box, flip, color factors and their order, gray, blur. Pure NumPy, no state.

Source of every distribution and default: SimCLR (Chen et al. 2020), appendix A and its reference code
(google-research/simclr, data_util.py): crop area U(0.08, 1) and aspect log-uniform in (3/4, 4/3), flip 1/2; with
probability 0.8 brightness, contrast, saturation in U(1 - 0.8 s, 1 + 0.8 s) and hue in U(-0.2 s, 0.2 s) turns, in a
random order; gray with probability 0.2; blur with probability 0.5 and sigma U(0.1, 2) pixels. The crop is drawn as
torchvision's RandomResizedCrop draws it: ten tries, then the largest central box of an allowed aspect. Solarize is not
SimCLR's: BYOL's second view (Grill et al. 2020, appendix B) has it with probability 0.2 at threshold 128.

A step of a view is a field or two of Recipe and of Draws, a word or two, and a line or two in ``draw``, here; what it
computes is in pipeline/graph.py and, by torchvision, in scripts/parity.py; pipeline/views.py says what was drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from itertools import permutations
from typing import Annotated

import numpy as np
import numpy.typing as npt
import pydantic
from pydantic import Field

from simclr_dali.pipeline.philox import VIEW, philox, uniform

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_ORDERS = np.array(list(permutations(range(4))), np.int64)  # (24, 4)
_CROP_TRIES = 10
_ASPECT = (3 / 4, 4 / 3)  # width / height
Probability = Annotated[float, Field(ge=0, le=1)]
Range = Annotated[tuple[float, float], Field(strict=False)]  # JSON has lists


class _Word(IntEnum):
    """Which random number decides what, after the two of each try of the crop.

    New ones come last: another order would change what every seed draws.
    """

    CROP_X = 0
    CROP_Y = auto()
    FLIP = auto()
    JITTER = auto()
    BRIGHTNESS = auto()
    CONTRAST = auto()
    SATURATION = auto()
    HUE = auto()
    ORDER = auto()
    GRAY = auto()
    BLUR = auto()
    SIGMA = auto()
    SOLARIZE = auto()


class Recipe(pydantic.BaseModel):
    """Probabilities and strengths of one view; the defaults are SimCLR's for ImageNet. A block of the config, too."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    area: Range = (0.08, 1.0)
    """Smallest and largest share of the picture that a crop covers."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: Probability = 0.8
    """Probability of color jitter."""
    strength: float = Field(default=1.0, ge=0)
    """Strength s of color jitter (paper: 1 for ImageNet, 0.5 for CIFAR-10); it scales all four ranges."""
    gray: Probability = 0.2
    """Probability of dropping all color."""
    blur: Probability = 0.5
    """Probability of a Gaussian blur."""
    sigma: Range = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels of the view."""
    solarize: Probability = 0.0
    """Probability of inverting all values from the threshold on."""
    solarize_threshold: float = Field(default=128.0, ge=0, le=255)
    """In levels of 0..255."""

    @pydantic.model_validator(mode="after")
    def _refuse_no_ranges(self) -> "Recipe":
        for name, (low, high), most in (("area", self.area, 1.0), ("sigma", self.sigma, float("inf"))):
            if not 0 < low <= high <= most:
                raise ValueError(f"{name} is [{low}, {high}], which is no range of positive numbers up to {most}")
        return self

    def steps(self) -> frozenset[str]:
        """What can be drawn beyond crop and flip: "color", "blur" and "solarize" (pipeline.graph)."""
        chances = {"color": max(self.jitter, self.gray), "blur": self.blur, "solarize": self.solarize}
        return frozenset(step for step, chance in chances.items() if chance > 0)


# What a linear probe is trained on (appendix B.8): random crops and flips only.
PROBE = Recipe(jitter=0.0, gray=0.0, blur=0.0)


@dataclass(frozen=True)
class Draws:
    """One view of n samples."""

    box: Floats
    """float64 (n, 4): x0, y0, x1, y1 in pixels of the stored picture."""
    flip: Bools
    jitter: Bools
    factors: Floats
    """float64 (n, 4): brightness, contrast, saturation (1: unchanged), hue in turns (0: unchanged)."""
    order: npt.NDArray[np.int64]
    """int64 (n, 4): the order in which the factors apply."""
    gray: Bools
    blur: Bools
    sigma: Floats
    """float64 (n,): pixels of the view."""
    solarize: Bools
    threshold: Floats
    """float64 (n,): of solarize, in levels."""

    @staticmethod
    def neutral(box: Floats) -> "Draws":
        """The boxes, and nothing else done to them."""
        count = len(box)
        never = np.zeros(count, np.bool_)
        return Draws(
            box=box,
            flip=never,
            jitter=never,
            factors=np.tile([1.0, 1.0, 1.0, 0.0], (count, 1)),
            order=np.tile(np.arange(4), (count, 1)),
            gray=never,
            blur=never,
            sigma=np.ones(count),
            solarize=never,
            threshold=np.full(count, 128.0),
        )


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
    return _drawn(recipe, _uniforms(seed, epoch, ids, [view])[0], width, height)


def _drawn(recipe: Recipe, u: Floats, width: npt.NDArray[np.int64], height: npt.NDArray[np.int64]) -> Draws:
    tries, word = u[:, : 2 * _CROP_TRIES].reshape(-1, _CROP_TRIES, 2), u[:, 2 * _CROP_TRIES :]
    spread = 0.8 * recipe.strength
    least = max(0.0, 1 - spread)  # at a strength over 1.25 the range would reach below 0; torchvision cuts it there
    low = np.array([least, least, least, -0.2 * recipe.strength])
    high = np.array([1 + spread, 1 + spread, 1 + spread, 0.2 * recipe.strength])
    factors = low + (high - low) * word[:, _Word.BRIGHTNESS : _Word.HUE + 1]
    return Draws(
        box=_crop(recipe.area, tries, word[:, _Word.CROP_X], word[:, _Word.CROP_Y], width, height),
        flip=word[:, _Word.FLIP] < recipe.flip,
        jitter=word[:, _Word.JITTER] < recipe.jitter,
        factors=factors,
        order=_ORDERS[(word[:, _Word.ORDER] * len(_ORDERS)).astype(np.int64)],
        gray=word[:, _Word.GRAY] < recipe.gray,
        blur=word[:, _Word.BLUR] < recipe.blur,
        sigma=recipe.sigma[0] + (recipe.sigma[1] - recipe.sigma[0]) * word[:, _Word.SIGMA],
        solarize=word[:, _Word.SOLARIZE] < recipe.solarize,
        threshold=np.full(len(u), recipe.solarize_threshold),
    )


def draw_views(
    recipes: Sequence[Recipe],
    seed: int,
    epoch: int,
    ids: npt.NDArray[np.int64],
    width: npt.NDArray[np.int64],
    height: npt.NDArray[np.int64],
) -> list[Draws]:
    """:func:`draw` of a view by each recipe."""
    uniforms = _uniforms(seed, epoch, ids, range(len(recipes)))
    return [_drawn(recipe, u, width, height) for recipe, u in zip(recipes, uniforms, strict=True)]


def center_fraction(size: int) -> float:
    """Share of the short side that an evaluation sees at views of ``size`` pixels: 0.875, small pictures whole.

    google-research/simclr, data_util.py (CROP_PROPORTION) and data.py (no test cropping up to 32 pixels).
    """
    return 0.875 if size > 32 else 1.0


def center(width: npt.NDArray[np.int64], height: npt.NDArray[np.int64], fraction: float) -> Draws:
    """The evaluation view: the central square of ``fraction`` of the short side, nothing else.

    224/256 is "resize the short side to 256, take the central 224" in one resampling instead of two.
    """
    side = fraction * np.minimum(width, height).astype(np.float64)
    x0, y0 = (width - side) / 2, (height - side) / 2
    return Draws.neutral(np.stack([x0, y0, x0 + side, y0 + side], axis=1))


def _uniforms(seed: int, epoch: int, ids: npt.NDArray[np.int64], views: Sequence[int]) -> Floats:
    """Uniform numbers of each view, float64 (views, n, at least as many as a view has words)."""
    blocks = -(-(2 * _CROP_TRIES + len(_Word)) // 4)
    counters = np.empty((len(views), len(ids), blocks, 4), np.uint32)
    counters[..., 0] = ids[:, None]
    counters[..., 1] = np.arange(blocks) | np.array(views)[:, None, None] << 16
    counters[..., 2] = epoch
    counters[..., 3] = VIEW
    return uniform(philox(seed, counters.reshape(-1, 4))).reshape(len(views), len(ids), 4 * blocks)


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
