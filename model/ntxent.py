"""NT-Xent over the embeddings of all ranks: exact, in tiles, and without a collective in backward.

Legend: R = 2b rows of this rank (view 0 of its b images, then view 1), W = ranks, N = W R rows of all, D = embedding
width, B = rows of one rank's block (= R), T = rows of a tile, tau = temperature.

Chen et al. 2020, equation 1, over all N rows, s_ij = z_i . z_j / tau for unit vectors z, p(i) the other view of i:
    L       = 1/N sum_i (lse_i - s_ip(i)),   lse_i = log sum_{j != i} exp(s_ij)
    dL/dz_i = 1/(N tau) [ sum_{j != i} exp(s_ij) (u_i + u_j) z_j - 2 z_p(i) ],   u_i = exp(-lse_i)
S is symmetric. So a rank that has all z and all u computes the whole gradient of its own rows; and of the tiles between
its own rows only those on and above the diagonal are computed. A rank returns the mean over its own rows and W times
dL/dz_i, so that the mean over ranks, which is what DeepSpeed and DDP take of the parameters' gradients, is exactly the
gradient of L.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from simclr_dali.model.collectives import all_gather, own_rank_first, world_size

# Rows of a tile by device. On a CPU a tile stays in a core's cache; a GPU wants few launches (64 MiB in float32).
DEFAULT_TILE = {"cpu": 512, "cuda": 4096}
# Unit vectors bound every logit by 1/tau: exp(1/tau) summed over millions of rows is a float32 without any shift.
SMALLEST_TEMPERATURE = 0.02


@dataclass(frozen=True)
class Contrast:
    """The loss, differentiable, and detached scalars beside it; each is over this rank's rows."""

    loss: Tensor
    """Mean over the rows."""
    positive: Tensor
    """Mean cosine of the two views of an image."""
    hardest_negative: Tensor
    """Mean over the rows of the largest cosine with a view of another image."""
    top1: Tensor
    """Share of the rows whose other view is nearer than all other rows."""
    potential: Tensor
    """Mean of exp(-|z_i - z_j|^2 / (2 tau)) over views of different images."""


