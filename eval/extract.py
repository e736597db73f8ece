"""Write the features of pictures: pooled embeddings, and on request the feature maps.

    python eval/extract.py --ckpt runs/ds_lars --data /data/imagenet-shards --split val --out val.npy
    python eval/extract.py --ckpt runs/ds_lars holiday/ bird.jpg --out holiday.safetensors
    python eval/extract.py --ckpt resnet50.pth --image-size 224 holiday/ --out holiday.npy --map   # other weights

An embedding is the mean of the last feature map over the picture: float32, [images, width], 2,048 wide for ResNet-50.
--map writes the maps as well, [images, width, size / 32, size / 32] (size / 8 with the 3x3 stem): not pooled. OUT.npy
holds the embeddings, and OUT-map.npy the maps; OUT.safetensors holds "embeddings", "feature_maps" and, of shards,
"labels". OUT.ids.json beside them holds the ids in the order of the rows (WebDataset keys, or the files), labels and
classes, and where all of it comes from. Rows go to disk as they are made, so any number of pictures fits.
"""

import argparse
import json
import math
import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

if __name__ == "__main__":
    # This script's own folder must not shadow installed modules, and its checkout must win over an installed copy.
    sys.path[0] = str(Path(__file__).resolve().parents[1] / ".package")

from simclr_dali.eval.arguments import DataChoice, EncoderChoice, add_data_arguments, add_encoder_arguments
from simclr_dali.shards.command_line import parser_of
from simclr_dali.shards.errors import UserError, run_main
from simclr_dali.shards.sources.source import SPLITS


def parse_arguments() -> argparse.Namespace:
    parser = parser_of("Write features", __doc__)
    parser.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="pictures, or folders (default: shards)")
    add_encoder_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--split", choices=SPLITS, default="val", help="of the shards (default: val)")
    parser.add_argument("--map", action="store_true", help="write the feature maps as well")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="ends with .npy or .safetensors")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from simclr_dali.eval.evaluation import cache_of, data_of, image_size_of, open_encoder, origin, own_device
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.image_files import ImageFiles, central_views_of_files, find_images, refuse_failures
from simclr_dali.pipeline.loader import central_views
from simclr_dali.pipeline.remote import open_split
from simclr_dali.pipeline.subset import keys
from simclr_dali.shards.durable import refusals_named, write_durably, writing


