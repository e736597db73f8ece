"""Tensors out of files of other programs, without running code from them."""

import io
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from simclr_dali.model import migrations
from simclr_dali.model.checkpoint import CheckpointError


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

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def add(self, _: Any) -> None: ...


class _TensorUnpickler(pickle._Unpickler):
    """Knows what tensors and their containers are made of, and nothing else.

    The one in Python: that in C makes a table as long as any number in a file. What is given out is made for the one
    call, and no state is set on anything, so that a file cannot change what others use.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

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

    @property
    def persistent_load(self) -> Callable[[Any], Any]:
        """torch.load sets it, to put storages in their place; it would also write ".patch" files of classes' sources
        that differ, and make views of storages that move when the storage grows."""
        return self._refer

    @persistent_load.setter
    def persistent_load(self, find: Callable[[Any], Any]) -> None:
        self._find = find

    def _refer(self, saved: Any) -> Any:
        kind = saved[0] if isinstance(saved, tuple) and len(saved) > 1 else None
        if kind == "module":
            return saved[1]
        if kind != "storage" or len(saved) not in (5, 6) or saved[5:] not in ((), (None,)):
            raise pickle.UnpicklingError("it refers to more than tensors")
        return self._find(saved)

    def _leave_state(self: Any) -> None:
        self.stack.pop()

    dispatch[pickle.BUILD[0]] = _leave_state


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
    """torch.load runs archives of TorchScript before it comes to a pickle; tars it does not know in memory."""
    if data[:4] == b"PK\x03\x04" and "constants.pkl" in torch._C.PyTorchFileReader(io.BytesIO(data)).get_all_records():
        raise ValueError("it is a TorchScript program, not weights")
    if data[257:262] == b"ustar":
        raise ValueError("it is a tar, as torch wrote before 2017")


# The lines that eval/export.py writes into a file's metadata.
_OF_EXPORTS = ("architecture", "conventions", "image_size", "center_fraction", "checkpoint_sha256", "step", "tuned",
               "classes", "interpolation", "habits")  # the last is what conventions were called until 0.1  # fmt: skip
_LARGEST_VIEW = 16_384  # pixels


def exported_about(path: Path) -> dict[str, Any]:
    """What eval/export.py wrote beside the weights of a safetensors file; empty for one of another program."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "checkpoint_sha256" not in metadata:
        return {}
    try:
        # Programs that write the file anew may add lines of their own, which need not be JSON.
        ours = {key: value for key, value in metadata.items() if key in _OF_EXPORTS}
        about = migrations.conventions({key: json.loads(value) for key, value in ours.items()})
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has damaged metadata ({error}); export it again") from error
    sound = {
        "conventions": isinstance(about.get("conventions", {}), dict),
        "architecture": isinstance(about.get("architecture", {}), dict),
        "image_size": _is_count(about.get("image_size"), _LARGEST_VIEW),
        "step": _is_count(about.get("step"), 2**63),
        "tuned": isinstance(about.get("tuned"), str | None),
        "classes": isinstance(about.get("classes", []), list),
        "interpolation": about.get("interpolation", "bilinear") in ("bilinear", "bicubic"),
    }
    for key, is_sound in sound.items():
        if not is_sound:
            raise CheckpointError(f"{path} has damaged metadata: {key} is {str(about[key])[:60]}; export it again")
    return about


def _is_count(value: Any, largest: int) -> bool:
    return value is None or (type(value) is int and 0 <= value <= largest)


def _flat(nested: Any) -> dict[str, Tensor]:
    """{"a": {"b": tensor}} -> {"a.b": tensor}, each dict once; everything else is left out."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()

    def visit(value: Any, path: str) -> None:
        if isinstance(value, Tensor):
            found[path] = value.detach()
        elif isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            for key, item in value.items():
                if isinstance(key, str | int):
                    visit(item, f"{path}.{key}" if path else str(key))

    visit(nested, "")
    return found
