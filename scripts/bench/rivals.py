"""The input pipelines that scripts/bench/loader.py compares, each as an endless stream of batches.

All give two views of each image as one normalised float tensor on the device, with SimCLR's augmentations and bilinear
crops:

- ours: pipeline.loader on shards, with its decoded pictures kept or not;
- torchvision-v1: transforms on Pillow images in a DataLoader, the common recipe;
- torchvision-v2: transforms.v2 on uint8 tensors in a DataLoader;
- lightly: lightly's own dataset and SimCLRTransform in a DataLoader;
- solo-learn: its manner of doing it in DALI (solo/data/dali_dataloader.py): file reader, one decode, native random
  operators one after the other on bytes, a blur of a tenth of the view, and masks that compute both cases of every
  random step. Its decoder's share of the JPEG engine is DALI's own.

A DataLoader's workers deliver in waves, of which a measure needs several; its batches are cut to WAVE images each,
since they would else take a minute, and its rate does not depend on them.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nvidia.dali import fn, pipeline_def, types
from torch.utils.data import DataLoader, Dataset, RandomSampler

from simclr_dali.model.vision import torchvision
from simclr_dali.pipeline.batch_plan import BatchPlan
from simclr_dali.pipeline.draws import Recipe
from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.graph import MEAN, STD, LoaderConfig
from simclr_dali.pipeline.kept_memory import set_aside
from simclr_dali.pipeline.kept_place import Place
from simclr_dali.pipeline.loader import TwoViews, central_views
from simclr_dali.pipeline.order import Order
from simclr_dali.shards.errors import UserError
from simclr_dali.train.simclr_block import Graph, Simclr

ENDLESS = 10**6
WAVE = 32
Stream = Iterator[torch.Tensor]


class Given(NamedTuple):
    """What each contender gets."""

    images: Path
    """A folder with a train split of pictures in folders by class."""
    shards: Path
    """The same, packed."""
    device: torch.device
    batch: int
    cores: int
    view: int = 224
    """Side of a view, in pixels."""
    wave: int = WAVE
    """Largest batch of a DataLoader."""

    @property
    def kernel(self) -> int:
        """Width of the blur's kernel: a tenth of the view, odd, as the paper's 23 of 224 pixels."""
        return 2 * (self.view // 10 // 2) + 1


def ours(given: Given, keep_decoded: Place = "no", **changes: Any) -> Stream:
    """keep_decoded: with all pictures decoded before the first batch. changes: of the loader's settings."""
    split = Split.local(given.shards, "train")
    order = Order(split.shards.shard_sizes(), given.batch, 1, 8, 0)
    as_trained: dict[str, Any] = dict(Graph().on(given.device.type))
    if given.device.type == "cuda":
        as_trained |= {"dtype": torch.float16, "engine_share": Simclr().engine_share}
    config = LoaderConfig(
        **{"size": given.view, "device": given.device, "threads": given.cores, **as_trained, **changes}
    )
    kept, words = set_aside(split.shards, keep_decoded, given.device, beside=lambda: 0)
    if kept:
        for _ in central_views(split, replace(config, size=32), batch=given.batch, kept=kept):
            pass
    elif keep_decoded != "no":
        raise UserError(words)
    for views, _, _ in TwoViews(split, BatchPlan(order, epochs=ENDLESS), Recipe(), config, kept=kept):
        yield views


def torchvision_v1(given: Given) -> Stream:
    transforms = torchvision.transforms
    view = transforms.Compose(
        [
            transforms.RandomResizedCrop(given.view),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([transforms.GaussianBlur(given.kernel, (0.1, 2.0))], 0.5),
            transforms.ToTensor(),
            transforms.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD]),
        ]
    )
    return _from_data_loader(_folder(given.images, lambda picture: (view(picture), view(picture))), given)


def torchvision_v2(given: Given) -> Stream:
    v2 = importlib.import_module("torchvision.transforms.v2")  # takes a second, so only where it is measured

    view = v2.Compose(
        [
            v2.RandomResizedCrop(given.view, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(given.kernel, (0.1, 2.0))], 0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD]),
        ]
    )

    def views(picture: Any) -> tuple[Any, Any]:
        pixels = v2.functional.pil_to_tensor(picture)
        return view(pixels), view(pixels)

    return _from_data_loader(_folder(given.images, views), given)


