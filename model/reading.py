"""Tensors out of files of other programs, without running code from them."""

import io
import json
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model.checkpoint import CheckpointError

# What NumPy's arrays and scalars are made of; all of it only holds data.
_NUMPY = ("_reconstruct", "scalar")


class _Inert:
    """Stands in for whatever class or function a file names: it gives an empty container and runs nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def read_tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    """All tensors of a file, by their dotted path in it: safetensors, or what torch.save wrote.

    Trainers save other objects beside their weights (Lightning its hyper-parameters, mmengine its log, VISSL its
    metrics). torch's restricted unpickler reads them, with every class that it does not know replaced by an empty
    container. Raises CheckpointError where it cannot be read even so.
    """
    try:
        tensors = _flat(safetensors.torch.load(data) if path.suffix == ".safetensors" else _load(data))
    except Exception as error:  # either reader fails on foreign bytes in a dozen ways; whichever, it is no such file
        reason = " ".join(str(error).split()) or type(error).__name__
        # torch's explanation goes on about switching the protection off.
        reason = reason.split("trusted source.")[-1].split("WeightsUnpickler error:")[-1]
        reason = reason.split("Check the documentation")[0].strip()[:200]
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read without running code from it ({reason}); save the state_dict "
            "alone, with torch.save or safetensors"
        ) from error
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; give a checkpoint, or a state_dict")
    return tensors


def exported_about(path: Path) -> dict[str, Any]:
    """What eval/export.py wrote beside the weights of a safetensors file; empty for one of another program."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "checkpoint_sha256" not in metadata:
        return {}
    try:
        return {key: json.loads(value) for key, value in metadata.items()}
    except ValueError as error:
        raise CheckpointError(f"{path} has damaged metadata ({error}); export it again") from error


def _load(data: bytes) -> Any:
    strange: list[Any] = []
    if zipfile.is_zipfile(io.BytesIO(data)):
        multiarray = np._core.multiarray  # type: ignore[attr-defined]
        for name in torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)):
            package, _, last = name.rpartition(".")
            if package in ("numpy._core.multiarray", "numpy.core.multiarray") and last in _NUMPY:
                strange.append((getattr(multiarray, last), name))
            elif name == "numpy.ndarray":
                strange.append((np.ndarray, name))
            elif name == "numpy.dtype":
                strange += [(np.dtype, name), *(type(np.dtype(code)) for code in np.typecodes["All"])]
            else:
                strange.append((_Inert, name))
    with torch.serialization.safe_globals(strange):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _flat(value: Any, path: str = "") -> dict[str, Tensor]:
    """{"a": {"b": tensor}} -> {"a.b": tensor}; everything else is left out."""
    if isinstance(value, Tensor):
        return {path: value.detach()}
    if not isinstance(value, dict):
        return {}
    found: dict[str, Tensor] = {}
    for key, item in value.items():
        found |= _flat(item, f"{path}.{key}" if path else str(key))
    return found
