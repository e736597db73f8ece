"""A linear classifier on fixed features, and its accuracy."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Scores computed at a time; bounds memory to ROWS x classes numbers.
_ROWS = 65_536
_ITERATIONS = 200
_GRADIENT_TOLERANCE = 1e-5


def fit_linear(features: Tensor, labels: Tensor, classes: int, weight_decay: float) -> nn.Linear:
    """Multinomial logistic regression: features [n, d], labels [n] -> nn.Linear(d, classes), the same device.

    The optimum of mean cross-entropy + weight_decay/2 |W|^2 for features scaled to mean 0 and variance 1, found by
    L-BFGS from zero (deterministic, no learning rate). The scaling is folded into the returned layer, so it takes the
    features as they are. The bias is not decayed.
    """
    mean = features.mean(0)
    # A feature that never changes says nothing; dividing by 1 keeps it at 0.
    std = features.std(0, correction=0)
    std = torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.ones_like(std))
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        tolerance_grad=_GRADIENT_TOLERANCE,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        total = 0.0
        for rows in torch.arange(len(features), device=features.device).split(_ROWS):
            scaled = (features[rows] - mean) / std
            loss = F.cross_entropy(scaled @ weight.T + bias, labels[rows], reduction="sum") / len(features)
            loss.backward()
            total += loss.item()
        decay = weight_decay / 2 * weight.square().sum()
        decay.backward()
        return total + decay.item()

    optimizer.step(closure)
    layer = nn.Linear(features.shape[1], classes, device=features.device)
    with torch.no_grad():
        layer.weight.copy_(weight / std)
        layer.bias.copy_(bias - layer.weight @ mean)
    return layer


@torch.inference_mode()
def accuracy(layer: nn.Linear, features: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 in percent; with fewer than five classes top-5 is over all of them."""
    first = five = 0
    for x, y in zip(features.split(_ROWS), labels.split(_ROWS), strict=True):
        best = layer(x).topk(min(5, layer.out_features), dim=1).indices == y[:, None]
        first += int(best[:, 0].sum())
        five += int(best.any(1).sum())
    return 100 * first / len(labels), 100 * five / len(labels)


def interval_95(percent: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval, in percent, of a share of ``count`` images."""
    z, p = 1.959964, percent / 100
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return 100 * (middle - half), 100 * (middle + half)
