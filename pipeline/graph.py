"""The DALI graph: encoded bytes and numbers in, normalised views out. It draws nothing itself.

The same graph runs on CPU and GPU. Per image: decode once; then per view resize the drawn box, map colors (one affine
map, see pipeline.color), blur, mirror and normalise. Steps that a view did not draw are skipped per sample.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from pipeline.color import compose
from pipeline.draws import Draws
from shards.decode import decoded

# ImageNet's mean and standard deviation, as torchvision's models expect them, in levels of 0..255.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

Array = np.ndarray[Any, Any]
INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
# In the order in which pipeline.bench adds them; color and blur come before the output.
STAGES = ("decode", "crop", "output", "color", "blur")
_BLACK, _WHITE = np.float32(0), np.float32(255)
_BASIC_INPUTS = 3
_COLOR_INPUTS = 5


def view_inputs(draws: Draws, augment: bool) -> list[Array]:
    """What the graph takes for one view, in its order: box as (y, x) start and end, mirror, then color and blur."""
    box = draws.box.astype(np.float32)
    inputs: list[Array] = [box[:, [1, 0]], box[:, [3, 2]], draws.flip.astype(np.int32)]
    if augment:
        m, n = compose(draws)
        inputs += [draws.jitter | draws.gray, m, n, draws.blur, draws.sigma.astype(np.float32)]
    return [np.ascontiguousarray(array) for array in inputs]


def build(
    source: Callable[[], list[Any]],
    *,
    batch: int,
    views: int,
    augment: bool,
    size: int,
    interpolation: str,
    device_id: int | None,
    threads: int,
    half: bool,
    prefetch: int,
    until: str = STAGES[-1],
) -> Pipeline:
    """Build the pipeline; ``run`` gives one batch per view, [batch, size, size, 3] float16 (``half``) or float32.

    source: called for each batch, returns [list of encoded images, *view_inputs of each view]; StopIteration ends it.
    device_id: CUDA device, or None for the CPU. augment: whether color and blur are part of the graph. until: the last
    of STAGES that is part of the graph, for measuring.
    """

    @pipeline_def(
        batch_size=batch,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        enable_conditionals=True,
    )
    def graph() -> tuple[Any, ...]:
        per_view = _BASIC_INPUTS + (_COLOR_INPUTS if augment else 0)
        encoded, *numbers = fn.external_source(source=source, num_outputs=1 + views * per_view, batch=True)
        image = decoded(encoded, on_gpu=device_id is not None)
        if until == "decode":
            return (image,)
        return tuple(view(image, *numbers[v * per_view : (v + 1) * per_view]) for v in range(views))

    def view(image: Any, start: Any, end: Any, mirror: Any, *color: Any) -> Any:
        x = fn.resize(
            image,
            size=[size, size],
            roi_start=start,
            roi_end=end,
            interp_type=INTERPOLATIONS[interpolation],
            antialias=True,
        )
        if until == "crop":
            return x
        if augment and until in ("color", "blur"):
            recolor, m, n, blur, sigma = color
            x = colored(x, recolor, m, n)
            if until == "blur":
                x = blurred(x, blur, sigma)
        return fn.crop_mirror_normalize(
            x,
            mirror=mirror,
            dtype=types.FLOAT16 if half else types.FLOAT,
            output_layout="HWC",
            mean=list(MEAN),
            std=list(STD),
        )

    def blurred(x: Any, blur: Any, sigma: Any) -> Any:
        if blur:
            x = fn.gaussian_blur(x, sigma=sigma)
        return x

    def colored(x: Any, recolor: Any, m: Any, n: Any) -> Any:
        # Bytes up to here, as in torchvision, and floats from here on: on a CPU, DALI resizes to bytes faster than to
        # floats, but rounds back to bytes more slowly than it computes.
        if recolor:
            mean = fn.reshape(fn.reductions.mean(x, axes=[0, 1]), shape=[1, 3])
            shift = fn.coord_transform(mean, M=n)
            if device_id is None:
                y = fn.coord_transform(x, M=m, T=fn.reshape(shift, shape=[3]))
            else:
                # Named arguments such as T must be on the CPU, where the mean is not.
                y = fn.coord_transform(x, M=m) + fn.reshape(shift, shape=[1, 1, 3])
            y = fn.reshape(math.min(math.max(y, _BLACK), _WHITE), layout="HWC")
        else:
            y = fn.cast(x, dtype=types.FLOAT)
        return y

    pipeline = graph()
    pipeline.build()
    return pipeline
