"""Pictures as programs hold them: paths, Pillow's images, arrays and tensors become what a decoder reads."""

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import torch

from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.image_files import ImageFiles, central_views_of_files, find_images, refuse_failures
from simclr_dali.shards.errors import UserError

_DECODED = 64  # pictures at a time


def central_views_of_pictures(pictures: Any, config: LoaderConfig) -> torch.Tensor:
    """The views that an evaluation has of pictures, in order: [n, 3, size, size], normalised.

    pictures: one, or any iterable of them: a path (of a folder: all pictures below it, sorted), a file that is open, an
    image of Pillow's (one that was only opened is read from its file), an array uint8 [h, w], [h, w, 1] or [h, w, 3], a
    tensor uint8 [h, w], [1, h, w] or [3, h, w], or a batch of those, [n, ...], each of any size. Raises UserError,
    naming the first few, where some cannot be used, and where there are none.
    """
    found, names = as_files(pictures)
    files = ImageFiles(found)
    views = [part.views.clone() for part in central_views_of_files(files, config, batch=_DECODED)]
    refuse_failures(files.failures, names)
    return torch.cat(views)


def as_files(pictures: Any) -> tuple[list[Path | bytes], list[str]]:
    """Pictures as ImageFiles takes them, and what to call each.

    Raises UserError for what is no picture, and where there are none.
    """
    found: list[Path | bytes] = []
    names: list[str] = []
    for number, picture in enumerate(_each(pictures)):
        for part in _readable(picture, number):
            found.append(part)
            names.append(str(part) if isinstance(part, Path) else f"picture {number}")
    if not found:
        raise UserError("no picture is given; give a path, an image, an array, or a list of them")
    return found, names


def is_one(pictures: Any) -> bool:
    """Whether it is one picture, and neither a folder nor several."""
    if isinstance(pictures, str | os.PathLike):
        return not Path(pictures).is_dir()
    if isinstance(pictures, np.ndarray | torch.Tensor):
        return pictures.ndim < 4
    return isinstance(pictures, PIL.Image.Image) or hasattr(pictures, "read")


def _each(pictures: Any) -> Iterable[Any]:
    if isinstance(pictures, np.ndarray | torch.Tensor) and pictures.ndim == 4:
        return pictures
    if isinstance(pictures, str | os.PathLike | PIL.Image.Image | np.ndarray | torch.Tensor) or hasattr(
        pictures, "read"
    ):
        return [pictures]
    if isinstance(pictures, Iterable) and not isinstance(pictures, bytes | dict):
        return pictures
    raise UserError(f"{_kind(pictures)} is no picture; give a path, an image of Pillow's, an array or a tensor")


def _readable(picture: Any, number: int) -> list[Path | bytes]:
    """Files, or the bytes of one."""
    if isinstance(picture, str | os.PathLike):
        if not os.fspath(picture):
            raise UserError(f"picture {number} is an empty path; give the path of a file or folder")
        return list(find_images([Path(picture)]))
    try:
        if hasattr(picture, "read") and not isinstance(picture, PIL.Image.Image):  # a file that is open
            return [bytes(picture.read())]
        if isinstance(picture, torch.Tensor | np.ndarray):
            picture = _image_of(picture, number)
        if not isinstance(picture, PIL.Image.Image):
            raise UserError(
                f"picture {number} is {_kind(picture)}; give a path, an image of Pillow's, an array or a tensor"
            )
        return [_as_opened(picture) or _encoded(PIL.ImageOps.exif_transpose(picture))]
    except UserError:
        raise
    except Exception as error:  # what was opened is read only now, and Pillow raises a dozen kinds
        raise UserError(f"picture {number} cannot be read ({type(error).__name__}: {error}); leave it out") from error


def _as_opened(picture: PIL.Image.Image) -> bytes | None:
    """The file of an image that was only opened, which is then read as any other file is; None of all others."""
    if not isinstance(picture, PIL.ImageFile.ImageFile) or not picture.tile or picture.tell():
        return None
    file = picture.fp
    if file is None:
        return None
    at = file.tell()
    file.seek(0)
    data = bytes(file.read())
    file.seek(at)
    return data


def _encoded(picture: PIL.Image.Image) -> bytes:
    """Without loss; more than 8 bits stay what they are, so that those without a known range are refused later."""
    buffer = io.BytesIO()
    if picture.mode.startswith(("I", "F")):
        picture.save(buffer, "TIFF")
    else:  # read again at once, so it need not be small
        (picture if picture.mode == "L" else picture.convert("RGB")).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _image_of(pixels: Any, number: int) -> PIL.Image.Image:
    shape, kind = tuple(pixels.shape), str(pixels.dtype).removeprefix("torch.")
    array = np.asarray(pixels.cpu() if isinstance(pixels, torch.Tensor) else pixels)
    if array.ndim == 3 and isinstance(pixels, torch.Tensor):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if kind != "uint8" or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or not array.size:
        layout = "[3, h, w]" if isinstance(pixels, torch.Tensor) else "[h, w, 3]"
        raise UserError(
            f"picture {number} is {kind} of shape {list(shape)}; give uint8 RGB {layout} (an encoder takes a batch of "
            f"normalised floats [n, 3, h, w] as it is)"
        )
    return PIL.Image.fromarray(np.ascontiguousarray(array))


def _kind(thing: Any) -> str:
    return f"of type {type(thing).__name__}"
