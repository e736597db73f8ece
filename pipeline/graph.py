"""The DALI graph: encoded bytes and numbers in, normalised views out. It draws nothing itself.

The same graph runs on CPU and GPU. Per image: decode once; then per view resize the drawn box, map colors (one affine
map, see pipeline.color), blur, mirror and normalise. Steps that a view did not draw are skipped per sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from simclr_dali.pipeline.color import compose
from simclr_dali.pipeline.draws import Draws
from simclr_dali.shards.decode import decoded

# ImageNet's mean and standard deviation, as torchvision's models expect them, in levels of 0..255.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

Array = np.ndarray[Any, Any]
INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
# In the order in which scripts.bench.stages adds them; color and blur come before the output.
STAGES = ("decode", "crop", "output", "color", "blur")
_BLACK, _WHITE = np.float32(0), np.float32(255)
_NO_BLUR = 0.1  # pixels; the next pixel's weight is then exp(-50)
_REGION_INPUTS = 2
_BASIC_INPUTS = 3
_COLOR_INPUTS = 5


@dataclass(frozen=True)
class Tuning:
    """Ways to compute the same views, for measuring on a device; what is best on a CPU is the default.

    conditionals: skip color and blur for samples that did not draw them, instead of neutral parameters. region: decode
    only what the views' boxes cover. hw_decoder_load: share of a batch for a GPU's JPEG engine (shards.decode).
    """

    conditionals: bool = True
    region: bool = False
    hw_decoder_load: float = 0.0


PLAIN = Tuning()


def region_inputs(draws: Sequence[Draws]) -> list[Array]:
    """Corners (y, x), int32 (n, 2), of the smallest box around the boxes of all views."""
    starts = np.floor(np.min([view.box[:, [1, 0]] for view in draws], axis=0))
    ends = np.ceil(np.max([view.box[:, [3, 2]] for view in draws], axis=0))
    return [starts.astype(np.int32), ends.astype(np.int32)]


def view_inputs(draws: Draws, augment: bool) -> list[Array]:
    """What the graph takes for one view, in its order: box as (y, x) start and end, mirror, then color and blur.

    Color and blur of a sample that did not draw them are neutral: the identity, and a blur of one pixel.
    """
    box = draws.box.astype(np.float32)
    inputs: list[Array] = [box[:, [1, 0]], box[:, [3, 2]], draws.flip.astype(np.int32)]
    if augment:
        m, n = compose(draws)
        sigma = np.where(draws.blur, draws.sigma, _NO_BLUR).astype(np.float32)
        inputs += [draws.jitter | draws.gray, m, n, draws.blur, sigma]
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
    tuning: Tuning = PLAIN,
    until: str = STAGES[-1],
) -> Pipeline:
    """Build the pipeline; ``run`` gives one batch per view, [batch, size, size, 3] float16 (``half``) or float32.

    source: called for each batch, returns [list of encoded images, *region_inputs if tuned so, *view_inputs of each
    view]; StopIteration ends it.
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
        regions = _REGION_INPUTS if tuning.region else 0
        encoded, *numbers = fn.external_source(source=source, num_outputs=1 + regions + views * per_view, batch=True)
        region = (numbers[0], numbers[1]) if tuning.region else None
        image = decoded(encoded, on_gpu=device_id is not None, hw_load=tuning.hw_decoder_load, region=region)
        if until == "decode":
            return (image,)
        corner = fn.cast(region[0], dtype=types.FLOAT) if region else np.float32(0)
        per_image = (numbers[regions + v * per_view :][:per_view] for v in range(views))
        return tuple(view(image, corner, *of_view) for of_view in per_image)

    def view(image: Any, corner: Any, start: Any, end: Any, mirror: Any, *color: Any) -> Any:
        x = fn.resize(
            image,
            size=[size, size],
            roi_start=start - corner,
            roi_end=end - corner,
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
        if not tuning.conditionals:
            return fn.gaussian_blur(x, sigma=sigma)
        if blur:
            x = fn.gaussian_blur(x, sigma=sigma)
        return x

    def colored(x: Any, recolor: Any, m: Any, n: Any) -> Any:
        # Bytes up to here, as in torchvision, and floats from here on: on a CPU, DALI resizes to bytes faster than to
        # floats, but rounds back to bytes more slowly than it computes.
        if not tuning.conditionals:
            return mapped(x, m, n)
        if recolor:  # noqa: SIM108
            y = mapped(x, m, n)
        else:  # DALI turns statements into conditionals, not the ternary operator
            y = fn.cast(x, dtype=types.FLOAT)
        return y

    def mapped(x: Any, m: Any, n: Any) -> Any:
        mean = fn.reshape(fn.reductions.mean(x, axes=[0, 1]), shape=[1, 3])
        shift = fn.coord_transform(mean, M=n)
        if device_id is None:
            y = fn.coord_transform(x, M=m, T=fn.reshape(shift, shape=[3]))
        else:
            # Named arguments such as T must be on the CPU, where the mean is not.
            y = fn.coord_transform(x, M=m) + fn.reshape(shift, shape=[1, 1, 3])
        return fn.reshape(math.min(math.max(y, _BLACK), _WHITE), layout="HWC")

    pipeline = graph()
    pipeline.build()
    return pipeline
