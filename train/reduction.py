"""Gradients leave while the backward pass still runs."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Of torch's DistributedDataParallel: large enough for a network's full rate, small enough to leave early.
BUCKET_BYTES = 25 * 2**20


class GradientReduction:
    """The mean of each gradient over all ranks, bucket by bucket, as soon as a bucket's gradients are there.

    DeepSpeed at stage 0 averages all in one piece after the backward pass. Here a bucket of about 25 MB leaves when its
    last gradient has come, in the gradients' own dtype, while those of earlier layers are computed; when backward()
    returns, every ``grad`` is the mean (on a GPU: what comes next in the stream finds it so). Buckets go from the last
    layer to the first and leave in that order on every rank, through a process group of their own, since in another's
    they would hold up the small messages of BatchNorm.
    """

    def __init__(self, model: nn.Module, passes: int) -> None:
        """``passes`` backward passes add up before gradients leave. All ranks call it together."""
        self._passes = passes
        self._group = dist.new_group()
        # Gloo has no mean of its own.
        self._mean = dist.get_backend(self._group) == "nccl"
        # NCCL connects a group at its first message, which is not to be in the middle of a backward pass.
        dist.all_reduce(torch.zeros(1, device=next(model.parameters()).device), group=self._group)
        parameters: list[Tensor] = [p for p in reversed(list(model.parameters())) if p.requires_grad]
        self._buckets = [_Bucket(group) for group in by_size(parameters)]
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        self._arrivals = dict.fromkeys(parameters, 0)
        self._sent = 0
        self._compared = False
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, parameter: Tensor) -> None:
        self._arrivals[parameter] += 1
        if self._arrivals[parameter] < self._passes:
            return
        if not any(bucket.missing < len(bucket.parameters) for bucket in self._buckets):
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)
        self._bucket_of[parameter].missing -= 1
        while self._sent < len(self._buckets) and not self._buckets[self._sent].missing:
            self._send(self._buckets[self._sent])

    def _send(self, bucket: "_Bucket") -> None:
        bucket.fill()
        operation = dist.ReduceOp.AVG if self._mean else dist.ReduceOp.SUM
        bucket.work = dist.all_reduce(bucket.flat, operation, self._group, async_op=True)
        self._sent += 1

    def finish(self) -> None:
        """Send what is left, of which a parameter got no gradient, and put the means in place.

        Raises ValueError, in the first step, where a parameter has a gradient on some ranks only: the others would not
        move it.
        """
        for bucket in self._buckets[self._sent :]:
            self._send(bucket)
        if not self._compared:
            self._refuse_differences()
        for bucket in self._buckets:
            bucket.work.wait()
            if not self._mean:
                bucket.flat /= dist.get_world_size()
            bucket.take_back()
        self._sent = 0
        self._arrivals = dict.fromkeys(self._arrivals, 0)

    def _refuse_differences(self) -> None:
        parameters = list(self._arrivals)
        there = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        dist.all_reduce(there, group=self._group)
        for parameter, ranks in zip(parameters, there.tolist(), strict=True):
            if 0 < ranks < dist.get_world_size():
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} got a gradient on {ranks:.0f} of "
                    f"{dist.get_world_size()} ranks; a network must use the same parameters on all of them"
                )
        self._compared = True


class _Bucket:
    """Parameters whose gradients travel together, in memory that is laid out as they are."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.missing = len(parameters)
        self.work: Any = None
        first = parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        pieces = self.flat.split([p.numel() for p in parameters])
        # Parameters are dense, so that a gradient with the strides of its parameter fills its piece.
        self._views = [
            piece.as_strided(p.shape, p.stride(), piece.storage_offset())
            for piece, p in zip(pieces, parameters, strict=True)
        ]

    def fill(self) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        torch._foreach_copy_(self._views, gradients)

    def take_back(self) -> None:
        self.missing = len(self.parameters)
        for parameter, view in zip(self.parameters, self._views, strict=True):
            if parameter.grad is not None:
                parameter.grad = view


def by_size(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Consecutive parameters of one dtype and device, each group of BUCKET_BYTES or a little more but for the last."""
    groups: list[list[Tensor]] = []
    size = BUCKET_BYTES
    for parameter in parameters:
        if size >= BUCKET_BYTES or parameter.dtype != groups[-1][0].dtype:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return groups
