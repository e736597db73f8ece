"""What ranks send each other. Without a process group there is one rank. Nothing here is differentiable.

Legend: W = ranks, R = rows that each rank holds.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 gave the function its second name and warns of the first.
_gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(x_R: Tensor) -> Tensor:
    """``x_R`` of all ranks, [W, R, ...]."""
    if world_size() == 1:
        return x_R[None]
    gathered = x_R.new_empty(world_size() * len(x_R), *x_R.shape[1:])
    _gather_into(gathered, x_R.contiguous())
    return gathered.view(world_size(), *x_R.shape)


def own_rank_first(x_WR: Tensor) -> Iterator[Tensor]:
    """The blocks of a gathered tensor, beginning with this rank's own and going on with the ranks before it."""
    rank = dist.get_rank() if len(x_WR) > 1 else 0
    return (x_WR[(rank - hop) % len(x_WR)] for hop in range(len(x_WR)))


def all_sum(x: Tensor) -> Tensor:
    """``x`` summed over all ranks, in place; the same bits on every rank."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_rows(x_N: Tensor) -> Tensor:
    """The rows of all ranks, rank by rank; ranks may hold different numbers of them."""
    if world_size() == 1:
        return x_N
    counts = all_gather(torch.tensor([len(x_N)], device=x_N.device)).flatten().tolist()
    padded = x_N.new_zeros(max(counts), *x_N.shape[1:])
    padded[: len(x_N)] = x_N
    return torch.cat([rows[:count] for rows, count in zip(all_gather(padded), counts, strict=True)])
