"""Tensors out of files of other programs, without running code from them."""

import io
import json
import pickle
import tarfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model.checkpoint import CheckpointError

# Of what eval/export.py writes beside weights.
_OURS = ("habits", "image_size", "step", "tuned")


class _Inert(dict[Any, Any]):
    """Stands in for whatever class or function a file names: takes everything, runs nothing, keeps items of a dict."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __call__(self, *_: Any, **__: Any) -> "_Inert":
        return self

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __setstate__(self, _: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def add(self, _: Any) -> None: ...


class _TensorUnpickler(pickle.Unpickler):
    """Knows what tensors and their containers are made of, and nothing else.

    torch.load puts storages in their place before it asks for a class. What is given out is made for the one call, so
    that a file cannot change it for others.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_parameter"):
            rebuild = getattr(torch._utils, name)
            return lambda *words: rebuild(*words)
        if (module, name) == ("torch._utils", "_rebuild_parameter_with_state"):
            return lambda data, *_: data
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return lambda rebuild, _, words, __: rebuild(*words)
        if (module, name) == ("torch", "Size"):
            return lambda *words: tuple(*words)
        return type(name, (_Inert,), {})


def _load_plainly(file: Any, **options: Any) -> Any:
    return _TensorUnpickler(file, **options).load()


# What torch.load takes in pickle's place.
_PICKLE = ModuleType("tensor_pickle")
_PICKLE.__dict__.update(Unpickler=_TensorUnpickler, load=_load_plainly, UnpicklingError=pickle.UnpicklingError)


def read_tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    """All tensors of a file, by their dotted path in it: safetensors, or what torch.save wrote.

    Trainers save other objects beside their weights (Lightning its hyper-parameters, mmengine its log, VISSL its
    metrics); torch's weights_only refuses such files whole. Here each class and function that tensors are not made of
    is replaced by one that does nothing. Raises CheckpointError where the file cannot be read even so.
    """
    try:
        if path.suffix == ".safetensors":
            tensors = _flat(safetensors.torch.load(data))
        else:
            _refuse_programs(data)
            tensors = _flat(torch.load(io.BytesIO(data), map_location="cpu", pickle_module=_PICKLE, weights_only=False))
    except Exception as error:  # either reader fails on foreign bytes in a dozen ways; whichever, it is no such file
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise CheckpointError(
            f"{path} is no checkpoint that can be read ({reason}); save the state_dict alone, with torch.save or "
            "safetensors"
        ) from error
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; give a checkpoint, or a state_dict")
    return tensors


def _refuse_programs(data: bytes) -> None:
    """torch.load runs archives of TorchScript, and unpacks tars, before it comes to a pickle."""
    if data[:4] == b"PK\x03\x04" and "constants.pkl" in torch._C.PyTorchFileReader(io.BytesIO(data)).get_all_records():
        raise ValueError("it is a TorchScript program, not weights")
    if tarfile.is_tarfile(io.BytesIO(data)):
        raise ValueError("it is a tar, as torch wrote before 2017")


def exported_about(path: Path) -> dict[str, Any]:
    """What eval/export.py wrote beside the weights of a safetensors file; empty for one of another program."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "checkpoint_sha256" not in metadata:
        return {}
    try:
        about = {key: json.loads(metadata[key]) for key in _OURS if key in metadata}
        habits, size = about.get("habits", {}), about.get("image_size", 1)
        if not (isinstance(habits, dict) and isinstance(habits.get("stem_padding", 1), int) and isinstance(size, int)):
            raise ValueError(f"habits {habits!r}, image size {size!r}")
    except ValueError as error:
        raise CheckpointError(f"{path} has damaged metadata ({error}); export it again") from error
    return about


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
