"""Color jitter and gray as one affine map per sample: y = M x + N mean(x), with x and y in RGB.

Brightness, contrast, saturation, hue and gray are linear in the pixel x and the picture's mean color m (contrast
blends with the gray level of the mean), so any order of them composes into two 3x3 matrices. Two things differ from
torchvision's ColorJitter: nothing is clipped between the steps (the result is, once, to 0..255), and hue is a rotation
in YIQ at constant luma instead of HSV's hexagon.
"""

import numpy as np
import numpy.typing as npt

from simclr_dali.pipeline.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws

Matrices = npt.NDArray[np.float32]

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow and torchvision
GRAY = np.tile(LUMA, (3, 1))
_TO_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


def compose(draws: Draws) -> tuple[Matrices, Matrices]:
    """M and N, float32 (n, 3, 3) each, of the color steps of ``draws`` in their drawn order, gray last."""
    count = len(draws.jitter)
    on = draws.jitter[:, None]
    factors = np.where(on, draws.factors, [1.0, 1.0, 1.0, 0.0])
    brightness, contrast, saturation = (factors[:, k, None, None] for k in (BRIGHTNESS, CONTRAST, SATURATION))
    hue = _hue_rotation(factors[:, HUE])
    saturate = saturation * np.eye(3) + (1 - saturation) * GRAY

    m, n = np.tile(np.eye(3), (count, 1, 1)), np.zeros((count, 3, 3))
    for position in range(4):
        step = draws.order[:, position, None, None]
        cases = [step == BRIGHTNESS, step == CONTRAST, step == SATURATION]
        # Contrast: c x + (1 - c) gray(mean), and the mean of the picture so far is (M + N) mean(x).
        n = np.select(cases, [brightness * n, contrast * n + (1 - contrast) * (GRAY @ (m + n)), saturate @ n], hue @ n)
        m = np.select(cases, [brightness * m, contrast * m, saturate @ m], hue @ m)
    gray = draws.gray[:, None, None]
    return np.where(gray, GRAY @ m, m).astype(np.float32), np.where(gray, GRAY @ n, n).astype(np.float32)


def _hue_rotation(turns: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """RGB matrices (n, 3, 3) that rotate the chroma plane of YIQ by ``turns`` (n,)."""
    cos, sin = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    rotation = np.tile(np.eye(3), (len(turns), 1, 1))
    rotation[:, 1, 1] = rotation[:, 2, 2] = cos
    rotation[:, 1, 2], rotation[:, 2, 1] = sin, -sin
    return _FROM_YIQ @ rotation @ _TO_YIQ
