"""The one decoder: what training decodes with is what packing and verification ask."""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from simclr_dali.shards.forked import use_dali

BATCH = 16  # images at a time; more do not fit the processor's cache once decoded


def decoded(encoded: Any, *, on_gpu: bool, region: tuple[Any, Any] | None = None, on_engine: Any | None = None) -> Any:
    """A DALI node: encoded images to uint8 RGB (height, width, 3).

    EXIF rotation stays off, as in torchvision: crop boxes are drawn for the picture as stored. Fancy upsampling makes
    the GPU decoder interpolate chroma as libjpeg does on the CPU. region: nodes with the corners (y, x), int32, that
    decoding may be limited to. on_engine: a node that says of each image whether the JPEG engine of a GPU decodes it
    (pipeline.engine), which rounds otherwise than the rest; without it the engine is off, since DALI's own share of a
    batch would make pixels depend on the batch.
    """
    if on_engine is None:
        return _decoded(encoded, on_gpu, region, engine_load=0.0)
    # DALI makes a conditional of each sample of this; it knows no ternary operator.
    if on_engine:
        image = _decoded(encoded, on_gpu, region, engine_load=1.0)
    else:
        image = _decoded(encoded, on_gpu, region, engine_load=0.0)
    return image


def _decoded(encoded: Any, on_gpu: bool, region: tuple[Any, Any] | None, *, engine_load: float) -> Any:
    common: dict[str, Any] = {
        "device": "mixed" if on_gpu else "cpu",
        "output_type": types.RGB,
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,
    }
    if on_gpu:
        common["hw_decoder_load"] = engine_load
    if region is None:
        return fn.decoders.image(encoded, **common)
    return fn.decoders.image_slice(encoded, start=region[0], end=region[1], axes=[0, 1], **common)


class Decoder:
    """Tells which images DALI decodes to the size that their header announces."""

    def __init__(self, device_id: int | None = None) -> None:
        """device_id: CUDA device, or None for the CPU."""
        self._device_id = device_id
        self._pipeline: Pipeline | None = None
        self._free = threading.Lock()

    def accepts(self, images: Sequence[bytes], sizes: Sequence[tuple[int, int]]) -> list[bool]:
        """For each image whether it decodes to ``sizes`` (width, height); any number of images, in any thread."""
        with self._free:
            return self._accepts(images, sizes)

    def _accepts(self, images: Sequence[bytes], sizes: Sequence[tuple[int, int]]) -> list[bool]:
        verdicts: list[bool] = []
        for at in range(0, len(images), BATCH):
            some, of_size = images[at : at + BATCH], sizes[at : at + BATCH]
            shapes = self._shapes(some)
            if shapes is None:
                # One bad image fails its whole batch without a name: ask for each alone.
                shapes = [alone[0] if (alone := self._shapes([image])) else (0, 0, 0) for image in some]
            verdicts += [shape == (height, width, 3) for shape, (width, height) in zip(shapes, of_size, strict=True)]
        return verdicts

    def _shapes(self, images: Sequence[bytes]) -> list[tuple[int, ...]] | None:
        """The decoded shapes, or None where DALI refuses one of the images."""
        if not all(images):
            return None
        use_dali()
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            self._pipeline.feed_input("encoded", [np.frombuffer(image, np.uint8) for image in images])
            (pictures,) = self._pipeline.run()
            return [tuple(shape) for shape in pictures.shape()]
        except RuntimeError:
            # A pipeline that has failed once stays failed.
            self._pipeline = None
            return None

    def _build(self) -> Pipeline:
        @pipeline_def(batch_size=BATCH, num_threads=1, device_id=self._device_id, prefetch_queue_depth=1)
        def graph() -> Any:
            encoded = fn.external_source(name="encoded", batch=True, no_copy=True)
            return decoded(encoded, on_gpu=self._device_id is not None)

        pipeline = graph()
        pipeline.build()
        return pipeline


@functools.cache
def decoder(device: str) -> Decoder:
    """The process's own decoder on ``device``, "cpu" or "gpu" (the first one it sees)."""
    return Decoder(0 if device == "gpu" else None)
