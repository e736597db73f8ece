"""Write the features of pictures: pooled embeddings, and on request the feature maps.

    python eval/extract.py --ckpt runs/ds_lars --data /data/imagenet-shards --split val --out val.npy
    python eval/extract.py --ckpt runs/ds_lars holiday/ bird.jpg --out holiday.safetensors
    python eval/extract.py --ckpt resnet50.pth --image-size 224 holiday/ --out holiday.npy --map   # other weights

An embedding is the mean of the last feature map over the picture: float32, [images, width], 2,048 wide for ResNet-50.
--layer projector writes the projector's output z instead, and projector.1, projector.2 ... its hidden layers.
--map writes the maps as well, [images, width, size / 32, size / 32] (size / 8 with the 3x3 stem): not pooled. OUT.npy
holds the embeddings, and OUT-map.npy the maps; OUT.safetensors holds "embeddings", "feature_maps" and, of shards,
"labels". OUT.ids.json beside them holds the ids in the order of the rows (WebDataset keys, or the files), labels and
classes, and where all of it comes from. Rows go to disk as they are made, so any number of pictures fits.
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

if __name__ == "__main__":
    # This script's own folder must not shadow installed modules, and its checkout must win over an installed copy.
    sys.path[0] = str(Path(__file__).resolve().parents[1] / ".package")

from simclr_dali.eval.arguments import DataChoice, EncoderChoice, add_data_arguments, add_encoder_arguments
from simclr_dali.shards.command_line import parser_of
from simclr_dali.shards.errors import UserError, run_main
from simclr_dali.shards.sources.source import SPLITS


def layer(text: str) -> str:
    """The type of --layer."""
    if not re.fullmatch(r"encoder|projector(\.[1-9]\d*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not encoder, projector, or projector.1 and so on")
    return text


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument(
        "images", type=Path, nargs="*", metavar="IMAGE", help="They are pictures, or folders (default: shards)."
    )
    add_encoder_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--split", choices=SPLITS, default="val", help="Take this split of the shards (default: val).")
    parser.add_argument(
        "--layer", type=layer, default="encoder", metavar="LAYER",
        help="Write what this layer gives: encoder (default), projector (z, not normalised), or, of runs, projector.1 "
        "and so on, its hidden layers.",
    )  # fmt: skip
    parser.add_argument("--map", action="store_true", help="Write the feature maps as well.")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="Write to this .npy or .safetensors file."
    )
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from simclr_dali.eval.evaluation import cache_of, data_of, image_size_of, open_encoder, origin
from simclr_dali.model.pretrained import Pretrained
from simclr_dali.model.process import Process, from_all_ranks, init_distributed, leave, on_rank_0, print_rank_0
from simclr_dali.model.simclr import build_model, build_projector, part_of_projector, projector_weights
from simclr_dali.pipeline.features import share
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.image_files import ImageFiles, central_views_of_files, find_images, refuse_failures
from simclr_dali.pipeline.loader import central_views
from simclr_dali.pipeline.remote import open_split
from simclr_dali.pipeline.subset import keys
from simclr_dali.shards.durable import refusals_named, write_durably, writing
from simclr_dali.shards.wording import counted


def main(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    process = init_distributed(timedelta(hours=2))
    on_rank_0(process, lambda: refuse_existing(out, arguments.map))
    chosen, data = EncoderChoice.of(arguments), DataChoice.of(arguments)
    source = open_encoder(chosen)
    print_rank_0(process, source.in_words())
    encoder = source.encoder.place(process.device)
    size = image_size_of(chosen, source)
    config = LoaderConfig(size=size, device=process.device, threads=process.cores)
    head = head_of(source, arguments.layer, untrained=arguments.untrained).to(process.device)
    about = origin(source, size) | {"untrained": arguments.untrained, "pooled": "mean over the feature map"}
    about["layer"] = arguments.layer
    files, labels, paths = None, None, []
    if arguments.images:
        paths = find_images(arguments.images)
        names = [str(path) for path in paths]
        own = share(len(names), process.rank, process.world)
        files = ImageFiles([paths[place] for place in own])
        found = central_views_of_files(files, config, batch=arguments.batch)
        views = ((part.views, [int(own[place]) for place in part.places]) for part in found)
    else:
        split = open_split(data_of(data, source), arguments.split, cache_of(data))
        shards = split.shards
        names = keys(split)
        about |= {"manifest": shards.fingerprint, "split": shards.split, "classes": list(shards.classes)}
        labels = shards.samples["label"].astype(np.int64)
        own = share(len(names), process.rank, process.world)
        views = (
            (part.views, part.ids.tolist()) for part in central_views(split, config, batch=arguments.batch, ids=own)
        )
    with refusals_named(out), ExitStack() as stack:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Rows(out, process, stack, maps=arguments.map)
        with (
            torch.inference_mode(),
            tqdm(total=len(own), desc="features", unit=" images", disable=process.rank > 0 or None) as bar,
        ):
            for images, of in views:
                made.add(encoder.features(images), lambda maps: head(encoder.pool(maps)), of)
                bar.update(len(of))
        places = made.gather()
        failures = _all_failures(files, own, process)
        if not places:
            refuse_failures(failures, paths)
        about["ids"] = [names[place] for place in places]
        if labels is not None:
            about["labels"] = labels.tolist()
        on_rank_0(process, lambda: made.give_names(labels, about))
    print_rank_0(
        process,
        f"{counted(len(places), 'embedding')} of width {made.width}: {out}, ids in {out.with_suffix('.ids.json')}",
    )
    if failures:
        refuse_failures(failures, paths)
    leave(process)


def _all_failures(files: ImageFiles | None, own: npt.NDArray[np.int64], process: Process) -> dict[int, str]:
    """Why files could not be used, by their place among all, on all ranks."""
    here = {int(own[place]): reason for place, reason in files.failures.items()} if files else {}
    return {place: reason for found in from_all_ranks(here) for place, reason in found.items()}


def refuse_existing(out: Path, maps: bool) -> None:
    """Raise UserError where the ending of ``out`` is not known, or any of what is written for it is there already."""
    if out.suffix not in (".npy", ".safetensors"):
        raise UserError(f"--out is {out}; its ending must be .npy or .safetensors")
    written = [out, out.with_suffix(".ids.json"), *([_map_of(out)] if maps and out.suffix == ".npy" else [])]
    for path in written:
        if path.exists():
            raise UserError(f"{path} exists already; give another --out, or remove it")


def head_of(source: Pretrained, name: str, *, untrained: bool) -> nn.Module:
    """What follows the pooled features up to the layer that --layer names.

    Raises UserError where the file has no projector, or not so many layers.
    """
    _, _, hidden = name.partition(".")
    if name == "encoder":
        return nn.Identity()
    if source.run_state is None:
        raise UserError(f"{source.path} holds no projector; --layer {name} needs a run of ours")
    if untrained:
        projector = build_model(source.architecture, source.run_state["seed"]).projector
    else:
        projector = build_projector(source.encoder.width, source.architecture.projector)
        projector.load_state_dict(projector_weights(source.run_state))
    try:
        return part_of_projector(projector, int(hidden) if hidden else None).eval().requires_grad_(False)
    except ValueError as error:
        raise UserError(f"--layer is {name}: {error}") from error


class Rows:
    """What all ranks make: files of their own beside OUT, whose names hold rank and process, joined by rank 0."""

    def __init__(self, out: Path, process: Process, stack: ExitStack, *, maps: bool) -> None:
        self._out, self._process = out, process
        kinds = ["embeddings", *(["feature_maps"] if maps else [])]
        tag = f"{process.rank}-{os.getpid()}"
        self._files = {
            kind: stack.enter_context(RowFile(out.with_name(f".{out.name}.{kind}-{tag}.tmp"))) for kind in kinds
        }
        self._places: list[int] = []

    def add(self, features: Tensor, embed: Callable[[Tensor], Tensor], places: list[int]) -> None:
        self._files["embeddings"].add(embed(features))
        if "feature_maps" in self._files:
            self._files["feature_maps"].add(features)
        self._places += places

    @property
    def width(self) -> int:
        """Of an embedding; known on rank 0 once all are gathered."""
        return self._files["embeddings"].shape[-1]

    def gather(self) -> list[int]:
        """Join the rows of all ranks in rank 0's files; the places of all rows, in order.

        Raises UserError where rank 0 does not see the file of another rank.
        """
        own = ({kind: (file.path, file.shape) for kind, file in self._files.items()}, self._places)
        for file in self._files.values():
            file.flush()
        everywhere = from_all_ranks(own)

        def join() -> None:
            for rank, (files, _) in enumerate(everywhere[1:], 1):
                for kind, (path, shape) in files.items():
                    if not path.is_file():
                        raise UserError(
                            f"rank 0 does not find {path}, which rank {rank} wrote; give an --out on a disk that all "
                            f"machines share"
                        )
                    self._files[kind].append(path, shape)

        on_rank_0(self._process, join)
        return [place for _, places in everywhere for place in places]

    def give_names(self, labels: npt.NDArray[np.int64] | None, about: dict[str, Any]) -> None:
        """Turn the rows into the files that were asked for; none of them stays where one cannot be written."""
        maps = self._files.get("feature_maps")
        written = []
        try:
            if self._out.suffix == ".npy":
                if maps is not None:
                    written.append(maps.become_npy(_map_of(self._out)))
                written.append(self._files["embeddings"].become_npy(self._out))
            else:
                written.append(write_safetensors(self._out, self._files, labels))
            described = self._out.with_suffix(".ids.json")
            write_durably(described, (json.dumps(about, indent=1) + "\n").encode(), tag=f".{os.getpid()}")
        except BaseException:
            for path in written:  # by this process, and there was none before
                path.unlink(missing_ok=True)
            raise


def _map_of(out: Path) -> Path:
    return out.with_name(f"{out.stem}-map.npy")


class RowFile:
    """float32 rows of one shape, written one after the other; gone at the end, unless it was given a name."""

    _HEADER = 128  # bytes before the rows, filled in when their number is known

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb+")
        self._file.write(b"\0" * self._HEADER)
        self.shape: tuple[int, ...] = (0,)

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()  # a full disk may refuse what it still holds
        finally:
            self.path.unlink(missing_ok=True)

    def add(self, rows: Tensor) -> None:
        self._file.write(rows.float().cpu().contiguous().numpy().tobytes())
        self.shape = (self.shape[0] + len(rows), *rows.shape[1:])

    def flush(self) -> None:
        self._file.flush()

    def append(self, path: Path, shape: tuple[int, ...]) -> None:
        """Add the rows of another file of this kind."""
        if not shape[0]:
            return
        with path.open("rb") as rows:
            rows.seek(self._HEADER)
            shutil.copyfileobj(rows, self._file, 1 << 24)
        self.shape = (self.shape[0] + shape[0], *shape[1:])

    def become_npy(self, path: Path) -> Path:
        """NumPy's format, version 1.0: magic, length of the header, header padded with spaces (numpy.lib.format)."""
        header = repr({"descr": "<f4", "fortran_order": False, "shape": self.shape}).encode()
        header = header.ljust(self._HEADER - 11) + b"\n"
        self._file.seek(0)
        self._file.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.path.replace(path)
        return path

    def copy_rows(self, target: BinaryIO) -> None:
        self._file.seek(self._HEADER)
        shutil.copyfileobj(self._file, target, 1 << 24)


def write_safetensors(path: Path, rows: dict[str, RowFile], labels: npt.NDArray[np.int64] | None) -> Path:
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
    with writing(path, f".{os.getpid()}") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for file in rows.values():
            file.copy_rows(target)
        if labels is not None:
            target.write(labels.astype("<i8").tobytes())
    return path


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS), shares_work=True)