@dataclass(frozen=True)
class NTXent:
    """NT-Xent as a loss of train.step: embeddings -> loss and named scalars."""

    temperature: float

    def __call__(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        contrast = nt_xent(z, self.temperature)
        return contrast.loss, {name: value for name, value in vars(contrast).items() if name != "loss"}

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """What is reported, of the means over all ranks: alignment and uniformity (Wang and Isola 2020) in place of
        the potential. Uniformity is at this temperature; theirs, t = 2, is a temperature of 0.25."""
        rest = {name: value for name, value in means.items() if name != "potential"}
        uniformity = math.log(max(means["potential"], sys.float_info.min))
        return {**rest, "alignment": 2 - 2 * means["positive"], "uniformity": uniformity}


def nt_xent(z: Tensor, temperature: float, tile: int | None = None) -> Contrast:
    """NT-Xent of embeddings ``z`` [R, D] of this rank (view 0 of b images, then view 1), any scale.

    Computed in float32, or float64 where z is, with autocast off. All ranks must hold equally many rows. tile: rows
    compared at a time (DEFAULT_TILE). Memory holds all N rows and one tile, in backward two. Raises ValueError for an
    odd number of rows, fewer than two images over all ranks, or a temperature under SMALLEST_TEMPERATURE.
    """
    if len(z) % 2 or len(z) * world_size() < 4:
        raise ValueError(f"NT-Xent needs both views of at least two images, got {len(z)} rows on {world_size()} ranks")
    if not temperature >= SMALLEST_TEMPERATURE:
        raise ValueError(
            f"temperature is {temperature}; NT-Xent needs at least {SMALLEST_TEMPERATURE} to be computed in float32"
        )
    with torch.autocast(z.device.type, enabled=False):
        z_RD = _unit(z if z.dtype == torch.float64 else z.float())
        tile = tile or DEFAULT_TILE.get(z.device.type, max(DEFAULT_TILE.values()))
        return Contrast(*_NTXentFunction.apply(z_RD, temperature, tile))


def _unit(z_RD: Tensor) -> Tensor:
    """Rows of norm 1, of rows of any norm: their squares would overflow above 1e19 and vanish below 1e-19.

    Scaling by a power of two is exact. A row of zeros, which has no direction, stays one and gets no gradient.
    """
    largest_R = z_RD.detach().abs().amax(1)
    limit = 1000 if z_RD.dtype == torch.float64 else 100  # powers of two that the type holds
    exponent_R = torch.frexp(largest_R).exponent.clamp(-limit, limit)
    scaled_RD = z_RD * torch.ldexp(z_RD.new_ones(len(z_RD)), -exponent_R)[:, None]
    return F.normalize(scaled_RD.masked_fill((largest_R == 0)[:, None], 0.0), dim=1)


class _NTXentFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_RD: Tensor, tau: float, tile: int) -> tuple[Tensor, ...]:
        z_WRD = all_gather(z_RD)
        scaled_RD = z_RD / tau
        sum_R, hardest_R = z_RD.new_zeros(len(z_RD)), z_RD.new_full((len(z_RD),), -torch.inf)
        for hop, z_BD in enumerate(own_rank_first(z_WRD)):
            for rows, columns, s_TT in _tiles(scaled_RD, z_BD, tile, own=hop == 0):
                mirrored = hop == 0 and rows != columns
                hardest_R[rows] = torch.maximum(hardest_R[rows], s_TT.amax(1))
                if mirrored:
                    hardest_R[columns] = torch.maximum(hardest_R[columns], s_TT.amax(0))
                e_TT = s_TT.exp_()
                sum_R[rows] += e_TT.sum(1)
                if mirrored:
                    sum_R[columns] += e_TT.sum(0)
        positive_R = (scaled_RD * _other_view(z_RD)).sum(1)
        # lse_i - s_ip(i) without the cancellation that would blur small losses. Softplus is exact up to its threshold
        # and the identity above, where nothing but x is left of log(1 + exp(x)).
        loss_R = F.softplus(sum_R.log() - positive_R, threshold=50)
        u_R = (-loss_R - positive_R).exp()
        ctx.save_for_backward(z_RD, u_R, sum_R, z_WRD, all_gather(u_R))
        ctx.tau, ctx.tile = tau, tile
        # Two computations of the same cosine differ in rounding; a tie, as of collapsed embeddings, is not found.
        top1 = (positive_R > hardest_R + 1e-5 / tau).to(z_RD.dtype).mean()
        potential = (sum_R / (world_size() * len(z_RD) - 2)).mean() * math.exp(-1 / tau)
        metrics = (positive_R.mean() * tau, hardest_R.mean() * tau, top1, potential)
        ctx.mark_non_differentiable(*metrics)
        return loss_R.mean(), *metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        z_RD, u_R, sum_R, z_WRD, u_WR = ctx.saved_tensors
        scaled_RD = z_RD / ctx.tau
        # For the other view exp(s_ip) (u_i + u_p) - 2, as what the negatives leave of the two probabilities.
        negatives_R = sum_R * u_R
        dz_RD = -(negatives_R + _other_view(negatives_R))[:, None] * _other_view(z_RD)
        for hop, (z_BD, u_B) in enumerate(zip(own_rank_first(z_WRD), own_rank_first(u_WR), strict=True)):
            for rows, columns, s_TT in _tiles(scaled_RD, z_BD, ctx.tile, own=hop == 0):
                weight_TT = s_TT.exp_().mul_(u_R[rows, None] + u_B[columns])
                dz_RD[rows].addmm_(weight_TT, z_BD[columns])
                if hop == 0 and rows != columns:
                    dz_RD[columns].addmm_(weight_TT.T, z_RD[rows])
        return dz_RD * (grad / (len(z_RD) * ctx.tau)), None, None


def _tiles(scaled_RD: Tensor, z_BD: Tensor, tile: int, *, own: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and logits of each tile, in one memory; -inf where a row meets itself or its other view.

    own: the block holds the rank's own rows; the tiles below the diagonal, mirror images of those above, are left out.
    """
    rows_total, half = len(scaled_RD), len(scaled_RD) // 2
    memory = scaled_RD.new_empty(min(tile, rows_total) ** 2)
    for top in range(0, rows_total, tile):
        rows = slice(top, min(top + tile, rows_total))
        for left in range(top if own else 0, rows_total, tile):
            columns = slice(left, min(left + tile, rows_total))
            shape = rows.stop - top, columns.stop - left
            s_TT = memory[: shape[0] * shape[1]].view(shape)
            torch.mm(scaled_RD[rows], z_BD[columns].T, out=s_TT)
            if own:
                for distance in (0, half, -half):
                    s_TT.diagonal(distance + top - left).fill_(-torch.inf)
            yield rows, columns, s_TT


def _other_view(x_R: Tensor) -> Tensor:
    return x_R.roll(len(x_R) // 2, 0)
