"""The claim on the folder in which a pack is made: who works on it, and at what.

A pack is built in ``OUT.partial``: ``plan-I-of-N.json`` says of what and how, and when the sources were last written as
machine I of N saw them; ``part-I-of-N.lock`` is held by the process that packs; a shard's ``.part.npz`` says that it is
finished. All of them go when the folder is renamed to ``OUT``.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from simclr_dali.shards.durable import refusals_named, sync_folder, write_durably
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import MANIFEST, unseal
from simclr_dali.shards.pack_shard import RECORD
from simclr_dali.shards.plan import as_made_with
from simclr_dali.shards.sources.source import SPLITS, Source

REPORT = "report.json"
_FINISHED = "another process has just finished {out}; look at it with simclr-dali show {out}"


def partial_folder(out: Path) -> Path:
    """Where ``out`` is built."""
    return out.with_name(f"{out.name}.partial")


def packed_splits(out: Path, made_with: dict[str, dict[str, Any]]) -> set[str]:
    """Which of the wanted splits lie in ``out``, made from these images with these options.

    made_with: by wanted split (plan.describe_pack). Raises UserError where ``out`` is no packed set, or any split in it
    was made otherwise.
    """
    if not out.exists():
        return set()
    manifests = {split: path for split in SPLITS if (path := out / split / MANIFEST).is_file()}
    if not manifests:
        raise UserError(f"{out} exists and is not a packed data set; choose another target or remove it")
    options = {**next(iter(made_with.values())), "source": None}
    for split, path in manifests.items():
        try:
            found = as_made_with(unseal(path.read_bytes())["made_with"], split)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a manifest of this packer ({error}); choose another target") from error
        if found != made_with.get(split, {**options, "source": found["source"]}):
            different = [name for name in options if name != "source" and found.get(name) != options[name]]
            option = different[0].replace("value_range", "range").replace("_", "-") if different else ""
            why = f"with another --{option}" if option else f"from other images of {split}"
            raise UserError(f"{out} was packed {why}; choose another target or remove it")
    return manifests.keys() & made_with.keys()


def clear_leftovers(out: Path) -> None:
    """Finish what a kill between the last renames left to do in a complete ``out``."""
    partial = partial_folder(out)
    if (partial / REPORT).is_file() and not any((partial / split).exists() for split in SPLITS):
        with suppress(UserError), _lock(partial / "part-1-of-1.lock", out):  # whoever holds it is doing just this
            _take_report(partial, out)
    _remove_claims(out)


def machines_of(partial: Path) -> int:
    """N of the ``--part I/N`` that filled ``partial``. Raises UserError where there is none."""
    counts = {int(path.stem.rpartition("-")[2]) for path in partial.glob("plan-*-of-*.json")}
    if len(counts) != 1:
        raise UserError(f"{partial} holds no parts to merge; pack them first with --part 1/N to N/N")
    return counts.pop()


@contextmanager
def claim(
    out: Path, made_with: dict[str, dict[str, Any]], sources: list[Source], machine: int, machines: int
) -> Iterator[Path]:
    """Hold the folder in which ``out`` is built, as ``machine`` 1 to ``machines``, or (0) as all of them.

    A folder in which nothing was finished is given up on an error. Raises UserError where another process holds it,
    where a pack of something else was left halfway in it, or where the sources were written since this machine began.
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
            if path.stem.rpartition("-")[2] != str(machines) or _planned(path, "made_with", out) != made_with:
                raise UserError(
                    f"{partial} is a half-done pack of other images or options; remove it, or repeat its command"
                )
        if machine:
            _plan(partial / f"plan-{machine}-of-{machines}.json", begun, made_with, sources, out)
        try:
            yield partial
        except UserError:
            if machines == 1 and not any(partial.glob(f"*/*{RECORD}")):
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _plan(
    path: Path, begun: list[Path], made_with: dict[str, dict[str, Any]], sources: list[Source], out: Path
) -> None:
    times = {source.split: source.fingerprint(times=True) for source in sources}
    if path not in begun:
        write_durably(path, json.dumps({"made_with": made_with, "times": times}).encode())
    elif _planned(path, "times", out) != times:
        raise UserError(f"{path.parent} was begun before images were written again; remove it")


def _planned(path: Path, key: str, out: Path) -> dict[str, Any]:
    """What a plan says of the splits that did not reach ``out`` yet."""
    found: dict[str, Any] = json.loads(path.read_bytes())[key]
    return {split: of_split for split, of_split in found.items() if not (out / split).exists()}


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
    """Give the finished folder its name, or add its splits to those in ``out``.

    The claims go after that: until then they let a killed pack go on.
    """
    with refusals_named(out):
        sync_folder(partial)
        if out.exists():
            for split in SPLITS:
                if (partial / split).exists():
                    (partial / split).rename(out / split)
            sync_folder(out)
            _take_report(partial, out)
        else:
            partial.rename(out)
        sync_folder(out.parent)
        _remove_claims(out)


def _take_report(partial: Path, out: Path) -> None:
    (partial / REPORT).replace(out / REPORT)
    shutil.rmtree(partial)


def _remove_claims(folder: Path) -> None:
    """Remove what is needed only while packing, and what a killed pack's workers left half-written."""
    with refusals_named(folder):
        for pattern in (f"*/*{RECORD}", "plan-*.json", "part-*.lock", "*/*.tmp"):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)  # the same command may be doing it too
