"""The description that lies beside a split's tars: ``manifest.json`` and ``samples.npy``.

A packed data set is a folder with one folder per split::

    OUT/report.json                       what was re-encoded or left out while packing, and why
    OUT/train/train-000000.tar  .idx      standard WebDataset tar and DALI index (v1.2)
    OUT/train/manifest.json               classes, per shard: name, samples, bytes, sha256
    OUT/train/samples.npy                 one row of SAMPLE per image, in storage order
"""

import hashlib
import json
import shlex
import tarfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from simclr_dali.shards.durable import sha256_of, write_durably, writing
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.image import MAX_PIXELS, allow_pixels
from simclr_dali.shards.wording import printable

FORMAT = "simclr-dali shards"
VERSION = 1
MANIFEST, TABLE = "manifest.json", "samples.npy"
BLOCK = 512  # bytes; every tar member starts on a block
SHARED_TABLE = 256 << 20  # bytes; a larger table is mapped
ROWS_AT_A_TIME = 1 << 22  # of a table that is checked

# offset and length (bytes) delimit the encoded image inside its tar; width and height are in pixels as stored,
# before any EXIF rotation; crc32 is zlib's, over the encoded image.
SAMPLE = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("length", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("label", "<i4"),
        ("crc32", "<u4"),
    ]
)


