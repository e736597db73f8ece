"""Small sources as they lie on people's disks, drawn in code."""

import io
import itertools
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from simclr_dali.shards.manifest import load_split, unseal

_numbers = itertools.count()


def picture(width: int = 40, height: int = 30) -> PIL.Image.Image:
    """One unlike all others."""
    coarse = np.random.default_rng(next(_numbers)).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize((width, height))


def encoded(kind: str = "JPEG") -> bytes:
    memory = io.BytesIO()
    picture().save(memory, kind)
    return memory.getvalue()


def put(path: Path, data: bytes | None = None) -> Path:
    """A file, a picture unless ``data`` says otherwise, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded() if data is None else data)
    return path


def class_folders(root: Path, splits: dict[str, int], classes: Iterable[str] = ("ant", "bee")) -> Path:
    for split, count in splits.items():
        for name in classes:
            for number in range(count):
                put(root / split / name / f"{number}.jpg")
    return root


def put_array(path: Path, array: npt.NDArray[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array).save(path)
    return path


def put_tar(path: Path, members: Mapping[str, bytes | tarfile.TarInfo]) -> Path:
    """A tar of files by name; a TarInfo is put as it is, without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = 0 if isinstance(data, tarfile.TarInfo) else len(data)
            out.addfile(info, None if isinstance(data, tarfile.TarInfo) else io.BytesIO(data))
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def samples(count: int, key: str = "{}", kind: str = "jpg") -> dict[str, bytes]:
    """Members of a WebDataset tar: pictures with labels 0 and 1 by turns."""
    found = {}
    for number in range(count):
        found[f"{key.format(number)}.{kind}"] = encoded()
        found[f"{key.format(number)}.cls"] = str(number % 2).encode()
    return found


def labels(out: Path, split: str) -> list[str]:
    """The sorted class names of a packed split's pictures; empty names where there are no labels."""
    shards = load_split(out, split)
    return sorted(shards.class_name(label) for label in shards.samples["label"].tolist())


def report(out: Path) -> dict[str, Any]:
    return unseal((out / "report.json").read_bytes())


def left_out(out: Path, split: str = "train") -> dict[str, int]:
    """Reason -> count of what was not packed of a split, and beside the splits."""
    found = report(out)
    counts: Counter[str] = Counter()
    for one in (*found[split]["not_packed"], *found["beside"]):
        counts[one["reason"]] += one["count"]
    return dict(counts)


def stored(out: Path, split: str) -> list[bytes]:
    """The encoded pictures of a packed split, in storage order."""
    shards = load_split(out, split)
    tars = [(shards.folder / shard.name).read_bytes() for shard in shards.shards]
    return [tars[row["shard"]][row["offset"] : int(row["offset"]) + int(row["length"])] for row in shards.samples]