def main(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    written = files_of(out, arguments.map)
    chosen, data = EncoderChoice.of(arguments), DataChoice.of(arguments)
    source = open_encoder(chosen)
    device, cores = own_device()
    encoder = source.encoder.place(device)
    size = image_size_of(chosen, source)
    config = LoaderConfig(size=size, device=device, threads=cores)
    about = origin(source, size) | {"untrained": arguments.untrained, "pooled": "mean over the feature map"}
    files, paths = None, []
    if arguments.images:
        paths = find_images(arguments.images)
        files = ImageFiles(paths)
        names = [str(path) for path in paths]
        views = ((found.views, found.places) for found in central_views_of_files(files, config, batch=arguments.batch))
    else:
        split = open_split(data_of(data, source), arguments.split, cache_of(data))
        shards = split.shards
        names = keys(split)
        about |= {"manifest": shards.fingerprint, "split": shards.split, "classes": list(shards.classes)}
        made = central_views(split, config, batch=arguments.batch)
        views = ((found.views, found.ids.tolist()) for found in made)
    places: list[int] = []
    with refusals_named(out), ExitStack() as stack:
        out.parent.mkdir(parents=True, exist_ok=True)
        embeddings = stack.enter_context(RowFile(out.with_name(f"{out.stem}.partial-embeddings")))
        maps = stack.enter_context(RowFile(out.with_name(f"{out.stem}.partial-map"))) if arguments.map else None
        with torch.inference_mode(), tqdm(total=len(names), desc="features", unit=" images", disable=None) as bar:
            for images, of in views:
                features = encoder.features(images)
                embeddings.add(encoder.pool(features))
                if maps is not None:
                    maps.add(features)
                places += of
                bar.update(len(of))
        if not places:
            assert files is not None
            refuse_failures(files, paths)
        about["ids"] = [names[place] for place in places]
        labels = None if arguments.images else torch.from_numpy(shards.samples["label"].astype(np.int64))
        if labels is not None:
            about["labels"] = labels.tolist()
        try:
            give_names(out, embeddings, maps, labels)
            write_durably(out.with_suffix(".ids.json"), (json.dumps(about, indent=1) + "\n").encode())
        except BaseException:
            for path in written:  # none of them was there before
                path.unlink(missing_ok=True)
            raise
    print(f"{len(places):,} embeddings of width {encoder.width}: {out}, ids in {out.with_suffix('.ids.json')}")
    if files is not None:
        refuse_failures(files, paths)


def files_of(out: Path, maps: bool) -> list[Path]:
    """What is written for ``out``. Raises UserError where its ending is not known, or any of it is there already."""
    if out.suffix not in (".npy", ".safetensors"):
        raise UserError(f"--out is {out}; its ending must be .npy or .safetensors")
    written = [out, out.with_suffix(".ids.json"), *([_map_of(out)] if maps and out.suffix == ".npy" else [])]
    for path in written:
        if path.exists():
            raise UserError(f"{path} exists already; give another --out, or remove it")
    return written


def give_names(out: Path, embeddings: "RowFile", maps: "RowFile | None", labels: Tensor | None) -> None:
    """Turn the rows that were written into the files that were asked for."""
    if out.suffix == ".npy":
        if maps is not None:
            maps.become_npy(_map_of(out))
        embeddings.become_npy(out)
    else:
        write_safetensors(out, {"embeddings": embeddings, **({"feature_maps": maps} if maps else {})}, labels)


def _map_of(out: Path) -> Path:
    return out.with_name(f"{out.stem}-map.npy")


class RowFile:
    """float32 rows of one shape, written one after the other; gone at the end, unless it was given a name."""

    _HEADER = 128  # bytes before the rows, filled in when their number is known

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb+")
        self._file.write(b"\0" * self._HEADER)
        self.shape: tuple[int, ...] = (0,)

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()  # a full disk may refuse what it still holds
        finally:
            self._path.unlink(missing_ok=True)

    def add(self, rows: Tensor) -> None:
        self._file.write(rows.float().cpu().contiguous().numpy().tobytes())
        self.shape = (self.shape[0] + len(rows), *rows.shape[1:])

    def become_npy(self, path: Path) -> None:
        """NumPy's format, version 1.0: magic, length of the header, header padded with spaces (numpy.lib.format)."""
        header = repr({"descr": "<f4", "fortran_order": False, "shape": self.shape}).encode()
        header = header.ljust(self._HEADER - 11) + b"\n"
        self._file.seek(0)
        self._file.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._path.replace(path)

    def copy_rows(self, target: BinaryIO) -> None:
        self._file.seek(self._HEADER)
        shutil.copyfileobj(self._file, target, 1 << 24)


def write_safetensors(path: Path, rows: dict[str, RowFile], labels: Tensor | None) -> None:
    """safetensors' format: length of the header, JSON with places, then the tensors; no tensor is held in memory."""
    header: dict[str, Any] = {}
    at = 0
    for name, file in rows.items():
        size = 4 * math.prod(file.shape)
        header[name] = {"dtype": "F32", "shape": list(file.shape), "data_offsets": [at, at + size]}
        at += size
    if labels is not None:
        header["labels"] = {"dtype": "I64", "shape": [len(labels)], "data_offsets": [at, at + 8 * len(labels)]}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with writing(path) as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for file in rows.values():
            file.copy_rows(target)
        if labels is not None:
            target.write(labels.numpy().tobytes())


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