@dataclass(frozen=True)
class Shard:
    """One tar: file name, number of samples, size in bytes, sha256 in hex."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardSet:
    """A split as read from disk."""

    folder: Path
    split: str
    classes: tuple[str, ...]
    """Empty where the samples have no labels, which are then -1."""
    shards: tuple[Shard, ...]
    samples: npt.NDArray[Any]
    """Of dtype SAMPLE, ordered by shard, then offset."""
    fingerprint: str
    """sha256 of manifest.json, which itself holds the hashes of everything else."""
    source: str = ""
    """URL of the split where it is remote; the folder is then the cache of its shards."""

    def __len__(self) -> int:
        return len(self.samples)

    def shard_sizes(self) -> tuple[int, ...]:
        """Samples per shard."""
        return tuple(shard.samples for shard in self.shards)

    def class_name(self, label: int) -> str:
        """The name of a class, or nothing for -1."""
        return printable(self.classes[label]) if label >= 0 else ""

    def where(self, sample: int) -> str:
        """A name for one sample that a person can look up: tar, offset of its bytes, key."""
        row = self.samples[sample]
        path = self.folder / self.shards[row["shard"]].name
        name = None
        # A disk that fails may fail here too, and a cache may have let go of the tar.
        with suppress(OSError), path.open("rb") as tar:
            name = member_name(tar, int(row["offset"]), int(row["length"]))
        return f"{path}, offset {row['offset']}, member {name or 'with a damaged name'}"


def write_split(
    folder: Path,
    split: str,
    classes: list[str],
    shards: list[Shard],
    samples: npt.NDArray[Any],
    made_with: dict[str, Any],
) -> None:
    """Write ``samples.npy``, then ``manifest.json``; ``made_with`` records the options of the packer."""
    with writing(folder / TABLE) as table:
        np.save(table, samples)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "split": split,
        "samples": len(samples),
        "samples_sha256": sha256_of(folder / TABLE),
        "made_with": made_with,
        "classes": classes,
        "shards": [asdict(shard) for shard in shards],
    }
    write_durably(folder / MANIFEST, seal(manifest))


def seal(document: dict[str, Any]) -> bytes:
    """A JSON text that carries the sha256 of its own content, so that any change of it shows."""
    return _as_text({**document, "own_sha256": hashlib.sha256(_as_text(document)).hexdigest()})


def unseal(raw: bytes) -> dict[str, Any]:
    """What :func:`seal` was given; raises ValueError where ``raw`` is anything but its untouched result."""
    try:
        document: dict[str, Any] = json.loads(raw)
        own_hash = document.pop("own_sha256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is no sealed JSON: {error}") from error
    if hashlib.sha256(_as_text(document)).hexdigest() != own_hash or seal(document) != raw:
        raise ValueError("it does not match its own sha256")
    return document


def _as_text(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


def load_split(data: Path | str, split: str) -> ShardSet:
    """Read ``data/split`` and check it against its own description (sizes, hash of the table; no image is read).

    Raises UserError where the folder is not a packed split or a file is missing, cut or swapped.
    """
    folder = Path(data) / split
    shards = read_split(folder)
    for shard in shards.shards:
        if damage := size_damage(folder / shard.name, shard):
            raise UserError(damage)
    return shards


def size_damage(path: Path, shard: Shard) -> str | None:
    """A sentence where the tar at ``path`` is missing or of another size than ``shard`` says, else None."""
    if not path.is_file():
        return f"shard {path} is missing; copy it back or pack the data set again"
    if path.stat().st_size != shard.bytes:
        return f"shard {path} has {path.stat().st_size} bytes, its manifest says {shard.bytes}; copy it again"
    return None


def read_split(folder: Path) -> ShardSet:
    """Read the description in ``folder``, whether or not the tars lie beside it.

    Raises UserError where there is none, or manifest or table are damaged or of another version.
    """
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        raise UserError(_no_split(folder))
    raw = manifest_path.read_bytes()
    try:
        manifest = unseal(raw)
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise ValueError(f"format {manifest['format']!r}, version {manifest['version']!r}")
        shards = tuple(Shard(**shard) for shard in manifest["shards"])
        for shard in shards:
            if Path(shard.name).name != shard.name or shard.name in ("", "..") or "\\" in shard.name:
                raise ValueError(f"shard {shard.name!r} would lie outside of the folder")
        classes = tuple(str(name) for name in manifest["classes"])
        table_hash, split = manifest["samples_sha256"], manifest["split"]
        max_pixels = int(manifest["made_with"].get("max_pixels", MAX_PIXELS))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{manifest_path} is not a manifest this version reads ({error}); pack the data set again"
        ) from error
    samples = _load_table(folder / TABLE, table_hash)
    if len(samples) != sum(shard.samples for shard in shards) or not len(samples):
        raise UserError(
            f"{manifest_path} lists {sum(s.samples for s in shards)} samples, samples.npy holds {len(samples)}; pack "
            f"again"
        )
    for first in range(0, len(samples), ROWS_AT_A_TIME):
        _check_rows(folder / TABLE, first, samples[first : first + ROWS_AT_A_TIME], len(shards), classes, max_pixels)
    allow_pixels(max_pixels)  # for who looks at the pictures with Pillow
    return ShardSet(folder, split, classes, shards, samples, hashlib.sha256(raw).hexdigest())


def _check_rows(
    path: Path, first: int, rows: npt.NDArray[Any], shards: int, classes: tuple[str, ...], max_pixels: int
) -> None:
    """Raise UserError where some rows of the table, from row ``first`` on, say what cannot be."""
    if rows["shard"].max() >= shards or not min(rows["width"].min(), rows["height"].min()):
        raise UserError(f"{path} names shards or sizes that cannot be; pack the data set again")
    pixels = rows["width"].astype(np.int64) * rows["height"]
    if pixels.max() > max_pixels:
        raise UserError(
            f"{path}: sample {first + pixels.argmax()} has {pixels.max():,} pixels, more than the {max_pixels:,} that "
            f"were allowed when it was packed; pack the data set again"
        )
    lowest, highest = (0, len(classes) - 1) if classes else (-1, -1)
    if rows["label"].min() < lowest or rows["label"].max() > highest:
        raise UserError(f"{path} has labels that name none of its {len(classes)} classes; pack it again")


def _no_split(folder: Path) -> str:
    """What to do where ``folder`` is no packed split."""
    data, split = folder.parent, folder.name
    missing, place = f"no packed split {split!r} in {data}", shlex.quote(str(data))
    if (folder / TABLE).is_file():
        return f"{missing} ({folder / MANIFEST} is missing); copy it back, or pack the data set again"
    if not data.is_dir():
        what = "is no folder" if data.exists() else "does not exist"
        return f"{missing}, which {what}; give a folder made by scripts/make_shards.sh"
    if (data / MANIFEST).is_file():
        return f"{missing}, which is one split itself; give the folder above it, {data.parent}"
    others = sorted(path.parent.name for path in data.glob(f"*/{MANIFEST}"))
    if others:
        return (
            f"{missing}, only {' and '.join(others)}; add it with: scripts/make_shards.sh IMAGES {place} --split "
            f"{split}, or choose another with --split where the command has it"
        )
    if next(data.iterdir(), None) is None:
        return f"{missing}, which is empty; pack pictures into it: scripts/make_shards.sh IMAGES {place}"
    packed = data.absolute().with_name(f"{data.absolute().name}-shards")
    command = f"scripts/make_shards.sh {place}"
    return f"{missing}; where these are your pictures, pack them with: {command}, and give {packed}"


def _load_table(path: Path, sha256: str) -> npt.NDArray[Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing; copy it back or pack the data set again")
    if sha256_of(path) != sha256:
        raise UserError(f"{path} is not the table its manifest describes (its sha256 differs); copy it again")
    try:
        # Processes of a machine share the pages of a large one; a small one is safe from whoever cuts its file.
        shared: Literal["r"] | None = "r" if path.stat().st_size > SHARED_TABLE else None
        samples: npt.NDArray[Any] = np.load(path, mmap_mode=shared, allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:
        raise UserError(f"{path} is no table of samples ({error}); pack the data set again") from error
    if not isinstance(samples, np.ndarray) or samples.dtype != SAMPLE or samples.ndim != 1:
        raise UserError(f"{path} has other columns than this version reads; pack the data set again")
    return samples


def member_name(tar: BinaryIO, offset: int, length: int) -> str | None:
    """The name in the header before ``offset``, or None where that is no sound header of a file of ``length`` bytes."""
    tar.seek(offset - BLOCK)
    try:
        header = tarfile.TarInfo.frombuf(tar.read(BLOCK), "ascii", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError):
        return None
    return header.name if header.size == length and header.isreg() else None
