"""The description that lies beside a split's tars: ``manifest.json`` and ``samples.npy``.

A packed data set is a folder with one folder per split::

    OUT/train/train-000000.tar  .idx      standard WebDataset tar and DALI index (v1.2)
    OUT/train/manifest.json               classes, per shard: name, samples, bytes, sha256
    OUT/train/samples.npy                 one row of SAMPLE per image, in storage order
"""

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.durable import write_durably
from shards.errors import UserError

FORMAT = "simclr-dali shards"
VERSION = 1

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
    """A split as read from disk. ``samples`` has dtype SAMPLE and is ordered by shard, then offset."""

    folder: Path
    split: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    samples: npt.NDArray[Any]
    fingerprint: str  # sha256 of manifest.json, which itself holds the hashes of everything else

    def __len__(self) -> int:
        return len(self.samples)

    def shard_sizes(self) -> npt.NDArray[np.int64]:
        """Samples per shard, int64."""
        return np.array([shard.samples for shard in self.shards], np.int64)

    def where(self, sample: int) -> str:
        """A name for one sample that a person can look up: tar, offset of its bytes, key."""
        row = self.samples[sample]
        path = self.folder / self.shards[row["shard"]].name
        with path.open("rb") as tar:
            tar.seek(int(row["offset"]) - 512)
            key = tar.read(100).split(b"\0")[0].decode("ascii", "replace")
        return f"{path}, offset {row['offset']}, member {key!r}"


def write_split(
    folder: Path,
    split: str,
    classes: list[str],
    shards: list[Shard],
    samples: npt.NDArray[Any],
    made_with: dict[str, Any],
) -> None:
    """Write ``samples.npy``, then ``manifest.json``; ``made_with`` records the options of the packer."""
    table = io.BytesIO()
    np.save(table, samples)
    write_durably(folder / "samples.npy", table.getvalue())
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "split": split,
        "samples": len(samples),
        "samples_sha256": hashlib.sha256(table.getvalue()).hexdigest(),
        "made_with": made_with,
        "classes": classes,
        "shards": [asdict(shard) for shard in shards],
    }
    manifest["manifest_sha256"] = hashlib.sha256(_as_text(manifest)).hexdigest()
    write_durably(folder / "manifest.json", _as_text(manifest))


def _as_text(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1) + "\n").encode()


def load_split(data: Path | str, split: str) -> ShardSet:
    """Read ``data/split`` and check it against its own description (sizes, hash of the table; no image is read).

    Raises UserError where the folder is not a packed split or a file is missing, cut or swapped.
    """
    folder = Path(data) / split
    manifest_path = folder / "manifest.json"
    if not manifest_path.is_file():
        raise UserError(
            f"no packed split {split!r} in {data} ({manifest_path} is missing); pack it first: "
            f"scripts/make_shards.sh IMAGES {data}"
        )
    raw = manifest_path.read_bytes()
    try:
        manifest = json.loads(raw)
        own_hash = manifest.pop("manifest_sha256")
        intact = hashlib.sha256(_as_text(manifest)).hexdigest() == own_hash
        if not intact or _as_text({**manifest, "manifest_sha256": own_hash}) != raw:
            raise ValueError("it does not match its own sha256")
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise ValueError(f"format {manifest['format']!r}, version {manifest['version']!r}")
        shards = tuple(Shard(**shard) for shard in manifest["shards"])
        classes = tuple(manifest["classes"])
        table_hash = manifest["samples_sha256"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{manifest_path} is not a manifest this version reads ({error}); pack the data set again"
        ) from error
    samples = _load_table(folder / "samples.npy", table_hash)
    for shard in shards:
        path = folder / shard.name
        if not path.is_file():
            raise UserError(f"shard {path} is missing; copy it back or pack the data set again")
        if path.stat().st_size != shard.bytes:
            raise UserError(
                f"shard {path} has {path.stat().st_size} bytes, its manifest says {shard.bytes}; copy it again"
            )
    if len(samples) != sum(shard.samples for shard in shards) or not len(samples):
        raise UserError(
            f"{manifest_path} lists {sum(s.samples for s in shards)} samples, samples.npy holds {len(samples)}; pack "
            f"again"
        )
    return ShardSet(folder, manifest["split"], classes, shards, samples, hashlib.sha256(raw).hexdigest())


def _load_table(path: Path, sha256: str) -> npt.NDArray[Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing; copy it back or pack the data set again")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise UserError(f"{path} is not the table its manifest describes (its sha256 differs); copy it again")
    samples: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    return samples
