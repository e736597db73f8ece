"""Classification by the nearest neighbours, weighted by similarity; the images compared with may lie on many ranks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_dali.model.collectives import all_gather, world_size

QUERIES, BANK = 1024, 65_536  # rows compared at a time; their product bounds memory


@torch.inference_mode()
def nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines [q, k], largest first, and places [q, k] in ``bank`` of the k rows nearest to each query.

    bank: [n, d], queries: [q, d], any scale, on one device. Raises ValueError for more neighbours than rows.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}; choose 1 to {len(bank)}, the number of images to compare with")
    asked = F.normalize(queries, dim=1)
    best = asked.new_empty(len(asked), 0)
    where = torch.empty(len(asked), 0, dtype=torch.int64, device=bank.device)
    for start in range(0, len(bank), BANK):
        block = F.normalize(bank[start : start + BANK], dim=1)
        found, at = _largest(asked, block, k)
        best, order = torch.cat([best, found], 1).topk(min(k, best.shape[1] + found.shape[1]), dim=1)
        where = torch.cat([where, at + start], 1).gather(1, order)
    return best, where


def _largest(queries: Tensor, block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and places in ``block`` of the k rows (or all) nearest to each query; both are unit vectors."""
    parts = [(rows @ block.T).topk(min(k, len(block)), dim=1) for rows in queries.split(QUERIES)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


@torch.inference_mode()
def nearest_labels(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines [q, k], largest first, and labels [q, k] of the k rows of all ranks nearest to each query.

    bank: [n, d], labels: [n]: of this rank. queries: [q, d], the same on all ranks; so is the result. Each rank looks
    through its own rows; k neighbours per query travel, no features do.
    """
    own = min(k, len(bank))
    cosines = queries.new_full((len(queries), k), float("-inf"))
    found = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    if own:
        cosines[:, :own], places = nearest(bank, queries, own)
        found[:, :own] = labels[places]
    if world_size() == 1:
        return cosines, found
    merged = []
    for some, of in zip(cosines.split(QUERIES), found.split(QUERIES), strict=True):
        best, order = all_gather(some).transpose(0, 1).flatten(1).topk(k, dim=1)
        merged.append((best, all_gather(of).transpose(0, 1).flatten(1).gather(1, order)))
    return torch.cat([best for best, _ in merged]), torch.cat([of for _, of in merged])


@torch.inference_mode()
def accuracies(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    truth: Tensor,
    classes: int,
    ks: Sequence[int],
    temperature: float,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 in percent for each of ``ks``: each neighbour votes with exp(cosine / temperature).

    bank, labels: this rank's; queries, truth: all, the same on all ranks. Wu et al. 2018 (Unsupervised feature
    learning via non-parametric instance discrimination), section 3.4. A class without a vote is in no top-5.
    """
    cosines, voters = nearest_labels(bank, labels, queries, max(ks))
    found = {}
    for k in ks:
        first = five = 0
        for cosine, voter, true in zip(
            cosines[:, :k].split(QUERIES), voters[:, :k].split(QUERIES), truth.split(QUERIES), strict=True
        ):
            # Against the nearest one: only ratios matter, and exp(cosine / temperature) itself would overflow.
            weight = ((cosine - cosine[:, :1]) / temperature).exp()
            best = cosine.new_zeros(len(true), classes).scatter_add_(1, voter, weight).topk(min(5, classes), dim=1)
            right = (best.indices == true[:, None]) & (best.values > 0)
            first += int(right[:, 0].sum())
            five += int(right.any(1).sum())
        found[k] = (100 * first / len(truth), 100 * five / len(truth))
    return found
