"""The input pipelines that scripts/bench/loader.py compares, each as an endless stream of batches.

All give two 224-pixel views of each image as one normalised float tensor on the device, with SimCLR's augmentations
and bilinear crops:

- ours: pipeline.loader on shards;
- torchvision-v1: transforms on Pillow images in a DataLoader, the common recipe;
- torchvision-v2: transforms.v2 on uint8 tensors in a DataLoader;
- lightly: lightly's own dataset and SimCLRTransform in a DataLoader;
- solo-learn: its manner of doing it in DALI (solo/data/dali_dataloader.py): file reader, one decode, native random
  operators one after the other on bytes, a blur of 23 taps, and masks that compute both cases of every random step.
"""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def, types
from torch.utils.data import DataLoader, Dataset, RandomSampler

from simclr_dali.model.vision import torchvision
from simclr_dali.pipeline.batch_plan import BatchPlan
from simclr_dali.pipeline.draws import Recipe
from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.graph import MEAN, STD, LoaderConfig
from simclr_dali.pipeline.loader import TwoViews
from simclr_dali.pipeline.order import Order
from simclr_dali.train.config import Graph, Simclr

SIZE = 224
KERNEL = 23  # pixels, a tenth of the view, as the paper's
ENDLESS = 10**6
Stream = Iterator[torch.Tensor]


def ours(images: Path, shards: Path, device: torch.device, batch: int, cores: int, **changes: Any) -> Stream:
    split = Split.local(shards, "train")
    order = Order(split.shards.shard_sizes(), batch, 1, 8, 0)
    as_trained: dict[str, Any] = dict(Graph().on(device.type))
    if device.type == "cuda":
        as_trained |= {"dtype": torch.float16, "engine_share": Simclr().engine_share}
    config = LoaderConfig(**{"size": SIZE, "device": device, "threads": cores, **as_trained, **changes})
    for views, _, _ in TwoViews(split, BatchPlan(order, epochs=ENDLESS), Recipe(), config):
        yield views


def torchvision_v1(images: Path, shards: Path, device: torch.device, batch: int, cores: int) -> Stream:
    transforms = torchvision.transforms
    view = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([transforms.GaussianBlur(KERNEL, (0.1, 2.0))], 0.5),
            transforms.ToTensor(),
            transforms.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD]),
        ]
    )
    return _from_data_loader(_folder(images, lambda picture: (view(picture), view(picture))), device, batch, cores)


def torchvision_v2(images: Path, shards: Path, device: torch.device, batch: int, cores: int) -> Stream:
    v2 = importlib.import_module("torchvision.transforms.v2")  # takes a second, so only where it is measured

    view = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(KERNEL, (0.1, 2.0))], 0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD]),
        ]
    )

    def views(picture: Any) -> tuple[Any, Any]:
        pixels = v2.functional.pil_to_tensor(picture)
        return view(pixels), view(pixels)

    return _from_data_loader(_folder(images, views), device, batch, cores)


def lightly(images: Path, shards: Path, device: torch.device, batch: int, cores: int) -> Stream:
    # model.vision has imported torchvision already, without which lightly's own import of it could fail.
    from lightly.data import LightlyDataset
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(input_size=SIZE, cj_strength=1.0)
    return _from_data_loader(LightlyDataset(str(images / "train"), transform=transform), device, batch, cores)


def solo_learn(images: Path, shards: Path, device: torch.device, batch: int, cores: int) -> Stream:
    on_gpu = device.type == "cuda"
    where = "gpu" if on_gpu else "cpu"
    files = sorted(str(path) for path in (images / "train").rglob("*.*"))

    def either(probability: float, changed: Any, kept: Any) -> Any:
        chosen = fn.cast(fn.random.coin_flip(probability=probability), dtype=types.BOOL)
        return chosen * changed + (chosen ^ True) * kept

    def view(image: Any) -> Any:
        x = fn.random_resized_crop(image, device=where, size=SIZE, random_area=(0.08, 1.0))
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
        x = either(0.5, fn.gaussian_blur(x, device=where, window_size=(KERNEL, KERNEL), sigma=sigma), x)
        return fn.crop_mirror_normalize(
            x,
            device=where,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=list(MEAN),
            std=list(STD),
            mirror=fn.random.coin_flip(probability=0.5),
        )

    @pipeline_def(batch_size=batch, num_threads=cores, device_id=0 if on_gpu else None, prefetch_queue_depth=2)
    def graph() -> tuple[Any, ...]:
        encoded, _ = fn.readers.file(files=files, shuffle_after_epoch=True, name="files")
        image = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
        return view(image), view(image)

    pipeline = graph()
    pipeline.build()
    while True:
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


def _from_data_loader(dataset: Dataset[Any], device: torch.device, batch: int, cores: int) -> Stream:
    on_gpu = device.type == "cuda"
    sampler = RandomSampler(dataset, num_samples=ENDLESS * batch)  # type: ignore[arg-type]
    loader = DataLoader(dataset, batch, sampler=sampler, num_workers=cores, drop_last=True, pin_memory=on_gpu)
    for (first, second), *_ in loader:
        yield torch.cat([first.to(device, non_blocking=True), second.to(device, non_blocking=True)])
