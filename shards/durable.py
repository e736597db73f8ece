"""Files that are either there, complete and on disk, or not there."""

import os
from pathlib import Path


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file so that it is either there, complete and on disk, or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
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
