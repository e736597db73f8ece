"""One training step: forward, loss over the global batch, backward, reduction, update."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from simclr_dali.model.precision import at_least_float32
from simclr_dali.train.micro_batches import MicroBatches
from simclr_dali.train.step_times import no_mark

# Embeddings [R, D] of this rank (view 0 of b images, then view 1) -> a scalar to minimise, and detached scalars to
# report, by name. Both are means over this rank's rows; the gradient of the mean over ranks is what is followed.
# A loss may also have ``derived``, what is written of the reported scalars' means over ranks (model.ntxent.NTXent).
Loss = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


class StepResult(NamedTuple):
    """Scalars on the device, of this rank."""

    loss: Tensor
    metrics: dict[str, Tensor]
    """What the loss reports, by name."""
    gradient_norm: Tensor
    """Of all parameters together, after averaging over ranks."""


def train_step(
    engine: Any,
    micro_batches: Sequence[Tensor] | MicroBatches,
    loss: Loss,
    mark: Callable[[str], None] = no_mark,
) -> StepResult:
    """Update the engine's model on one global batch; ``micro_batches`` [2b, 3, h, w] are this rank's share of it.

    With several micro-batches the loss still sees the whole global batch (gradient caching, Gao et al. 2021): all are
    embedded without gradient, the loss and its gradient dz are computed once, and each is embedded again with its
    slice of dz. That costs one more forward pass, and BatchNorm sees micro-batches instead of the rank's whole share.
    ``micro_batches`` is gone through twice then.

    mark: told where each part of the step begins (train.step_times).
    """
    mark("input")
    if len(micro_batches) == 1:
        (views,) = micro_batches
        mark("forward")
        z = engine(views)
        mark("loss")
        value, metrics = loss(z)
        mark("backward")
        engine.backward(value)
        norm = _gradient_norm(engine.module)
        mark("update")
        engine.step()
        mark("other")
        return StepResult(value.detach(), metrics, norm)
    embedded = []
    with torch.no_grad(), _buffers_kept(engine.module):
        for views in micro_batches:
            mark("forward")
            embedded.append(at_least_float32(engine(views)))
            mark("input")
    mark("loss")
    z = _by_view(embedded).requires_grad_()
    value, metrics = loss(z)
    (dz,) = torch.autograd.grad(value, z)
    mark("backward")
    for number, (views, dz_slice) in enumerate(zip(micro_batches, _by_micro_batch(dz, embedded), strict=True)):
        # The gradient of <z, dz> for constant dz is what the loss would send back through this micro-batch. The loss
        # has its scale already; the engine must not divide it by the number of micro-batches.
        engine.backward((engine(views) * dz_slice).sum(), scale_wrt_gas=False)
        if number + 1 == len(micro_batches):  # until then gradients add up
            norm = _gradient_norm(engine.module)
            mark("update")
        engine.step()
    mark("other")
    return StepResult(value.detach(), metrics, norm)


def _gradient_norm(model: nn.Module) -> Tensor:
    return torch.stack(torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])).norm()


def _by_view(parts: Sequence[Tensor]) -> Tensor:
    """Rows view by view within each part -> view by view over all parts, as the loss takes them."""
    halves = [part.chunk(2) for part in parts]
    return torch.cat([half[view] for view in range(2) for half in halves])


def _by_micro_batch(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of _by_view."""
    sizes = [len(part) // 2 for part in like]
    return [torch.cat(pair) for pair in zip(*(half.split(sizes) for half in rows.chunk(2)), strict=True)]


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Running statistics are put back at the end: the second pass counts, not this one.

    Values only: a compiled graph is guarded by the attributes of its modules, and another momentum would be another
    graph.
    """
    buffers = list(model.buffers())
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        if buffers:
            torch._foreach_copy_(buffers, kept)
