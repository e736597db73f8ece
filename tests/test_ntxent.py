"""NT-Xent against its definition: value, gradient, tiles, temperatures, precision, several processes."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.ntxent import nt_xent
from tests.conftest import run_ranks


def reference(z: Tensor, temperature: float) -> Tensor:
    """Chen et al. 2020, equation 1, by the full matrix."""
    z = F.normalize(z, dim=1)
    similarity = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(z) // 2))


def embeddings(rows: int, width: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("tile", [1, 7, 24, 4096])
def test_value_and_gradient_are_the_definitions(temperature: float, tile: int) -> None:
    z = embeddings(24)
    loss = nt_xent(z, temperature, tile).loss
    expected = reference(z, temperature)
    assert abs(loss - expected) < 1e-12
    (gradient,), (expected_gradient,) = torch.autograd.grad(loss, z), torch.autograd.grad(expected, z)
    assert (gradient - expected_gradient).abs().max() < 1e-12


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda z: nt_xent(z, 0.2, 3).loss, embeddings(8, 4))


def test_scaled_loss_has_a_scaled_gradient() -> None:
    z = embeddings(10)
    (once,), (thrice,) = (torch.autograd.grad(factor * nt_xent(z, 0.1).loss, z) for factor in (1, 3))
    assert torch.allclose(3 * once, thrice, rtol=1e-12)


def test_identical_images_and_collapsed_embeddings() -> None:
    z = torch.ones(12, 8, dtype=torch.float64, requires_grad=True)
    contrast = nt_xent(z, 0.1)
    assert contrast.loss.item() == pytest.approx(math.log(11))
    assert contrast.positive.item() == pytest.approx(1) and contrast.top1.item() == 1
    (gradient,) = torch.autograd.grad(contrast.loss, z)
    assert gradient.isfinite().all() and gradient.abs().max() < 1e-12


def test_perfect_views_are_found_and_random_ones_are_not() -> None:
    half = embeddings(64, 32).detach()
    assert nt_xent(torch.cat([half, half]), 0.1).top1 == 1
    assert nt_xent(torch.cat([half, embeddings(64, 32, seed=1).detach()]), 0.1).top1 < 0.2


@pytest.mark.parametrize("temperature", [0.03, 0.1])
def test_float32_is_accurate_and_finite(temperature: float) -> None:
    # Views that agree in part, among neighbours that are close too: with a gradient that has not vanished.
    z = embeddings(256, 8)
    near = torch.cat([z[:128], z[:128] + 0.5 * z[128:]]).detach()
    exact, single = (near.clone().to(kind).requires_grad_() for kind in (torch.float64, torch.float32))
    (expected,) = torch.autograd.grad(reference(exact, temperature), exact)
    (gradient,) = torch.autograd.grad(nt_xent(single, temperature).loss, single)
    assert (gradient - expected).norm() / expected.norm() < 1e-4


def test_half_precision_input_is_computed_in_float32() -> None:
    z = embeddings(32).detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        contrast = nt_xent(z, 0.1)
    assert contrast.loss.dtype == torch.float32
    assert abs(contrast.loss - reference(z.double(), 0.1)) < 1e-5
    (gradient,) = torch.autograd.grad(contrast.loss, z)
    assert gradient.dtype == torch.bfloat16


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="got 3 rows"):
        nt_xent(torch.ones(3, 2), 0.1)
    for temperature in (0.0, 0.01, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            nt_xent(torch.ones(4, 2), temperature)


def weight_gradient(rank: int, images: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One rank of a linear model: mean over ranks of loss and of the weight's gradient, and the share of top-1."""
    world = dist.get_world_size()
    weight = weight.clone().requires_grad_()
    own = torch.cat([view.chunk(world)[rank] for view in images.chunk(2)])
    contrast = nt_xent(own @ weight, 0.1, tile=5)
    contrast.loss.backward()
    assert weight.grad is not None
    averaged = [contrast.loss.detach(), weight.grad, contrast.top1]
    for value in averaged:
        dist.all_reduce(value)
    return averaged[0] / world, averaged[1] / world, averaged[2] / world


@pytest.mark.parametrize("world", [2, 4])
def test_the_mean_over_processes_is_the_gradient_of_one(world: int, tmp_path: Path) -> None:
    images, weight = embeddings(16, 12).detach(), embeddings(12, 6, seed=1).detach()
    whole = weight.clone().requires_grad_()
    loss = reference(images @ whole, 0.1)
    (gradient,) = torch.autograd.grad(loss, whole)
    for shared_loss, shared_gradient, top1 in run_ranks(weight_gradient, world, tmp_path, images, weight):
        assert abs(shared_loss - loss) < 1e-12
        assert (shared_gradient - gradient).norm() / gradient.norm() < 1e-10
        assert top1 == pytest.approx(nt_xent(images @ weight, 0.1).top1)
