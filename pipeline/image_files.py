"""Central views of picture files, as an evaluation sees those of packed ones.

Each file becomes what the packer would store (shards.image): its own bytes where it is an ordinary JPEG, upright RGB
otherwise. So a picture gives the same view here and out of a shard.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from simclr_dali.pipeline.batch_plan import PlannedBatch
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.order import Ids
from simclr_dali.pipeline.reader import Found
from simclr_dali.pipeline.stream import Stream, ViewSource
from simclr_dali.shards.decode import decoder
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.image import RangeError, UnusableError, convert, prepare
from simclr_dali.shards.left_out import LeftOut
from simclr_dali.shards.manifest import SAMPLE
from simclr_dali.shards.walk import pictures_below
from simclr_dali.shards.wording import listed

_GRAY = b"P5 1 1 255 \x80"  # a picture of one pixel


class FileViews(NamedTuple):
    """Central views of some files."""

    views: torch.Tensor
    """[n, 3, size, size], as the loader's."""
    places: list[int]
    """Of the files among those that were given."""


class ImageFiles:
    """Reads files by their place, in many threads; the bytes of one may be given as well.

    failures: why a file could not be used, by place.
    """

    kept = None

    def __init__(self, files: Sequence[Path | bytes]) -> None:
        self._files = files
        self.samples = np.zeros(len(files), SAMPLE)
        self.failures: dict[int, str] = {}

    def expect(self, current: Sequence[int], upcoming: Sequence[int]) -> None:
        pass

    def read(self, ids: Ids) -> Found:
        """The pictures of ``ids`` as JPEG; a gray one stands for each that cannot be used."""
        encoded = [np.frombuffer(self._one(int(place)), np.uint8) for place in ids]
        return Found(encoded, ids, np.zeros(len(ids), np.bool_))

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _one(self, place: int) -> bytes:
        file = self._files[place]
        try:
            found = prepare(file if isinstance(file, bytes) else file.read_bytes())
            sound = decoder("cpu").accepts([found.encoded], [(found.width, found.height)])[0]
            if not sound:
                found = convert(found.encoded)
        except (OSError, UnusableError) as error:
            why = error.reason if isinstance(error, UnusableError) else error.strerror or str(error)
            self.failures[place] = why + ("; scale it to 8 bits" if isinstance(error, RangeError) else "")
            found = convert(_GRAY)
        self.samples[place]["width"], self.samples[place]["height"] = found.width, found.height
        return found.encoded


def central_views_of_files(
    files: ImageFiles, config: LoaderConfig, *, batch: int, center_fraction: float | None = None
) -> Iterator[FileViews]:
    """The central view (draws.center) of every usable file, in order; ``files.failures`` names the others."""
    count = len(files.samples)
    source = ViewSource.centered(files.samples, files, config.size, center_fraction)
    planned = (PlannedBatch(np.arange(at, min(at + batch, count))) for at in range(0, count, batch))
    with closing(Stream(source, planned, config, batch=min(batch, count))) as stream:
        for _, images in stream:
            places = [int(place) for place in images.ids if int(place) not in files.failures]
            usable = torch.tensor([int(place) not in files.failures for place in images.ids])
            yield FileViews(images.views[usable.to(images.views.device)], places)


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Files as they are given, and all pictures in and under folders, sorted (shards.walk).

    What else lies in a folder is counted in one line. Raises UserError where there are no pictures.
    """
    found: list[Path] = []
    for path in paths:
        try:
            path.stat()
        except FileNotFoundError:
            pass  # told below
        except (OSError, ValueError) as error:
            raise UserError(f"{str(path)[:80]} cannot be looked at ({error}); give pictures, or a folder") from error
        if path.is_dir():
            left_out = LeftOut()
            inside = sorted(path / file.path for file in pictures_below(path, left_out))
            if left_out.counts:
                print(f"{path}: left out: {left_out}", file=sys.stderr)
            if not inside:
                raise UserError(f"no pictures in {path}; give another folder")
            found += inside
        elif path.is_file():
            found.append(path)
        elif path.exists():
            raise UserError(f"{path} is no regular file; give pictures, or a folder of them")
        else:
            raise UserError(f"{path} does not exist; give pictures, or a folder of them")
    return found


def refuse_failures(failures: dict[int, str], names: Sequence[object]) -> None:
    """Raise UserError where some pictures could not be used; for the end, when the others are done.

    failures: why, by the place of the picture among all; names: what to call each.
    """
    if failures:
        named = [f"{names[place]} ({reason})" for place, reason in sorted(failures.items())]
        raise UserError(
            f"{len(named)} of {len(names)} pictures could not be used: {listed(named, 5, '; ')}; repair them or leave "
            "them out"
        )
