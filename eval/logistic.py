"""A linear classifier on fixed features, and its accuracy; features may lie on several ranks.

Legend: n = rows of this rank, N = of all ranks, d = width of the features, C = classes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_dali.model.collectives import all_rows, all_sum

# Scores computed at a time; bounds memory to ROWS x classes numbers.
_ROWS = 65_536
_CONFUSIONS = 1_000  # pairs of classes in a result
_ITERATIONS = 2000
_GRADIENT_TOLERANCE = 1e-5  # largest entry; float32 resolves no more on a large set
_CONVERGED = 1e-3  # of the gradient at zero


@dataclass(frozen=True)
class Scale:
    """What brings features to mean 0 and variance 1, over all ranks; those that never change are left out."""

    mean: Tensor
    """float32 [d]."""
    std: Tensor
    """float32 [d]; infinite for a feature that never changes, which then is 0 and has no weight."""

    @staticmethod
    def of(features: Tensor, among: Tensor | None = None) -> "Scale":
        """Of the rows ``among`` (default: all) of each rank's features."""
        rows = (torch.arange(len(features), device=features.device) if among is None else among).split(_ROWS)
        count = all_sum(torch.tensor([sum(map(len, rows))], dtype=torch.float64, device=features.device))
        mean = all_sum(torch.stack([features[some].double().sum(0) for some in rows]).sum(0)) / count
        squares = torch.stack([(features[some].double() - mean).square().sum(0) for some in rows])
        std = (all_sum(squares.sum(0)) / count).sqrt()
        # But for the rounding of what computed it. Features of any scale count that float32 can divide by.
        constant = std <= (1e-6 * mean.abs()).clamp_min(1e-30)
        return Scale(mean.float(), std.float().masked_fill(constant, torch.inf))

    def apply(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std

    def fold(self, weight: Tensor, bias: Tensor) -> nn.Linear:
        """A layer for features as they are, of one for scaled features: weight [C, d], bias [C]."""
        layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        with torch.no_grad():
            layer.weight.copy_(weight / self.std)
            layer.bias.copy_(bias - layer.weight @ self.mean)
        return layer


@dataclass(frozen=True)
class Fit:
    """A fitted classifier, and how far the fit came."""

    layer: nn.Linear
    """d -> C."""
    iterations: int
    """Of L-BFGS."""
    gradient: float
    """Largest entry of the objective's gradient at the end."""
    gradient_at_zero: float
    """The same at zero, where it began."""

    @property
    def converged(self) -> bool:
        return self.gradient <= max(_GRADIENT_TOLERANCE, _CONVERGED * self.gradient_at_zero)


def fit_linear(features: Tensor, labels: Tensor, classes: int, weight_decay: float) -> Fit:
    """Multinomial logistic regression on features [n, d], labels [n] of all ranks.

    The optimum of mean cross-entropy + weight_decay/2 |W|^2 for features scaled to mean 0 and variance 1, found by
    L-BFGS from zero (deterministic, no learning rate). The scaling is folded into the returned layer, so it takes the
    features as they are. The bias is not decayed.
    """
    scale = Scale.of(features)
    total = int(all_sum(torch.tensor([len(features)], device=features.device)))
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        max_eval=2 * _ITERATIONS,
        tolerance_grad=_GRADIENT_TOLERANCE,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
        own = torch.zeros(1, dtype=torch.float64, device=features.device)
        for rows in torch.arange(len(features), device=features.device).split(_ROWS):
            scores = scale.apply(features[rows]) @ weight.T + bias
            loss = F.cross_entropy(scores, labels[rows], reduction="sum") / total
            loss.backward()
            own += loss.detach()
        all_sum(weight.grad)
        all_sum(bias.grad)
        decay = weight_decay / 2 * weight.square().sum()
        decay.backward()
        return float(all_sum(own)) + decay.item()

    def gradient() -> float:
        closure()
        assert weight.grad is not None and bias.grad is not None
        return max(weight.grad.abs().max().item(), bias.grad.abs().max().item())

    at_zero = gradient()
    optimizer.step(closure)
    iterations = int(optimizer.state[weight]["n_iter"])
    return Fit(scale.fold(weight.detach(), bias.detach()), iterations, gradient(), at_zero)


@dataclass(frozen=True)
class Score:
    """How often a classifier is right on the images of all ranks, each counted once."""

    top1: float
    """In percent."""
    top5: float
    """In percent; 100 with up to five classes, and not reported then."""
    per_class: tuple[float, ...]
    """Top-1 in percent by label, NaN for a class without images."""
    count: int
    """Images."""
    confused: tuple[tuple[int, int, int], ...]
    """Label, class that was found instead, and images, of the most frequent mistakes, most frequent first."""


@torch.inference_mode()
def score(layer: nn.Linear, features: Tensor, labels: Tensor) -> Score:
    """How often ``layer`` finds the labels [n] of features [n, d], over all ranks."""
    classes = layer.out_features
    best = [layer(x).topk(min(5, classes), dim=1).indices for x in features.split(_ROWS)]
    found = all_rows(torch.cat(best)).cpu()
    truth = all_rows(labels).cpu()
    total = len(truth)
    right = found[:, 0] == truth
    images, first = (torch.bincount(some, minlength=classes) for some in (truth, truth[right]))
    five = int((found == truth[:, None]).any(1).sum())
    pairs, counts = torch.unique((truth * classes + found[:, 0])[~right], return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:_CONFUSIONS]
    confused = tuple(
        (pair // classes, pair % classes, count)
        for pair, count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    )
    per_class = tuple((100 * first.double() / images).tolist())
    return Score(100 * int(right.sum()) / total, 100 * five / total, per_class, total, confused)


def interval_95(percent: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval, in percent, of a share of ``count`` images."""
    z, p = 1.959964, percent / 100
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return 100 * (middle - half), 100 * (middle + half)


def among_five(top5: float, classes: int) -> float | None:
    """Top-5 accuracy as it is reported: not at all where five classes are all there are."""
    return round(top5, 3) if classes > 5 else None


def in_words(top1: float, top5: float, classes: int) -> str:
    """``top-1 63.20 %, top-5 85.00 %``, or the first alone."""
    return f"top-1 {top1:.2f} %" + (f", top-5 {top5:.2f} %" if classes > 5 else "")


def reported(found: Score, classes: tuple[str, ...]) -> dict[str, object]:
    """A score as the result files have it."""
    return {
        "top1": round(found.top1, 3),
        "top5": among_five(found.top5, len(classes)),
        "top1_interval_95": [round(bound, 3) for bound in interval_95(found.top1, found.count)],
        "per_class": {
            name: None if math.isnan(top1) else round(top1, 2)
            for name, top1 in zip(classes, found.per_class, strict=True)
        },
        "confused": [[classes[label], classes[other], count] for label, other, count in found.confused],
    }
