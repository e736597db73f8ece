"""NT-Xent against its definition: value, gradient, tiles, temperatures, precision, several processes."""

import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_dali.model.ntxent import SMALLEST_TEMPERATURE, nt_xent


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


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e20, 1e30])
def test_rows_of_any_norm_have_the_loss_and_gradient_of_their_directions(scale: float) -> None:
    """Squares of these overflow float32, or vanish in it."""
    z = embeddings(10).detach().float()
    whole, scaled = z.clone().requires_grad_(), (z * scale).requires_grad_()
    losses = nt_xent(whole, 0.1).loss, nt_xent(scaled, 0.1).loss
    (gradient,), (of_scaled,) = (torch.autograd.grad(loss, x) for loss, x in zip(losses, (whole, scaled), strict=True))
    assert torch.allclose(*losses, rtol=1e-5)
    assert gradient.abs().max() > 0.01 and torch.allclose(gradient, of_scaled * scale, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-200, 1e-60, 1e200, 1e300])
def test_rows_of_any_norm_of_float64_have_the_loss_of_their_directions(scale: float) -> None:
    z = embeddings(10).detach()
    assert torch.allclose(nt_xent(z * scale, 0.1).loss, nt_xent(z, 0.1).loss, rtol=1e-12)


def test_scaled_loss_has_a_scaled_gradient() -> None:
    z = embeddings(10)
    (once,), (thrice,) = (torch.autograd.grad(factor * nt_xent(z, 0.1).loss, z) for factor in (1, 3))
    assert torch.allclose(3 * once, thrice, rtol=1e-12)


def test_identical_images_and_collapsed_embeddings() -> None:
    z = torch.ones(12, 8, dtype=torch.float64, requires_grad=True)
    contrast = nt_xent(z, 0.1)
    assert contrast.loss.item() == pytest.approx(math.log(11))
    assert contrast.positive.item() == pytest.approx(1) and contrast.top1.item() == 0
    (gradient,) = torch.autograd.grad(contrast.loss, z)
    assert gradient.isfinite().all() and gradient.abs().max() < 1e-12


def test_perfect_views_are_found_and_random_ones_are_not() -> None:
    half = embeddings(64, 32).detach()
    assert nt_xent(torch.cat([half, half]), 0.1).top1 == 1
    assert nt_xent(torch.cat([half, embeddings(64, 32, seed=1).detach()]), 0.1).top1 < 0.2


def test_opposed_views_at_the_smallest_temperature_stay_finite_in_float32() -> None:
    z = torch.tensor([[1.0, 0.0], [1.0, 1e-3], [-1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    exact = z.detach().double().requires_grad_()
    loss, expected = nt_xent(z, SMALLEST_TEMPERATURE).loss, reference(exact, SMALLEST_TEMPERATURE)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,), (expected_gradient,) = torch.autograd.grad(loss, z), torch.autograd.grad(expected, exact)
    assert (gradient - expected_gradient).norm() < 1e-4 * expected_gradient.norm()


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


def test_a_small_loss_keeps_its_digits() -> None:
    """Views that agree wholly, far from all others: float32 has no digits left of lse - s where both are near 20."""
    z = torch.cat([torch.eye(8), torch.eye(8)])
    exact = math.log1p(14 * math.exp(-1 / 0.05))
    assert nt_xent(z, 0.05).loss.item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("tile", [5, 4096])
def test_metrics_are_what_they_say(tile: int) -> None:
    z, temperature = embeddings(20).detach(), 0.2
    unit = F.normalize(z, dim=1)
    cosine = unit @ unit.T
    image = torch.arange(20) % 10
    negative = image[:, None] != image
    partner = torch.arange(20).roll(10)
    contrast = nt_xent(z, temperature, tile)
    positive, hardest = cosine[torch.arange(20), partner], cosine.masked_fill(~negative, -2).amax(1)
    assert contrast.positive.item() == pytest.approx(positive.mean().item(), abs=1e-12)
    assert contrast.hardest_negative.item() == pytest.approx(hardest.mean().item(), abs=1e-12)
    assert contrast.top1.item() == pytest.approx((positive > hardest).double().mean().item(), abs=1e-12)
    # Wang and Isola 2020: uniformity is the logarithm of the mean of exp(-t |x - y|^2); here t = 1 / (2 tau).
    distances = torch.cdist(unit, unit).square()[negative]
    assert contrast.potential.item() == pytest.approx((-distances / (2 * temperature)).exp().mean().item(), abs=1e-12)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all memory that operations have returned and somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.now -= count


@pytest.mark.parametrize("rows", [256, 2048])
def test_memory_is_the_embeddings_and_two_tiles(rows: int) -> None:
    tile, embedding_bytes = 64, rows * 16 * 8
    with LiveBytes() as live:
        z = embeddings(rows)
        nt_xent(z, 0.1, tile).loss.backward()
    tiles = 2 * tile * tile * 8
    # z, its unit rows, scaled rows, two gradients and the one they become, and a dozen numbers a row beside them.
    assert tiles + embedding_bytes < live.peak < 1.5 * tiles + 8 * embedding_bytes


def test_bad_arguments_are_refused() -> None:
    for rows in (2, 3):
        with pytest.raises(ValueError, match=f"got {rows} rows"):
            nt_xent(torch.ones(rows, 2), 0.1)
    for temperature in (0.0, 0.01, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            nt_xent(torch.ones(4, 2), temperature)
