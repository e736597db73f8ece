"""The one place that imports torchvision.

A torchvision wheel built for CUDA does not import beside a CPU-only torch: its Python code declares fake versions of
the operators ``nms`` and ``qnms``, which only its compiled extension defines, and that extension does not load, so
torch raises "operator torchvision::nms does not exist". We use models only, no operator, so it is enough that the two
names exist. Where the extension does load, nothing is defined here.
"""

import importlib.util
from pathlib import Path

import torch

_operators = torch.library.Library("torchvision", "FRAGMENT")


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


if not _extension_loads():
    _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision
import torchvision.transforms.v2
from torchvision.models import resnet

__all__ = ["resnet", "torchvision"]
