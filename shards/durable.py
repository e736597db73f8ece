"""Files that are either there, complete and on disk, or not there; and what to say when a disk refuses."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from simclr_dali.shards.errors import UserError

_BLOCK = 8 << 20  # bytes read at a time


@contextmanager
def writing(path: Path, tag: str = "") -> Iterator[BinaryIO]:
    """A file to write, which gets its name when it is complete and on disk; nothing stays of one that does not.

    tag: in its name until then, where several may be writing the same.
    """
    temporary = path.with_name(f"{path.name}{tag}.tmp")
    with refusals_named(path):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_durably(path: Path, data: bytes | memoryview, tag: str = "") -> None:
    """Write a whole file so that it is either there, complete and on disk, or not there; tag: see :func:`writing`."""
    with writing(path, tag) as file:
        file.write(data)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where the file is missing, cut, or holds something else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def refusals_named(path: Path) -> Iterator[None]:
    """Turn the refusal of a write (full disk, quota, read-only, no permission) into a UserError that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOENT and not path.absolute().parent.exists():
            raise UserError(f"cannot write {path}: there is no folder {path.parent}; make it first") from error
        raise UserError(
            f"cannot write {path} ({error.strerror}); make room or choose another target; what is finished is kept, "
            f"and the same command goes on from there"
        ) from error


@contextmanager
def unreadable_named(path: Path) -> Iterator[None]:
    """Turn the refusal of a read into a UserError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); repair or remove it") from error


def refuse_read_only(path: Path) -> None:
    """Raise UserError where no file can be made beside ``path``: asked before hours are spent on what goes into it."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another place for it") from error
