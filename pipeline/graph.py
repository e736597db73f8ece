"""The DALI graph: encoded bytes and numbers in, normalised views out. It draws nothing itself.

The same graph runs on CPU and GPU. Per image: decode once; then per view resize the drawn box, map colors (one affine
map, see pipeline.color), blur, solarize, mirror and normalise. Steps that a view did not draw are skipped per sample.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from simclr_dali.pipeline.color import compose, compose_each
from simclr_dali.pipeline.draws import Draws
from simclr_dali.shards.decode import decoded
from simclr_dali.shards.forked import use_dali

# ImageNet's mean and standard deviation, as torchvision's models expect them, in levels of 0..255.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

Array = np.ndarray[Any, Any]
Steps = frozenset[str]
INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
# Pixels. At the border of a crop that is enlarged, resizing mixes in the pixel beside the box, unless the crop was cut
# out before: an eighth of a view of 32 pixels is such a border, a fiftieth of one of 224, where cutting costs 5 %.
CUT_OUT_BELOW = 128
# Pixels. Deciding for each view whether it has colors costs more than mapping all of them by a matrix that changes
# nothing; the colors of larger views cost more than the decision.
MAP_ALL_BELOW = 64
_PIXEL = np.zeros((1, 1, 3), np.uint8)
_BLACK, _WHITE = np.float32(0), np.float32(255)
_NO_BLUR = 0.1  # pixels; the next pixel's weight is then exp(-50)
_NO_SOLARIZE = 256.0  # levels; no value reaches it


@dataclass(frozen=True)
class LoaderConfig:
    """How views are made. No pixel depends on it but by size, device, interpolation and the rounding of dtype."""

    size: int
    """Side of the views, in pixels."""
    device: torch.device
    threads: int = 2
    """Of reading, and as many of DALI."""
    dtype: torch.dtype = torch.float32
    """float32, float16 or bfloat16."""
    interpolation: str = "bilinear"
    """One of INTERPOLATIONS."""
    read_ahead: int = 4
    """Batches read ahead of the graph. At most read_ahead + prefetch + 4 batches of encoded images are in memory."""
    prefetch: int = 2
    """Batches inside the graph, ahead of the one that lies ready. prefetch + 3 batches of views are in memory beside
    those that the caller keeps."""
    conditionals: bool = True
    """Skip color, blur and solarize for samples that did not draw them, instead of neutral parameters."""
    region: bool = False
    """Decode only what the views' boxes cover."""
    engine_share: float = 0.0
    """Share of the baseline JPEGs that the JPEG engine of a GPU decodes (pipeline.engine); 0: there is one decoder."""

    @property
    def device_id(self) -> int | None:
        """Of CUDA, or None for the CPU."""
        return (self.device.index or 0) if self.device.type == "cuda" else None

    @property
    def skipped(self) -> Steps:
        """Steps that are not computed for samples that did not draw them."""
        if not self.conditionals:
            return frozenset()
        return frozenset({"color", "blur", "solarize"} - ({"color"} if self.size < MAP_ALL_BELOW else set()))


def region_inputs(draws: Sequence[Draws]) -> dict[str, Array]:
    """Corners (y, x), int32 (n, 2), of the smallest box around the boxes of all views."""
    starts = np.floor(np.min([view.box[:, [1, 0]] for view in draws], axis=0))
    ends = np.ceil(np.max([view.box[:, [3, 2]] for view in draws], axis=0))
    return {"start": starts.astype(np.int32), "end": ends.astype(np.int32)}


def view_inputs(draws: Draws, maps: tuple[Array, Array], steps: Steps, config: LoaderConfig) -> dict[str, Array]:
    """What the graph takes for one view, by name: the box as (y, x) start and end, mirror, and what ``steps`` need.

    maps: the matrices of its colors (color.compose). A sample that did not draw a step has neutral values for it, and a
    flag to skip it where config.skipped has the step.
    """
    start, end = draws.box[:, [1, 0]], draws.box[:, [3, 2]]
    inputs: dict[str, Array] = {"mirror": draws.flip.astype(np.int32)}
    if config.size < CUT_OUT_BELOW:
        first, last = np.floor(start), np.ceil(end)
        inputs |= {"first": first.astype(np.int32), "last": last.astype(np.int32)}
        start, end = start - first, end - first
    inputs |= {"start": start.astype(np.float32), "end": end.astype(np.float32)}
    if "color" in steps:
        inputs |= {"if color": draws.jitter | draws.gray, "m": maps[0], "n": maps[1]}
    if "blur" in steps:
        sigma = np.where(draws.blur, draws.sigma, _NO_BLUR).astype(np.float32)
        inputs |= {"if blur": draws.blur, "sigma": sigma, "taps": blur_taps(sigma, config.size)}
    if "solarize" in steps:
        threshold = np.where(draws.solarize, draws.threshold, _NO_SOLARIZE).astype(np.float32)
        inputs |= {"if solarize": draws.solarize, "threshold": threshold}
    for step in steps - config.skipped:
        del inputs[f"if {step}"]
    return {name: np.ascontiguousarray(array) for name, array in inputs.items()}


