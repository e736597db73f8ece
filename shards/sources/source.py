"""What is packed: splits of encoded pictures, wherever they lie.

Three kinds exist: an image folder (folder.py), the ILSVRC archives (ilsvrc.py) and WebDataset tars (webtars.py). The
latter two are read in place, by offset, without unpacking anything to disk. find.py tells them apart, split by split.
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from simclr_dali.shards.durable import unreadable_named
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.image import UnusableError
from simclr_dali.shards.left_out import LeftOut
from simclr_dali.shards.walk import passed_over

SPLITS = ("train", "val", "test")
DEFAULT_SPLITS = ("train", "val")  # "test" has to be asked for
UNLABELLED = -1


class Item(NamedTuple):
    """One encoded picture: ``length`` bytes at ``offset`` of the file ``path`` (relative to the source's root).

    ``name`` is the picture's own name, inside an archive the member's; ``label`` is UNLABELLED where it has none;
    ``modified`` is the file's time in ns.
    """

    path: str
    name: str
    offset: int
    length: int
    label: int
    modified: int

    def inside(self) -> str:
        """``, name`` where the picture lies in an archive, for messages that begin with the file's path."""
        return "" if self.name == self.path else f", {self.name}"


@dataclass(frozen=True)
class Source:
    """One split."""

    root: Path
    split: str
    classes: list[str]
    """Empty where the pictures have no labels."""
    items: list[Item]
    watched: dict[str, int]
    """The folders and archives it was listed from, with their times in ns."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """What lies in them and is not packed."""

    def fingerprint(self, *, times: bool) -> str:
        """Changes when a picture is added, removed, renamed or resized, and with ``times`` when a file is rewritten."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for item in self.items:
            time = item.modified if times else 0
            line = f"{item.path}\0{item.name}\0{item.offset}\0{item.length}\0{item.label}\0{time}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raise UserError where pictures were added or removed, or an archive rewritten, since this was listed."""
        for path, modified in self.watched.items():
            if time_of(self.root / path) != modified:
                raise UserError(_changed(f"{self.root}/{path}"))


@dataclass(frozen=True)
class Listing:
    """The splits that were found in a folder, and what lies beside them."""

    sources: list[Source]
    beside: LeftOut
    note: str = ""
    """What to tell about how the folder was understood."""


def read_item(root: Path, item: Item) -> bytes:
    """The encoded bytes of ``item``.

    Raises UserError where its file is gone or was changed since it was listed, and UnusableError where its permissions
    forbid to read it: it may be one of a thousand such files, so it is counted, as a damaged one is.
    """
    path = f"{root}/{item.path}"  # not Path's slash, which takes as long as the reading
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            modified = os.fstat(descriptor).st_mtime_ns
            # One byte more would show that a file of a folder has grown.
            data = os.pread(descriptor, item.length + (item.path == item.name), item.offset)
        finally:
            os.close(descriptor)
    except PermissionError as error:
        raise UnusableError(f"it cannot be read ({error.strerror})") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); repair or remove it") from error
    if modified != item.modified or len(data) != item.length:
        raise UserError(_changed(path))
    return data


def folders_in(folder: Path) -> list[Path]:
    """The folders in one, sorted, without those that are passed over; raises UserError where it cannot be read."""
    with unreadable_named(folder):
        return sorted(path for path in folder.iterdir() if path.is_dir() and not passed_over(path.name))


def tars_in(folder: Path) -> list[Path]:
    """The tars that lie directly in a folder, sorted, without those that are passed over, such as ``._0.tar``."""
    with unreadable_named(folder):
        named = [path for path in folder.iterdir() if path.suffix.lower() == ".tar" and not passed_over(path.name)]
        return sorted(path for path in named if path.is_file())


def time_of(path: Path) -> int:
    """Modification time in ns; raises UserError where there is none."""
    with unreadable_named(path):
        return path.stat().st_mtime_ns


def _changed(path: str) -> str:
    return f"{path} changed while it was packed; wait until nothing writes to it, then pack again"
