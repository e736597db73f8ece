"""Memory that an image takes is known before there is a device."""

import pytest
import torch

from simclr_dali.model.resnet import ResNet
from simclr_dali.model.simclr import Architecture, SimCLR
from simclr_dali.train.footprint import bytes_per_image

PROJECTOR = (2048, 128)


def test_a_resnet_50_takes_what_an_h200_was_seen_to_take() -> None:
    """Peaks of a whole step with 128, 256 and 512 images were 11.8, 23.1 and 45.9 GB."""
    found = bytes_per_image(Architecture(ResNet("resnet50", 1.0, "7x7"), PROJECTOR), 224, autocast=True)
    assert found == pytest.approx((45.9e9 - 11.8e9) / (512 - 128), rel=0.1)


@pytest.mark.parametrize("size", [32, 64])
def test_it_is_what_a_real_forward_pass_keeps(size: int) -> None:
    architecture = Architecture(ResNet("resnet18", 0.25, "3x3"), (16, 8))
    model, held = SimCLR(architecture), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(8, 3, size, size))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = sum(storage.nbytes() for address, storage in held.items() if address not in weights)
    assert bytes_per_image(architecture, size, autocast=False) == pytest.approx(kept / 4, rel=0.01)


def test_half_precision_wider_networks_and_larger_views() -> None:
    def of(width: float, size: int, *, autocast: bool) -> int:
        return bytes_per_image(Architecture(ResNet("resnet18", width, "7x7"), (16, 8)), size, autocast=autocast)

    plain = of(0.5, 64, autocast=False)
    assert 0.45 < of(0.5, 64, autocast=True) / plain < 0.7
    assert of(1.0, 64, autocast=False) / plain == pytest.approx(2, rel=0.1)
    assert of(0.5, 128, autocast=False) / plain == pytest.approx(4, rel=0.05)
