"""Many linear classifiers trained side by side on the same batches, as one matrix product.

Legend: P = classifiers, C = classes, d = width of the features, B = batch over all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from simclr_dali.eval.logistic import Scale
from simclr_dali.model.collectives import all_gather, all_rows, all_sum, world_size
from simclr_dali.model.schedule import learning_rate
from simclr_dali.pipeline.philox import HELD_OUT as HELD_OUT_STREAM
from simclr_dali.pipeline.philox import philox, uniform
from simclr_dali.shards.errors import UserError

LEARNING_RATES = tuple(float(f"{rate:.3g}") for rate in np.logspace(-3, 0.5, 10))
WEIGHT_DECAYS = (0.0, *(float(f"{decay:.3g}") for decay in np.logspace(-6, -1, 9)))
MOMENTUM = 0.9
# A small set gets smaller batches, so that an epoch has some steps, and more epochs; ImageNet gets 11 of 1,125 steps.
LARGEST_BATCH, FEWEST_STEPS = 1024, 16
ENOUGH_STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 12_000, 10, 40
HELD_OUT = 0.1  # of train, to choose on
_ROWS = 1024  # scored at a time


@dataclass(frozen=True)
class Point:
    """A learning rate (peak, cosine to 0 at each step) and a weight decay (of the weights, not of the bias)."""

    lr: float
    weight_decay: float


GRID = tuple(Point(lr, decay) for lr in LEARNING_RATES for decay in WEIGHT_DECAYS)


@dataclass(frozen=True)
class Sweep:
    """What a sweep found."""

    layer: nn.Linear
    """The classifier of the chosen point, fitted to all of train."""
    chosen: Point
    """The point with the highest accuracy; of equal ones that with the smallest cross-entropy."""
    accuracies: dict[Point, float]
    """Top-1 in percent on the part of train that was kept aside."""
    at_the_border: bool
    """Whether a better learning rate may lie outside of the grid."""
    epochs: int
    """Of each training."""
    batch: int
    """Of each training."""


def sweep(
    features: Tensor,
    labels: Tensor,
    ids: npt.NDArray[np.int64],
    classes: int,
    points: Sequence[Point] = GRID,
    *,
    seed: int = 0,
    epochs: int | None = None,
    batch: int | None = None,
) -> Sweep:
    """Choose among ``points`` on a part of train, and train the chosen one on all of it.

    features [n, d], labels [n], ids [n]: this rank's share of train. Each rank trains its share of the points on the
    batches of all ranks, so features travel and classifiers do not. epochs, batch: by the size of the set, if not
    given. Raises UserError where a rank has nothing to train on, or nobody anything to choose on.
    """
    total = int(all_sum(torch.tensor([len(features)], device=features.device)))
    batch = batch or max(1, min(LARGEST_BATCH, total // FEWEST_STEPS))
    epochs = epochs or min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(ENOUGH_STEPS * batch / total)))
    aside = torch.from_numpy(held_out(ids, seed)).to(features.device)
    kept, asked = (~aside).nonzero().flatten(), aside.nonzero().flatten()
    fewest = -int(all_max(-torch.tensor([len(kept)], device=features.device)))
    if not fewest or not int(all_sum(torch.tensor([len(asked)], device=features.device))):
        raise UserError(f"{total} images are too few for a sweep on {world_size()} processes; use the protocol fast")
    rank = torch.distributed.get_rank() if world_size() > 1 else 0
    own = list(points)[rank :: world_size()]
    scale = Scale.of(features, kept)
    weight, bias = train_heads(features, labels, kept, scale, classes, own, seed=seed, epochs=epochs, batch=batch)
    table = torch.zeros(2, len(points), dtype=torch.float64, device=features.device)
    table[:, rank :: world_size()] = _judged(
        weight, bias, all_rows(scale.apply(features[asked])), all_rows(labels[asked])
    )
    right, loss = all_sum(table).tolist()
    chosen = points[min(range(len(points)), key=lambda place: (-right[place], loss[place]))]
    everyone = torch.arange(len(features), device=features.device)
    scale = Scale.of(features)
    weight, bias = train_heads(
        features, labels, everyone, scale, classes, [chosen], seed=seed, epochs=epochs, batch=batch
    )
    rates = sorted({point.lr for point in points})
    return Sweep(
        scale.fold(weight[0], bias[0]),
        chosen,
        {point: 100 * share for point, share in zip(points, right, strict=True)},
        len(rates) > 1 and chosen.lr in (rates[0], rates[-1]),
        epochs,
        batch,
    )


def held_out(ids: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.bool_]:
    """Which of the samples are kept aside: a pure function of (seed, id), the same on any number of ranks."""
    counters = np.zeros((len(ids), 4), np.uint32)
    counters[:, 0], counters[:, 3] = ids, HELD_OUT_STREAM
    return uniform(philox(seed, counters))[:, 0] < HELD_OUT


@torch.no_grad()
def train_heads(
    features: Tensor,
    labels: Tensor,
    among: Tensor,
    scale: Scale,
    classes: int,
    points: Sequence[Point],
    *,
    seed: int,
    epochs: int,
    batch: int,
) -> tuple[Tensor, Tensor]:
    """Weights [P, C, d] and biases [P, C], for scaled features, after SGD with momentum from zero.

    features [n, d], labels [n]: of this rank; among: the rows to train on.

    The gradient of mean cross-entropy is (softmax - one-hot)^T x / B; all P are two matrix products per batch. Each
    epoch goes through the rows of each rank in another order and leaves out what does not fill a batch.
    """
    device, width, world = features.device, features.shape[1], world_size()
    fewest = -int(all_max(-torch.tensor([len(among)], device=device)))
    share = min(max(1, batch // world), fewest)
    steps = fewest // share
    weight = torch.zeros(len(points) * classes, width, device=device)
    bias = torch.zeros(len(points), classes, device=device)
    velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    rates = torch.tensor([point.lr for point in points], device=device)
    decays = torch.tensor([point.weight_decay for point in points], device=device).repeat_interleave(classes)[:, None]
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        order = among[torch.randperm(len(among), generator=generator).to(device)]
        for step in range(steps):
            rows = order[step * share : (step + 1) * share]
            x = scale.apply(all_gather(features[rows]).flatten(0, 1))
            y = all_gather(labels[rows]).flatten()
            error = torch.softmax((x @ weight.T).view(len(x), len(points), classes) + bias, dim=2)
            error[torch.arange(len(x), device=device), :, y] -= 1
            error /= len(x)
            cosine = learning_rate(epoch * steps + step, 1.0, 0, epochs * steps)
            velocity.mul_(MOMENTUM).addmm_(error.flatten(1).T, x).addcmul_(weight, decays)
            bias_velocity.mul_(MOMENTUM).add_(error.sum(0))
            weight.addcmul_(velocity, rates.repeat_interleave(classes)[:, None], value=-cosine)
            bias.addcmul_(bias_velocity, rates[:, None], value=-cosine)
    return weight.view(len(points), classes, width), bias


def all_max(x: Tensor) -> Tensor:
    """The largest over all ranks, element by element, in place."""
    if world_size() > 1:
        torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX)
    return x


@torch.inference_mode()
def _judged(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Of each classifier: share of rows whose label it finds, and mean cross-entropy, float64 [2, P]."""
    found = torch.zeros(2, len(weight), dtype=torch.float64, device=features.device)
    for x, y in zip(features.split(_ROWS), labels.split(_ROWS), strict=True):
        scores = (x @ weight.flatten(0, 1).T).view(len(x), *bias.shape) + bias
        found[0] += (scores.argmax(2) == y[:, None]).sum(0)
        found[1] -= scores.log_softmax(2)[torch.arange(len(x), device=x.device), :, y].double().sum(0)
    return found / len(labels)
