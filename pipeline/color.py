"""Color jitter and gray as one affine map per sample: y = M x + N mean(x), with x and y in RGB.

Brightness, contrast, saturation, hue and gray are linear in the pixel x and the picture's mean color m (contrast
blends with the gray level of the mean), so any order of them composes into two 3x3 matrices. Two things differ from
torchvision's ColorJitter: nothing is clipped between the steps (the result is, once, to 0..255), and hue is a rotation
in YIQ at constant luma instead of HSV's hexagon.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from simclr_dali.pipeline.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws

Matrices = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow and torchvision
GRAY = np.tile(LUMA, (3, 1))
_TO_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
_NOTHING = -1


def compose(draws: Draws) -> tuple[Matrices, Matrices]:
    """M and N, float32 (n, 3, 3) each, of the color steps of ``draws`` in their drawn order, gray last."""
    return compose_each([draws])[0]


def compose_each(draws: Sequence[Draws]) -> list[tuple[Matrices, Matrices]]:
    """:func:`compose` of each view; faster for all of them together."""
    jitter, order, factors, gray = (
        np.concatenate([getattr(view, name) for view in draws]) for name in ("jitter", "order", "factors", "gray")
    )
    m, n = np.tile(np.eye(3), (len(jitter), 1, 1)), np.zeros((len(jitter), 3, 3))
    for position in range(4):
        steps = np.where(jitter, order[:, position], _NOTHING)
        for step in (BRIGHTNESS, CONTRAST, SATURATION, HUE):
            rows = np.flatnonzero(steps == step)
            m[rows], n[rows] = _after(step, factors[rows, step], m[rows], n[rows])
    m[gray], n[gray] = GRAY @ m[gray], GRAY @ n[gray]
    ends = np.cumsum([len(view.jitter) for view in draws])[:-1]
    return list(zip(np.split(m.astype(np.float32), ends), np.split(n.astype(np.float32), ends), strict=True))


def _after(step: int, factor: Floats, m: Floats, n: Floats) -> tuple[Floats, Floats]:
    """M and N (k, 3, 3) of pictures after one more step with ``factor`` (k,)."""
    f = factor[:, None, None]
    if step == BRIGHTNESS:
        return f * m, f * n
    if step == CONTRAST:  # c x + (1 - c) gray(mean), and the mean of the picture so far is (M + N) mean(x)
        return f * m, f * n + (1 - f) * (GRAY @ (m + n))
    by = f * np.eye(3) + (1 - f) * GRAY if step == SATURATION else _hue_rotation(factor)
    return by @ m, by @ n


def _hue_rotation(turns: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """RGB matrices (n, 3, 3) that rotate the chroma plane of YIQ by ``turns`` (n,)."""
    cos, sin = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    rotation = np.tile(np.eye(3), (len(turns), 1, 1))
    rotation[:, 1, 1] = rotation[:, 2, 2] = cos
    rotation[:, 1, 2], rotation[:, 2, 1] = sin, -sin
    return _FROM_YIQ @ rotation @ _TO_YIQ
