"""NT-Xent over the embeddings of all ranks: exact, tiled, and without a collective in backward.

Legend: R = 2b rows of this rank (view 0 of its b images, then view 1), N = all rows of all ranks, D = embedding width,
T = rows of a tile, W = ranks, tau = temperature.

Chen et al. 2020, equation 1, over all N rows, s_ij = z_i . z_j / tau for unit vectors z, p(i) the other view of i:
    L       = 1/N sum_i (lse_i - s_ip(i)),   lse_i = log sum_{j != i} exp(s_ij)
    dL/dz_i = 1/(N tau) [ sum_{j != i} (P_ij + P_ji) z_j - 2 z_p(i) ],   P_ij = exp(s_ij - lse_i)
S is symmetric, so P_ji = exp(s_ij - lse_j): a rank that has all z and all lse computes the whole gradient of its own
rows. A rank returns the mean over its own rows and W times dL/dz_i, so that the mean over ranks, which is what
DeepSpeed and DDP take of the parameters' gradients, is exactly the gradient of L.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

DEFAULT_TILE = 4096  # rows of all ranks compared at a time; memory is R x DEFAULT_TILE numbers
# Unit vectors bound every logit by 1/tau, so exp(s - 1/tau) needs no running maximum, as long as the smallest,
# exp(-2/tau), is a normal float32.
SMALLEST_TEMPERATURE = 0.03

# torch 2.13 gave the function its second name and warns of the first.
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class Contrast:
    """loss: mean over this rank's rows, differentiable. The others are detached scalars over this rank's rows.

    positive: mean cosine of the two views of an image. top1: share of rows whose other view is the nearest row of all.
    """

    loss: Tensor
    positive: Tensor
    top1: Tensor


def nt_xent(z: Tensor, temperature: float, tile: int = DEFAULT_TILE) -> Contrast:
    """NT-Xent of embeddings ``z`` [R, D] of this rank (view 0 of b images, then view 1), any scale.

    Computed in float32, or float64 where z is, with autocast off. All ranks must hold equally many rows.
    Raises ValueError for an odd number of rows or a temperature under SMALLEST_TEMPERATURE.
    """
    if len(z) % 2 or not len(z):
        raise ValueError(f"NT-Xent needs both views of every image, got {len(z)} rows")
    if not temperature >= SMALLEST_TEMPERATURE:
        raise ValueError(
            f"temperature is {temperature}; NT-Xent needs at least {SMALLEST_TEMPERATURE} to be computed in float32"
        )
    with torch.autocast(z.device.type, enabled=False):
        z_RD = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
        loss, positive, top1 = _NTXent.apply(z_RD, temperature, tile)
    return Contrast(loss, positive, top1)


class _NTXent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_RD: Tensor, tau: float, tile: int) -> tuple[Tensor, Tensor, Tensor]:
        z_ND = _all_gather(z_RD)
        own = _first_own_row(z_RD)
        sum_R = z_RD.new_zeros(len(z_RD))
        nearest_R = z_RD.new_full((len(z_RD),), -torch.inf)
        for start, z_TD in _tiles(z_ND, tile):
            s_RT = _logits(z_RD, z_TD, tau, own, start)
            nearest_R = torch.maximum(nearest_R, s_RT.amax(1))
            sum_R += s_RT.sub_(1 / tau).exp_().sum(1)
        lse_R = sum_R.log() + 1 / tau
        positive_R = (z_RD * _other_view(z_RD)).sum(1) / tau
        ctx.save_for_backward(z_RD, z_ND, lse_R, _all_gather(lse_R))
        ctx.tau, ctx.tile, ctx.own = tau, tile, own
        positive = positive_R.mean() * tau
        # The positive is among the compared rows, computed by another kernel: equal up to rounding.
        top1 = (positive_R >= nearest_R - 1e-5 / tau).to(z_RD.dtype).mean()
        ctx.mark_non_differentiable(positive, top1)
        return (lse_R - positive_R).mean(), positive, top1

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        z_RD, z_ND, lse_R, lse_N = ctx.saved_tensors
        tau = ctx.tau
        dz_RD = -2 * _other_view(z_RD)
        # P_ij + P_ji = exp(s_ij - 1/tau) * (u_i + u_j)
        u_R, u_N = (1 / tau - lse_R).exp(), (1 / tau - lse_N).exp()
        for start, z_TD in _tiles(z_ND, ctx.tile):
            e_RT = _logits(z_RD, z_TD, tau, ctx.own, start).sub_(1 / tau).exp_()
            e_RT *= u_R[:, None] + u_N[start : start + len(z_TD)]
            dz_RD.addmm_(e_RT, z_TD)
        return dz_RD * (grad / (len(z_RD) * tau)), None, None


def _logits(z_RD: Tensor, z_TD: Tensor, tau: float, own: int, start: int) -> Tensor:
    """s_RT = z_RD . z_TD / tau with -inf where a row meets itself; ``own`` is the rank's first row among all."""
    s_RT = (z_RD @ z_TD.T) / tau
    # Row r is column own + r - start of this tile.
    first = max(start - own, 0)
    last = min(start + len(z_TD) - own, len(z_RD))
    if first < last:
        s_RT[first:last, own + first - start : own + last - start].fill_diagonal_(-torch.inf)
    return s_RT


def _tiles(z_ND: Tensor, tile: int) -> list[tuple[int, Tensor]]:
    return [(start, z_ND[start : start + tile]) for start in range(0, len(z_ND), tile)]


def _other_view(z_RD: Tensor) -> Tensor:
    return z_RD.roll(len(z_RD) // 2, 0)


def _first_own_row(z_RD: Tensor) -> int:
    return dist.get_rank() * len(z_RD) if dist.is_initialized() else 0


def _all_gather(x: Tensor) -> Tensor:
    """``x`` of all ranks, one after the other along dimension 0; not differentiable."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    gathered = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    _gather(gathered, x.contiguous())
    return gathered
