"""The claim on the folder in which a pack is made: who works on it, and at what.

A pack is built in ``OUT.partial``: ``plan-I-of-N.json`` says of what and how, and when the sources were last written as
machine I of N saw them; ``part-I-of-N.lock`` is held by the process that packs; a shard's ``.part.npz`` says that it is
finished. All of them go when the folder is renamed to ``OUT``.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from simclr_dali.shards.durable import refusals_named, sync_folder, write_durably
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import MANIFEST, unseal
from simclr_dali.shards.sources.source import SPLITS, Source

_FINISHED = "another process has just finished {out}; look at it with simclr-dali show {out}"


def partial_folder(out: Path) -> Path:
    """Where ``out`` is built."""
    return out.with_name(f"{out.name}.partial")


def is_finished(out: Path, made_with: dict[str, Any]) -> bool:
    """Whether ``out`` is this very pack, complete; raises UserError where something else lies there."""
    if not out.exists():
        return False
    manifests = [out / split / MANIFEST for split in SPLITS if (out / split / MANIFEST).is_file()]
    if not manifests:
        raise UserError(f"{out} exists and is not a packed data set; choose another target or remove it")
    try:
        found = unseal(manifests[0].read_bytes())["made_with"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{manifests[0]} is not a manifest of this packer ({error}); choose another target") from error
    if found != made_with:
        raise UserError(f"{out} was packed from other images or with other options; choose another target or remove it")
    # A kill between the last rename and this left them behind.
    _remove_claims(out)
    return True


def machines_of(partial: Path) -> int:
    """N of the ``--part I/N`` that filled ``partial``. Raises UserError where there is none."""
    counts = {int(path.stem.rpartition("-")[2]) for path in partial.glob("plan-*-of-*.json")}
    if len(counts) != 1:
        raise UserError(f"{partial} holds no parts to merge; pack them first with --part 1/N to N/N")
    return counts.pop()


@contextmanager
def claim(out: Path, made_with: dict[str, Any], sources: list[Source], machine: int, machines: int) -> Iterator[Path]:
    """Hold the folder in which ``out`` is built, as ``machine`` 1 to ``machines``, or (0) as all of them.

    Raises UserError where another process holds it, where a pack of something else was left halfway in it, or where
    the sources were written since this machine began.
    """
    partial = partial_folder(out)
    mine = [machine] if machine else range(1, machines + 1)
    with ExitStack() as stack, refusals_named(partial):
        partial.mkdir(parents=True, exist_ok=True)
        found = list(partial.iterdir())  # before the plans: another machine may be writing its own just now
        begun = list(partial.glob("plan-*-of-*.json"))
        if not begun and any(not entry.name.endswith((".lock", ".json.tmp")) for entry in found):
            if not partial.exists():
                raise UserError(_FINISHED.format(out=out))
            raise UserError(f"{partial} exists and is not a half-done pack; remove it")
        for number in mine:
            stack.enter_context(_lock(partial / f"part-{number}-of-{machines}.lock", out))
        for path in begun:
            if path.stem.rpartition("-")[2] != str(machines) or json.loads(path.read_bytes())["made_with"] != made_with:
                raise UserError(
                    f"{partial} is a half-done pack of other images or options; remove it, or repeat its command"
                )
        if machine:
            times = {source.split: source.fingerprint(times=True) for source in sources}
            path = partial / f"plan-{machine}-of-{machines}.json"
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


def finish(partial: Path, out: Path) -> None:
    """Give the finished folder its name. The claims go after that: until then they let a killed pack go on."""
    with refusals_named(out):
        sync_folder(partial)
        partial.rename(out)
        sync_folder(out.parent)
        _remove_claims(out)


def _remove_claims(folder: Path) -> None:
    """Remove what is needed only while packing."""
    with refusals_named(folder):
        for pattern in ("*/*.part.npz", "plan-*.json", "part-*.lock"):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)  # the same command may be doing it too
