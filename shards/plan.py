"""What a pack is going to make, and the claim on the folder in which it is made.

A pack is built in ``OUT.partial``: ``plan-I-of-N.json`` says of what and how, and when the sources were last written as
machine I of N saw them; ``part-I-of-N.lock`` is held by the process that packs; a shard's ``.part.npz`` says that it is
finished. All of them go when the folder is renamed to ``OUT``.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from simclr_dali.shards.durable import refusals_named, sync_folder, write_durably
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import unseal
from simclr_dali.shards.sources.source import SPLITS, Item, Source

_FINISHED = "another process has just finished {out}; look at it with simclr-dali show {out}"
DECODERS = ("cpu", "gpu", "none")
_HEADERS = 3 * 512  # bytes a sample takes in its tar beside the picture: two headers and the label's block
_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Options:
    """Everything that decides the bytes of the result.

    samples_per_shard: about, shards get equal sizes. shard_size: megabytes per shard instead, about. seed: of the
    global shuffle. resize: the short side in pixels that a picture may have (None: any). quality: of JPEGs that are
    encoded anew, 1 to 100. limit_per_class: the first so many pictures of each class (None: all). split: only this one.
    decoder: which one must take every picture, DALI's on "cpu" or "gpu", or "none".
    """

    samples_per_shard: int = 1000
    shard_size: float | None = None
    seed: int = 0
    resize: int | None = None
    quality: int = 95
    limit_per_class: int | None = None
    split: str | None = None
    decoder: str = "cpu"

    def check(self) -> None:
        """Raise UserError for a value that cannot be meant."""
        for name in ("samples_per_shard", "resize", "limit_per_class"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.shard_size is not None and not self.shard_size > 0:
            raise UserError(f"--shard-size is {self.shard_size}; it must be a number of megabytes above 0")
        if self.shard_size is not None and self.resize is not None:
            raise UserError(
                f"--shard-size {self.shard_size:g} needs the images' sizes, which --resize {self.resize} changes; "
                f"give --samples-per-shard"
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed is {self.seed}; it must lie in 0 .. 2^63-1")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}; it must lie in 1 .. 100")
        if self.split is not None and self.split not in SPLITS:
            raise UserError(f"--split is {self.split!r}; it must be one of {', '.join(SPLITS)}")
        if self.decoder not in DECODERS:
            raise UserError(f"--decoder is {self.decoder!r}; it must be one of {', '.join(DECODERS)}")


def storage_order(samples: int, seed: int, split: str) -> npt.NDArray[np.int64]:
    """A random permutation of 0..samples-1: the order in which a split is stored.

    It sorts words of the raw Philox stream: NumPy keeps its bit generators stable over releases, but not the
    methods of Generator, and a pack that is continued by a newer NumPy must stay byte-identical.
    """
    key = [seed, int.from_bytes(split.encode("ascii"), "little")]
    words = np.random.Philox(key=np.array(key, np.uint64)).random_raw(samples)
    return np.argsort(words, kind="stable")


def cut(source: Source, options: Options) -> list[npt.NDArray[np.int64]]:
    """Which items go into which shard, in order.

    Shards get equal numbers of samples, within one, because that keeps the lanes of the data order equal.
    """
    order = storage_order(len(source.items), options.seed, source.split)
    if options.shard_size is None:
        count = round(len(order) / options.samples_per_shard)
    else:
        count = round(tar_bytes(source.items) / (options.shard_size * _MEGABYTE))
    return np.array_split(order, min(max(1, count), len(order)))


def tar_bytes(items: list[Item]) -> int:
    """Size of the tar members of ``items`` where their bytes are kept."""
    return sum(-(-item.length // 512) * 512 + _HEADERS for item in items)


def recorded(options: Options, sources: list[Source]) -> dict[str, Any]:
    """What manifests say of how they were made."""
    return {**asdict(options), "source": {source.split: source.fingerprint(times=False) for source in sources}}


def partial_of(out: Path) -> Path:
    """The folder in which ``out`` is built."""
    return out.with_name(f"{out.name}.partial")


def is_finished(out: Path, made_with: dict[str, Any]) -> bool:
    """Whether ``out`` is this very pack, complete; raises UserError where something else lies there."""
    if not out.exists():
        return False
    manifests = [out / split / "manifest.json" for split in SPLITS if (out / split / "manifest.json").is_file()]
    if not manifests:
        raise UserError(f"{out} exists and is not a packed data set; choose another target or remove it")
    try:
        found = unseal(manifests[0].read_bytes())["made_with"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{manifests[0]} is not a manifest of this packer ({error}); choose another target") from error
    if found != made_with:
        raise UserError(f"{out} was packed from other images or with other options; choose another target or remove it")
    # A kill between the last rename and this left them behind.
    remove_claims(out)
    return True


@contextmanager
def claimed(out: Path, made_with: dict[str, Any], sources: list[Source], part: int, parts: int) -> Iterator[Path]:
    """Hold the folder in which ``out`` is built, as machine ``part`` of ``parts``, or (part 0) as all of them.

    Raises UserError where another process holds it, where a pack of something else was left halfway in it, or where
    the sources were written since this part began.
    """
    partial = partial_of(out)
    mine = [part] if part else range(1, parts + 1)
    with ExitStack() as stack, refusals_named(partial):
        partial.mkdir(parents=True, exist_ok=True)
        found = list(partial.iterdir())  # before the plans: another machine may be writing its own just now
        begun = list(partial.glob("plan-*-of-*.json"))
        if not begun and any(not entry.name.endswith((".lock", ".json.tmp")) for entry in found):
            if not partial.exists():
                raise UserError(_FINISHED.format(out=out))
            raise UserError(f"{partial} exists and is not a half-done pack; remove it")
        for number in mine:
            stack.enter_context(_lock(partial / f"part-{number}-of-{parts}.lock", out))
        for path in begun:
            if path.stem.rpartition("-")[2] != str(parts) or json.loads(path.read_bytes())["made_with"] != made_with:
                raise UserError(
                    f"{partial} is a half-done pack of other images or options; remove it, or repeat its command"
                )
        if part:
            times = {source.split: source.fingerprint(times=True) for source in sources}
            path = partial / f"plan-{part}-of-{parts}.json"
            if path not in begun:
                write_durably(path, json.dumps({"made_with": made_with, "times": times}).encode())
            elif json.loads(path.read_bytes())["times"] != times:
                raise UserError(f"{partial} was begun before images were written again; remove it")
        yield partial


@contextmanager
def _lock(path: Path, out: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is packing {out} ({path} is locked); wait for it or stop it") from error
        # The folder may have been finished and renamed, with the lock in it, between opening and locking.
        if not path.exists():
            raise UserError(_FINISHED.format(out=out))
        yield
    finally:
        os.close(descriptor)


def remove_claims(folder: Path) -> None:
    """Remove what is needed only while packing."""
    with refusals_named(folder):
        for pattern in ("*/*.part.npz", "plan-*.json", "part-*.lock"):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)  # the same command may be doing it too


def finish(partial: Path, out: Path) -> None:
    """Give the finished folder its name. The claims go after that: until then they let a killed pack go on."""
    with refusals_named(out):
        sync_folder(partial)
        partial.rename(out)
        sync_folder(out.parent)
        remove_claims(out)
