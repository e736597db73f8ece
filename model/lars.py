"""LARS as in SimCLR's reference code (google-research/simclr, lars_optimizer.py; You et al. 2017).

    g <- gradient + weight_decay * w
    trust = trust_coefficient * |w| / |g|      (1 where either norm is 0)
    v <- momentum * v + lr * trust * g
    w <- w - v

The learning rate is inside the momentum buffer, and the decay inside the norm. Groups without adaptation (biases and
BatchNorm) have trust 1. All tensors of a group are updated together and nothing waits for the device.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag)
_LAYERS = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.modules.conv._ConvNd)


class LARS(torch.optim.Optimizer):
    """Group options: lr, momentum (0.9), weight_decay, trust_coefficient (0.001), adapt (True)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            weights: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._step_group(group, weights)

    def _step_group(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        momenta: list[Tensor] = []
        for p in weights:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            momenta.append(state["momentum_buffer"])
        updates = torch._foreach_add(
            [p.grad for p in weights if p.grad is not None], weights, alpha=group["weight_decay"]
        )
        if group["adapt"]:
            w_norm, g_norm = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(updates))
            trust = group["trust_coefficient"] * w_norm / g_norm
            rates = torch.where((w_norm > 0) & (g_norm > 0), trust, torch.ones_like(trust)).unbind()
            torch._foreach_mul_(updates, rates)
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, updates, alpha=group["lr"])
        torch._foreach_sub_(weights, momenta)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for LARS: the weights that multiply, of convolutions, linear layers and attention; and all others.

    The others are neither decayed nor adapted: biases, the scales of BatchNorm, LayerNorm and their like, embeddings,
    tokens and embeddings of positions. Each group has a ``name``. Parameters that are not trained are in neither.
    """
    adapted: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                (adapted if _multiplies(module, name, parameter) else plain).append(parameter)
    return [
        {"name": "weights", "params": adapted, "weight_decay": weight_decay, "adapt": True},
        {"name": "biases and BatchNorm", "params": plain, "weight_decay": 0.0, "adapt": False},
    ]


def _multiplies(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of ``module`` itself is a matrix or kernel that its input is multiplied with."""
    if parameter.dim() < 2 or "bias" in name or isinstance(module, _NORMS):
        return False
    if isinstance(module, _LAYERS):
        return True
    # Of a network's own module: tokens and embeddings of positions have a first dimension of 1, or say so.
    return parameter.shape[0] > 1 and not any(word in name for word in ("token", "pos", "embed"))
