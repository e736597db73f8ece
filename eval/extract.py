"""Write the features of pictures: pooled embeddings, and on request the feature maps.

    python eval/extract.py --ckpt runs/ds_lars --data /data/imagenet-shards --split val --out val.npy
    python eval/extract.py --ckpt runs/ds_lars holiday/ bird.jpg --out holiday.safetensors
    python eval/extract.py --ckpt resnet50.pth --image-size 224 holiday/ --out holiday.npy --map   # other weights

An embedding is the mean of the last feature map over the picture: float32, [images, width], 2,048 wide for ResNet-50.
--map writes the maps as well, [images, width, size / 32, size / 32]: not pooled. OUT.npy holds the embeddings, and
OUT-map.npy the maps; OUT.safetensors holds "embeddings", "feature_maps" and, of shards, "labels". OUT.json beside them
holds the ids in the order of the rows (WebDataset keys, or the files), labels and classes, and where all of it comes
from.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# This script's own folder must not shadow installed modules, and its checkout must win over an installed copy.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from eval.opened import (  # noqa: E402
    CENTER_FRACTION,
    add_data_arguments,
    add_encoder_arguments,
    asking_device,
    open_encoder,
    open_one_split,
    own_size,
)
from model.checkpoint import CheckpointError  # noqa: E402
from pipeline.loader import Setting, labelled  # noqa: E402
from pipeline.pictures import PictureFiles, find_pictures, refuse_failures, views_of  # noqa: E402
from pipeline.subset import keys  # noqa: E402
from shards.durable import refusals_named, write_durably  # noqa: E402
from shards.errors import UserError, run_main  # noqa: E402
from shards.source import SPLITS  # noqa: E402


def main() -> None:
    arguments = parse_arguments()
    out: Path = arguments.out
    if out.suffix not in (".npy", ".safetensors"):
        raise UserError(f"--out is {out}; its ending must be .npy or .safetensors")
    source = open_encoder(arguments)
    device, cores = asking_device()
    encoder = source.encoder.to(device, memory_format=torch.channels_last)
    size = arguments.image_size or own_size(source)
    setting = Setting(size=size, device=device, threads=cores)
    about: dict[str, Any] = {
        "encoder": f"{source.architecture.name} x{source.architecture.width:g}",
        "layout": source.layout,
        "checkpoint": str(source.path),
        "checkpoint_sha256": source.sha256,
        "untrained": arguments.untrained,
        "image_size": size,
        "center_fraction": CENTER_FRACTION,
        "pooled": "mean over the feature map",
    }
    files, paths = None, []
    if arguments.images:
        paths = find_pictures(arguments.images)
        files = PictureFiles(paths)
        count = len(paths)
        views = (
            (found.views, found.places)
            for found in views_of(files, setting, batch=arguments.batch, center_fraction=CENTER_FRACTION)
        )
    else:
        split = open_one_split(arguments, source)
        count = len(split.shards)
        about |= {"manifest": split.shards.fingerprint, "split": split.shards.split}
        views = (
            (found.views, found.ids.tolist())
            for found in labelled(
                split.shards, setting, batch=arguments.batch, center_fraction=CENTER_FRACTION, files=split.files
            )
        )
    rows = Rows(out, count, with_map=arguments.map)
    with torch.inference_mode(), tqdm(total=count, desc="features", unit=" images", disable=None) as bar:
        for images, places in views:
            maps = encoder.features(images)
            rows.add(encoder.avgpool(maps).flatten(1), maps, places)
            bar.update(len(places))
    if files is not None:
        about["ids"] = [str(paths[place]) for place in rows.places]
    else:
        about["ids"] = keys(split.shards, split.files)
        about["labels"] = split.shards.samples["label"].tolist()
        about["classes"] = list(split.shards.classes)
    rows.finish(about.get("labels"))
    write_durably(out.with_suffix(".json"), (json.dumps(about, indent=1) + "\n").encode())
    print(f"{len(rows.places):,} embeddings of width {encoder.width}: {out}, ids in {out.with_suffix('.json')}")
    if files is not None:
        refuse_failures(files, paths)


class Rows:
    """Collects rows in files that are mapped into memory, so that any number of pictures fits."""

    def __init__(self, out: Path, count: int, *, with_map: bool) -> None:
        self._out, self._count, self._with_map = out, count, with_map
        self.places: list[int] = []
        self._arrays: dict[str, np.memmap[Any, Any]] = {}

    def add(self, embeddings: Tensor, maps: Tensor, places: list[int]) -> None:
        at = len(self.places)
        self.places += places
        for name, values in self._wanted(embeddings, maps):
            if name not in self._arrays:
                path = self._partial(name)
                with refusals_named(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    shape = (self._count, *values.shape[1:])
                    self._arrays[name] = np.lib.format.open_memmap(path, "w+", np.float32, shape)
            self._arrays[name][at : at + len(places)] = values.float().cpu().numpy()

    def finish(self, labels: list[int] | None) -> None:
        """Give the files their names; rows of pictures that could not be used are cut off."""
        kept = {name: array[: len(self.places)] for name, array in self._arrays.items()}
        with refusals_named(self._out):
            if self._out.suffix == ".safetensors":
                tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in kept.items()}
                if labels is not None:
                    tensors["labels"] = torch.tensor(labels)
                safetensors.torch.save_file(tensors, self._out)
            else:
                for name, array in kept.items():
                    array.flush() if isinstance(array, np.memmap) else None
                    if len(self.places) < self._count:
                        np.save(self._partial(name), np.array(array))
                    self._partial(name).replace(self._named(name))
            for name in kept:
                self._partial(name).unlink(missing_ok=True)

    def _wanted(self, embeddings: Tensor, maps: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield "embeddings", embeddings
        if self._with_map:
            yield "feature_maps", maps

    def _named(self, name: str) -> Path:
        return self._out if name == "embeddings" else self._out.with_name(f"{self._out.stem}-map.npy")

    def _partial(self, name: str) -> Path:
        return self._out.with_name(f"{self._out.stem}-{name}.partial.npy")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write features", epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="pictures, or folders (default: shards)")
    add_encoder_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--split", choices=SPLITS, default="val", help="of the shards (default: val)")
    parser.add_argument("--map", action="store_true", help="write the feature maps as well")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="ends with .npy or .safetensors")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main, CheckpointError)
