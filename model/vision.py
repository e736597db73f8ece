"""The one place that imports torchvision.

A torchvision wheel built for CUDA does not import beside a CPU-only torch: its Python code declares fake versions of
the operators ``nms`` and ``qnms``, which only its compiled extension defines, and that extension does not load, so
torch raises "operator torchvision::nms does not exist". We use models only, no operator, so it is enough that the two
names exist. Where the extension does load, nothing is defined here.

One of its operators also imports torch's compiler, for a function that we never call: 1.4 of the 1.6 seconds that the
import of torchvision takes. A stand-in of that one module is there meanwhile.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_operators = torch.library.Library("torchvision", "FRAGMENT")
_COMPILER = "torch._dynamo.utils"


def _extension_loads() -> bool:
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("torchvision is not installed; run scripts/setup.sh")
    extensions = list(Path(found.origin).parent.glob("_C*.so"))
    try:
        for extension in extensions:
            torch.ops.load_library(extension)
    except OSError:
        return False
    return bool(extensions)


def _is_compile_supported(device: str) -> Any:
    from torch._dynamo.utils import is_compile_supported

    return is_compile_supported(device)


@contextmanager
def _compiler_not_imported() -> Iterator[None]:
    if _COMPILER in sys.modules:
        yield
        return
    stand_in = ModuleType(_COMPILER)
    stand_in.__dict__["is_compile_supported"] = _is_compile_supported
    sys.modules[_COMPILER] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(_COMPILER) is stand_in:
            del sys.modules[_COMPILER]


if not _extension_loads():
    _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

try:
    with _compiler_not_imported():
        import torchvision
except ImportError:  # another version asks the compiler for more
    import torchvision
from torchvision.models import resnet

__all__ = ["imagenet_classes", "resnet", "torchvision"]


def imagenet_classes() -> tuple[str, ...]:
    """What the 1,000 classes of ImageNet are called, by label, in the metadata of torchvision's weights."""
    return tuple(torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