def blur_taps(sigma: Array, size: int) -> Array:
    """Width of the blur's kernel, int32 (n,), in views of ``size`` pixels.

    The paper's is a tenth of the view (google-research/simclr, data_util.py, gaussian_blur: 3, 5 and 7 pixels at 32,
    48 and 64). What lies beyond three sigma, of which 23 pixels at 224 have much, is left out.
    """
    return (2 * np.minimum(size // 10 // 2, np.ceil(3 * sigma)) + 1).astype(np.int32)


def graph_inputs(
    encoded: Any,
    draws: Sequence[Draws],
    steps: Steps,
    config: LoaderConfig,
    *,
    on_engine: Array | None = None,
    kept: tuple[Any, Array] | None = None,
) -> list[Any]:
    """What ``source`` of :func:`build` gives for a batch: encoded images, and what each view drew.

    on_engine: bool (n,), whether the JPEG engine decodes each image, where config.engine_share is not 0. kept:
    pictures that are decoded already (KeptPictures.batch), and bool (n,), which are, where ``build`` has ``kept_on``.
    """
    inputs = [] if kept is None else [*kept]
    inputs += [encoded] if on_engine is None else [encoded, on_engine]
    inputs += region_inputs(draws).values() if config.region else []
    for view, maps in zip(draws, compose_each(draws), strict=True):
        inputs += view_inputs(view, maps, steps, config).values()
    return inputs


def build(
    source: Callable[[], list[Any]],
    config: LoaderConfig,
    *,
    batch: int,
    views: int,
    steps: Steps,
    kept_on: torch.device | None = None,
    until: str | None = None,
) -> Pipeline:
    """Build the pipeline; ``run`` gives one batch per view, [batch, size, size, 3] float16 or float32.

    source: called for each batch, returns :func:`graph_inputs`, which stay as they are until the outputs of their batch
    are there (on a GPU: computed); StopIteration ends it. steps: those that any view can draw (Recipe.steps). kept_on:
    where pictures that are decoded already lie; those that the graph has decoded are then one more output, the last.
    until: "decode" or "crop" ends the graph there, for measuring.
    """
    nobody = Draws.neutral(np.empty((0, 4)))
    names = list(view_inputs(nobody, compose(nobody), steps, config))
    region_names = list(region_inputs([nobody])) if config.region else []

    @pipeline_def(
        batch_size=batch,
        num_threads=config.threads,
        device_id=config.device_id,
        prefetch_queue_depth=config.prefetch,
        enable_conditionals=True,
    )
    def graph() -> tuple[Any, ...]:
        by_engine, on_gpu = config.engine_share > 0, config.device_id is not None
        count = (kept_on is not None) + 1 + by_engine + len(region_names) + views * len(names)
        pictures, numbers = _fed(source, count, kept_on, on_gpu)
        is_kept = None if kept_on is None else numbers.pop(0)
        encoded = numbers.pop(0)
        on_engine = numbers.pop(0) if by_engine else None
        region = (numbers.pop(0), numbers.pop(0)) if config.region else None
        fresh = None
        if is_kept is None:
            image = decoded(encoded, on_gpu=on_gpu, region=region, on_engine=on_engine)
        elif is_kept:
            # Of those nothing is to be kept, and outputs are copied into one piece.
            image, fresh = pictures, types.Constant(_PIXEL, layout="HWC", device="gpu" if on_gpu else "cpu")
        else:
            image = decoded(encoded, on_gpu=on_gpu, region=region, on_engine=on_engine)
            fresh = image
        if until == "decode":
            return (image,)
        corner = region[0] if region else None  # of what is decoded
        first = [v * len(names) for v in range(views)]
        of_view = [{name: numbers[at + place] for place, name in enumerate(names)} for at in first]
        crops = [_cropped(image, corner, drawn, config) for drawn in of_view]
        if until == "crop":
            return tuple(crops)
        made = tuple(_view(crops[v], of_view[v], steps, config) for v in range(views))
        return made if kept_on is None else (*made, fresh)

    use_dali()
    pipeline = graph()
    pipeline.build()
    return pipeline


def _fed(
    source: Callable[[], list[Any]], count: int, kept_on: torch.device | None, on_gpu: bool
) -> tuple[Any, list[Any]]:
    """The nodes of what ``source`` gives: with ``kept_on`` first the pictures that lie there, then ``count`` others."""
    if kept_on is None:
        return None, list(fn.external_source(source=source, num_outputs=count, batch=True, no_copy=True))
    both, where = _TwoSources(source), "gpu" if kept_on.type == "cuda" else "cpu"
    pictures = fn.external_source(source=both.pictures, device=where, batch=True, no_copy=True)
    others = fn.external_source(source=both.others, num_outputs=count, batch=True, no_copy=True)
    return pictures.gpu() if on_gpu else pictures, list(others)


class _TwoSources:
    """The pictures of each batch, which may lie on a GPU, and its other inputs; DALI asks for either first."""

    def __init__(self, source: Callable[[], list[Any]]) -> None:
        self._source = source
        self._pictures: deque[Any] = deque()
        self._others: deque[list[Any]] = deque()

    def pictures(self) -> Any:
        return self._next_of(self._pictures)

    def others(self) -> list[Any]:
        others: list[Any] = self._next_of(self._others)
        return others

    def _next_of(self, waiting: deque[Any]) -> Any:
        if not waiting:
            pictures, *others = self._source()
            self._pictures.append(pictures)
            self._others.append(others)
        return waiting.popleft()


# What the graph is made of. DALI turns an "if" on a node into a conditional of each sample, but no ternary operator.


def _cropped(image: Any, corner: Any, drawn: dict[str, Any], config: LoaderConfig) -> Any:
    """The drawn box at the size of a view, in bytes. corner: (y, x) in the stored picture of the decoded part, or None
    where all of it was decoded.
    """
    start, end = drawn["start"], drawn["end"]
    if config.size < CUT_OUT_BELOW:
        first, last = drawn["first"], drawn["last"]
        if corner is not None:
            first, last = first - corner, last - corner
        image = fn.slice(image, start=first, end=last, axes=[0, 1])
    elif corner is not None:
        start, end = start - corner, end - corner
    return fn.resize(
        image,
        size=[config.size, config.size],
        roi_start=start,
        roi_end=end,
        interp_type=INTERPOLATIONS[config.interpolation],
        antialias=True,
    )


def _view(x: Any, drawn: dict[str, Any], steps: Steps, config: LoaderConfig) -> Any:
    # Bytes up to here, as in torchvision, and floats from here on: on a CPU, DALI resizes to bytes faster than to
    # floats, but rounds back to bytes more slowly than it computes.
    if "color" in steps:
        x = _colored(x, drawn, config)
    elif steps:
        x = fn.cast(x, dtype=types.FLOAT)
    if "blur" in steps:
        x = _blurred(x, drawn, config)
    if "solarize" in steps:
        x = _solarized(x, drawn, config)
    return fn.crop_mirror_normalize(
        x,
        mirror=drawn["mirror"],
        dtype=types.FLOAT16 if config.dtype == torch.float16 else types.FLOAT,
        output_layout="HWC",
        mean=list(MEAN),
        std=list(STD),
    )


def _colored(x: Any, drawn: dict[str, Any], config: LoaderConfig) -> Any:
    if "color" not in config.skipped:
        return _mapped(x, drawn["m"], drawn["n"], config)
    if drawn["if color"]:  # noqa: SIM108
        y = _mapped(x, drawn["m"], drawn["n"], config)
    else:
        y = fn.cast(x, dtype=types.FLOAT)
    return y


def _mapped(x: Any, m: Any, n: Any, config: LoaderConfig) -> Any:
    shift = fn.coord_transform(fn.reductions.mean(x, axes=[0, 1], keep_dims=True), M=n)
    if config.device_id is None:
        y = fn.coord_transform(x, M=m, T=fn.reshape(shift, shape=[3]))
        return math.min(math.max(y, _BLACK), _WHITE)
    # Named arguments such as T must be on the CPU, where the mean is not.
    y = fn.coord_transform(x, M=m) + fn.reshape(shift, shape=[1, 1, 3])
    return fn.reshape(math.min(math.max(y, _BLACK), _WHITE), layout="HWC")


def _blurred(x: Any, drawn: dict[str, Any], config: LoaderConfig) -> Any:
    if "blur" not in config.skipped:
        return fn.gaussian_blur(x, sigma=drawn["sigma"], window_size=drawn["taps"])
    if drawn["if blur"]:
        x = fn.gaussian_blur(x, sigma=drawn["sigma"], window_size=drawn["taps"])
    return x


def _solarized(x: Any, drawn: dict[str, Any], config: LoaderConfig) -> Any:
    if "solarize" not in config.skipped:
        return _inverted(x, drawn["threshold"], config)
    if drawn["if solarize"]:
        x = _inverted(x, drawn["threshold"], config)
    return x


def _inverted(x: Any, threshold: Any, config: LoaderConfig) -> Any:
    limit = threshold if config.device_id is None else threshold.gpu()
    return fn.reshape(x + (x >= limit) * (_WHITE - x - x), layout="HWC")
