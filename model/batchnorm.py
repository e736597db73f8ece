"""Batch normalisation over all ranks, the same on GPU and CPU, that a compiler traces.

torch.nn.SyncBatchNorm refuses the CPU, and breaks the graph of torch.compile at every layer (pytorch#161302).
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_dali.model.precision import at_least_float32

Module = TypeVar("Module", bound=nn.Module)

# torch 2.13 gave the function its first name and warns of the second.
_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor

# Images that BatchNorm must see at a time, over all processes: the two views of one alone become opposites. Up to some
# more its statistics are noise, which a run survives.
MIN_BATCHNORM_IMAGES, NOISY_BATCHNORM_IMAGES = 2, 16
_ALL_RANKS = object()


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose training statistics cover the batches of all ranks of a group; keys and defaults of nn.BatchNorm.

    Ranks may hold batches of different size. In eval mode it is nn.BatchNorm. Statistics, their gradients and the
    running ones are in float32 at least, whatever the input is in; the output has the input's dtype.
    Layers of a process group communicate in the order in which they run, once forward and once backward each.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, group: Any, *, kernels: bool = False) -> None:
        """Takes over the parameters and buffers of ``norm``.

        group: name of a process group; "" where there is one rank. kernels: compute by model.batchnorm_kernels.
        """
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.group, self.kernels = group, kernels

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """relu: take the ReLU of the result too."""
        self._check_input_dim(input)
        if not self.training:
            output = super().forward(input)
            return F.relu(output, inplace=True) if relu else output
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        output, mean, variance, count = _Normalise.apply(
            input, self.weight, self.bias, self.eps, self.group, self.kernels, relu and self.kernels
        )
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked.add_(1)
        return F.relu(output, inplace=True) if relu and not self.kernels else output


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias with mean and var over all ranks, and its gradient.

    With xhat the normalised input and n the count per channel over all ranks,
    dx = weight / sqrt(var + eps) * (dy - sum(dy) / n - xhat * sum(dy * xhat) / n), sums over all ranks (Ioffe and
    Szegedy 2015, section 3). The gradients of weight and bias stay local: the engine averages them like all others.
    The backward pass is written out because a functional all-reduce is differentiated into another one, whose sum
    over ranks would come on top of the engine's mean.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: Any, kernels: bool, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if kernels:
            local_mean, local_variance = _kernels().moments(x)
        else:
            axes = [0, *range(2, x.dim())]
            local_variance, local_mean = torch.var_mean(at_least_float32(x), axes, correction=0)
        local_count = local_mean.new_full((1,), x.numel() // x.shape[1])
        mean, variance, count = _over_ranks(local_mean, local_variance, local_count, group)
        ctx.save_for_backward(x, weight, bias, mean, variance, count)
        ctx.eps, ctx.group, ctx.kernels, ctx.relu = eps, group, kernels, relu
        ctx.mark_non_differentiable(mean, variance, count)
        if kernels:
            output = _kernels().normalise(x, mean, torch.rsqrt(variance + eps), weight, bias, relu)
        else:
            output = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        return output, mean, variance, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, variance, count = ctx.saved_tensors
        scale = torch.rsqrt(variance + ctx.eps)
        if ctx.kernels:
            given = (dy, x, mean, scale, weight, bias)
            dbias, dweight = _kernels().sums(*given, ctx.relu)
            mean_dy, mean_dy_xhat = _means_over_ranks(dbias, dweight, count, ctx.group)
            dx = _kernels().gradient(*given, mean_dy, mean_dy_xhat, ctx.relu)
        else:
            axes, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
            dy = at_least_float32(dy)
            xhat = (at_least_float32(x) - mean.view(shape)) * scale.view(shape)
            dbias, dweight = dy.sum(axes), (dy * xhat).sum(axes)
            mean_dy, mean_dy_xhat = _means_over_ranks(dbias, dweight, count, ctx.group)
            dx = (weight * scale).view(shape) * (dy - mean_dy.view(shape) - xhat * mean_dy_xhat.view(shape))
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype), None, None, None, None


def _over_ranks(mean: Tensor, variance: Tensor, count: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count of all ranks' values, of those of each."""
    if not group:
        return mean, variance, count.squeeze()
    packed = torch.cat([count, mean, variance])
    gathered = collectives.wait_tensor(_gather(packed, 0, group)).view(-1, len(packed))
    counts, means, variances = gathered.split([1, len(mean), len(mean)], dim=1)
    total = counts.sum()
    together = (counts * means).sum(0) / total
    # Moments per rank are merged as Chan et al. (1979) do: sums of squares would cancel in float32.
    return together, (counts * (variances + (means - together).square())).sum(0) / total, total


def _means_over_ranks(dbias: Tensor, dweight: Tensor, count: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    sums = torch.stack([dbias, dweight])
    if group:
        sums = collectives.wait_tensor(collectives.all_reduce(sums, "sum", group))
    mean_dy, mean_dy_xhat = (sums / count).unbind(0)
    return mean_dy, mean_dy_xhat


def _kernels() -> Any:
    """They need Triton, which comes with torch for GPUs only."""
    from simclr_dali.model import batchnorm_kernels

    return batchnorm_kernels


def groups_of_ranks(size: int) -> Any:
    """The process group of this rank, of all ranks cut into groups of ``size`` in their order. All ranks call it.

    None where a group is one rank.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if size == 1 or world == 1:
        return None
    if size == world:
        return dist.group.WORLD
    own, _ = dist.new_subgroups(group_size=size)
    return own


def average_statistics(module: nn.Module) -> None:
    """Give all ranks the mean of their running statistics, which differ where BatchNorm sees groups of them.

    All ranks call it. Training does not read them, so it computes the same with and without.
    """
    world = dist.get_world_size()
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if world == 1 or not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= world
    torch._foreach_copy_(
        buffers,
        [part.view_as(buffer) for part, buffer in zip(flat.split([b.numel() for b in buffers]), buffers, strict=True)],
    )


def synchronised(
    module: Module,
    device: torch.device,
    *,
    compiled: bool = False,
    kernels: bool = False,
    group: Any = _ALL_RANKS,
) -> Module:
    """``module``, which will run on ``device``, with every BatchNorm replaced by one that sees all ranks of ``group``.

    group: as groups_of_ranks gives it; by default all ranks. Parameters, buffers and keys stay as they are. With one
    rank nothing is replaced, unless ``kernels`` are asked for. Where nothing is compiled on a GPU it is torch's, whose
    own kernels there need no copies in float32.
    """
    if group is _ALL_RANKS:
        group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    if group is None and not kernels:
        return module
    if device.type == "cuda" and not compiled and not kernels:
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, group)
    name_of_group = group.group_name if group else ""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, SyncBatchNorm(child, name_of_group, kernels=kernels))
        else:
            synchronised(child, device, compiled=compiled, kernels=kernels, group=group)
    return module


def norm_relu(norm: nn.Module, relu: nn.Module, x: Tensor) -> Tensor:
    """``relu(norm(x))``, by ``norm`` alone where it does both at once."""
    found: Tensor = norm(x, relu=True) if isinstance(norm, SyncBatchNorm) else relu(norm(x))
    return found
