"""In what sums and losses are computed, whatever their inputs are in."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
