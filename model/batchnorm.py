"""Batch normalisation over all ranks on the CPU, which torch.nn.SyncBatchNorm refuses."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# Images that BatchNorm must see at a time, over all processes: the two views of one alone become opposites. Up to some
# more its statistics are noise, which a run survives.
MIN_BATCHNORM_IMAGES, NOISY_BATCHNORM_IMAGES = 2, 16


class CPUSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose training statistics cover the batches of all ranks; keys and defaults of nn.BatchNorm.

    Ranks may hold batches of different size. In eval mode, and without a process group, it is nn.BatchNorm.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        output, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps)
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
            self.num_batches_tracked.add_(1)
        return output


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias with mean and var over all ranks, and its gradient.

    With xhat the normalised input and n the count per channel over all ranks,
    dx = weight / sqrt(var + eps) * (dy - sum(dy) / n - xhat * sum(dy * xhat) / n), sums over all ranks (Ioffe and
    Szegedy 2015, section 3). The gradients of weight and bias stay local: the engine averages them like all others.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes = [0, *range(2, x.dim())]
        local_count = x.numel() // x.shape[1]
        local_variance, local_mean = torch.var_mean(x, axes, correction=0)
        # Moments per rank are merged as Chan et al. (1979) do: sums of squares would cancel in float32.
        packed = torch.cat([x.new_tensor([local_count]), local_mean, local_variance])
        gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, packed)
        counts, means, variances = torch.stack(gathered).split([1, len(local_mean), len(local_mean)], dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        variance = (counts * (variances + (means - mean).square())).sum(0) / count
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.axes = eps, axes
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance, count = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = torch.rsqrt(variance + ctx.eps)
        xhat = (x - mean.view(shape)) * scale.view(shape)
        dbias, dweight = dy.sum(ctx.axes), (dy * xhat).sum(ctx.axes)
        sums = torch.stack([dbias, dweight])
        dist.all_reduce(sums)
        mean_dy, mean_dy_xhat = (sums / count).unbind(0)
        dx = (weight * scale).view(shape) * (dy - mean_dy.view(shape) - xhat * mean_dy_xhat.view(shape))
        return dx, dweight, dbias, None


def synchronised(module: nn.Module, device: torch.device) -> nn.Module:
    """``module`` with every BatchNorm replaced by one that sees all ranks: torch's on a GPU, ours on the CPU.

    Parameters, buffers and keys stay as they are. With one rank nothing is replaced.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return module
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            replacement = CPUSyncBatchNorm(child.num_features, child.eps, child.momentum)
            replacement.weight, replacement.bias = child.weight, child.bias
            replacement.running_mean, replacement.running_var = child.running_mean, child.running_var
            replacement.num_batches_tracked = child.num_batches_tracked
            setattr(module, name, replacement)
        else:
            synchronised(child, device)
    return module