def lightly(given: Given) -> Stream:
    # model.vision has imported torchvision already, without which lightly's own import of it could fail.
    from lightly.data import LightlyDataset
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(input_size=given.view, cj_strength=1.0)
    return _from_data_loader(LightlyDataset(str(given.images / "train"), transform=transform), given)


def solo_learn(given: Given) -> Stream:
    on_gpu = given.device.type == "cuda"
    where = "gpu" if on_gpu else "cpu"
    files = sorted(str(path) for path in (given.images / "train").rglob("*.*"))
    taps = (given.kernel, given.kernel)

    def either(probability: float, changed: Any, kept: Any) -> Any:
        chosen = fn.cast(fn.random.coin_flip(probability=probability), dtype=types.BOOL)
        return chosen * changed + (chosen ^ True) * kept

    def view(image: Any) -> Any:
        x = fn.random_resized_crop(image, device=where, size=given.view, random_area=(0.08, 1.0))
        jittered = fn.color_twist(
            x,
            device=where,
            brightness=fn.random.uniform(range=(0.2, 1.8)),
            contrast=fn.random.uniform(range=(0.2, 1.8)),
            saturation=fn.random.uniform(range=(0.2, 1.8)),
            hue=fn.random.uniform(range=(-72.0, 72.0)),
        )
        x = either(0.8, jittered, x)
        gray = fn.color_space_conversion(x, device=where, image_type=types.RGB, output_type=types.GRAY)
        x = either(0.2, fn.cat(gray, gray, gray, axis=2), x)
        sigma = fn.random.uniform(range=(0.1, 2.0))
        x = either(0.5, fn.gaussian_blur(x, device=where, window_size=taps, sigma=sigma), x)
        return fn.crop_mirror_normalize(
            x,
            device=where,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=list(MEAN),
            std=list(STD),
            mirror=fn.random.coin_flip(probability=0.5),
        )

    @pipeline_def(
        batch_size=given.batch, num_threads=given.cores, device_id=0 if on_gpu else None, prefetch_queue_depth=2
    )
    def graph() -> tuple[Any, ...]:
        encoded, _ = fn.readers.file(files=files, shuffle_after_epoch=True, name="files")
        image = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
        return view(image), view(image)

    pipeline = graph()
    pipeline.build()
    while True:
        # DALI gives the memory of these outputs away at the next run, so the copy has to be done by then.
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        outputs = pipeline.run()
        yield torch.cat([torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in outputs])


CONTENDERS: dict[str, Callable[..., Stream]] = {
    "ours": ours,
    "torchvision-v1": torchvision_v1,
    "torchvision-v2": torchvision_v2,
    "lightly": lightly,
    "solo-learn": solo_learn,
}


class _Transformed(Dataset[Any]):
    """Pillow images of a folder and what ``views`` makes of them."""

    def __init__(self, images: Path, views: Callable[[Any], Any]) -> None:
        self._folder, self._views = torchvision.datasets.ImageFolder(str(images / "train")), views

    def __len__(self) -> int:
        return len(self._folder)

    def __getitem__(self, index: int) -> Any:
        picture, label = self._folder[index]
        return self._views(picture), label


def _folder(images: Path, views: Callable[[Any], Any]) -> Dataset[Any]:
    return _Transformed(images, views)


def _from_data_loader(dataset: Dataset[Any], given: Given) -> Stream:
    device, batch = given.device, min(given.batch, given.wave)
    sampler = RandomSampler(dataset, num_samples=ENDLESS * batch)  # type: ignore[arg-type]
    pinned = device.type == "cuda"
    loader = DataLoader(dataset, batch, sampler=sampler, num_workers=given.cores, drop_last=True, pin_memory=pinned)
    for (first, second), *_ in loader:
        yield torch.cat([first.to(device, non_blocking=True), second.to(device, non_blocking=True)])
