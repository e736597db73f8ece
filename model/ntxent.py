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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from simclr_dali.model.collectives import all_gather, own_first, world_size
from simclr_dali.model.collectives import ring as around_the_ring

# Rows of a tile by device. On a CPU a tile stays in a core's cache; a GPU wants few launches (64 MiB in float32).
DEFAULT_TILE = {"cpu": 512, "cuda": 4096}
# Unit vectors bound every logit by 1/tau: exp(1/tau) summed over millions of rows is a float32 without any shift.
SMALLEST_TEMPERATURE = 0.02


@dataclass(frozen=True)
class Contrast:
    """loss: mean over this rank's rows, differentiable. The others are detached scalars over this rank's rows.

    positive: mean cosine of the two views of an image. hardest_negative: mean over rows of the largest cosine with a
    view of another image. top1: share of rows whose other view is nearer than all other rows. potential: mean of
    exp(-|z_i - z_j|^2 / (2 tau)) over views of different images; its logarithm is the uniformity of Wang and Isola
    (2020), whose t = 2 is tau = 0.25 here.
    """

    loss: Tensor
    positive: Tensor
    hardest_negative: Tensor
    top1: Tensor
    potential: Tensor


def nt_xent(z: Tensor, temperature: float, tile: int | None = None, *, ring: bool = False) -> Contrast:
    """NT-Xent of embeddings ``z`` [R, D] of this rank (view 0 of b images, then view 1), any scale.

    Computed in float32, or float64 where z is, with autocast off. All ranks must hold equally many rows. tile: rows
    compared at a time (DEFAULT_TILE). ring: blocks of z go from rank to rank, once more in backward, instead of being
    gathered, so that memory holds a few blocks instead of all N rows. Besides, it is a tile, in backward two.
    Raises ValueError for an odd number of rows, fewer than two images over all ranks, or a temperature under
    SMALLEST_TEMPERATURE.
    """
    if len(z) % 2 or len(z) * world_size() < 4:
        raise ValueError(f"NT-Xent needs both views of at least two images, got {len(z)} rows on {world_size()} ranks")
    if not temperature >= SMALLEST_TEMPERATURE:
        raise ValueError(
            f"temperature is {temperature}; NT-Xent needs at least {SMALLEST_TEMPERATURE} to be computed in float32"
        )
    with torch.autocast(z.device.type, enabled=False):
        z_RD = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
        tile = tile or DEFAULT_TILE.get(z.device.type, max(DEFAULT_TILE.values()))
        return Contrast(*_NTXent.apply(z_RD, temperature, tile, ring))


class _NTXent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_RD: Tensor, tau: float, tile: int, ring: bool) -> tuple[Tensor, ...]:
        z_WRD = None if ring else all_gather(z_RD)
        scaled_RD = z_RD / tau
        sum_R, hardest_R = z_RD.new_zeros(len(z_RD)), z_RD.new_full((len(z_RD),), -torch.inf)
        for hop, z_BD in enumerate(around_the_ring(z_RD) if z_WRD is None else own_first(z_WRD)):
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
        ctx.save_for_backward(z_RD, u_R, sum_R, *(() if z_WRD is None else (z_WRD, all_gather(u_R))))
        ctx.tau, ctx.tile = tau, tile
        # Two computations of the same cosine differ in rounding; a tie, as of collapsed embeddings, is not found.
        top1 = (positive_R > hardest_R + 1e-5 / tau).to(z_RD.dtype).mean()
        potential = (sum_R / (world_size() * len(z_RD) - 2)).mean() * math.exp(-1 / tau)
        metrics = (positive_R.mean() * tau, hardest_R.mean() * tau, top1, potential)
        ctx.mark_non_differentiable(*metrics)
        return loss_R.mean(), *metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        z_RD, u_R, sum_R, *gathered = ctx.saved_tensors
        scaled_RD = z_RD / ctx.tau
        # For the other view exp(s_ip) (u_i + u_p) - 2, as what the negatives leave of the two probabilities.
        negatives_R = sum_R * u_R
        dz_RD = -(negatives_R + _other_view(negatives_R))[:, None] * _other_view(z_RD)
        blocks: Iterable[tuple[Tensor, Tensor]]
        if gathered:
            blocks = zip(*map(own_first, gathered), strict=True)
        else:
            blocks = ((packed[:, :-1], packed[:, -1]) for packed in around_the_ring(torch.cat([z_RD, u_R[:, None]], 1)))
        for hop, (z_BD, u_B) in enumerate(blocks):
            for rows, columns, s_TT in _tiles(scaled_RD, z_BD, ctx.tile, own=hop == 0):
                weight_TT = s_TT.exp_().mul_(u_R[rows, None] + u_B[columns])
                dz_RD[rows].addmm_(weight_TT, z_BD[columns])
                if hop == 0 and rows != columns:
                    dz_RD[columns].addmm_(weight_TT.T, z_RD[rows])
        return dz_RD * (grad / (len(z_RD) * ctx.tau)), None, None, None


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
