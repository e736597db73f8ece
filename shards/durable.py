"""Files that are either there, complete and on disk, or not there; and what to say when a disk refuses."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import UserError


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file so that it is either there, complete and on disk, or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
    with refusals_named(path):
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


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
        raise UserError(
            f"cannot write {path} ({error.strerror}); make room or choose another target; what is finished is kept, "
            f"and the same command goes on from there"
        ) from error
