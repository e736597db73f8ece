"""Encoders and projector."""

from typing import Any

import pytest
import torch
from torch import nn

from simclr_dali.model.resnet import ResNet
from simclr_dali.model.selective_kernels import SelectiveKernel
from simclr_dali.model.simclr import Architecture, build_model, build_projector, describe
from simclr_dali.model.vision import resnet


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_encoders_take_torchvisions_weights(name: str) -> None:
    theirs = getattr(resnet, name)()
    ours = ResNet(name, 1.0, "7x7").build()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing and set(unexpected) == {"fc.weight", "fc.bias"}
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize("width", [0.25, 0.5, 2.0])
def test_width_scales_every_layer(width: float) -> None:
    architecture = Architecture(ResNet("resnet18", width, "3x3"), (8,))
    encoder = architecture.encoder.build()
    plain = dict(ResNet("resnet18", 1.0, "3x3").build().named_parameters())
    assert encoder.width == round(512 * width)
    assert encoder(torch.randn(1, 3, 32, 32)).shape == (1, round(512 * width))
    for name, parameter in encoder.named_parameters():
        assert parameter.shape[0] == round(plain[name].shape[0] * width)


def test_stem_3x3_keeps_the_resolution() -> None:
    encoder = ResNet("resnet18", 1.0, "3x3").build()
    shapes = []
    encoder.layer1.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    encoder(torch.randn(1, 3, 32, 32))
    assert shapes[0][2:] == (32, 32)


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_the_last_batchnorm_of_each_block_starts_at_zero(name: str, last: str) -> None:
    for width in (0.5, 1.0):
        encoder = ResNet(name, width, "7x7").build()
        weights: list[torch.Tensor] = [
            p for key, p in encoder.named_parameters() if key.endswith(f"{last}.weight") and "layer" in key
        ]
        assert len(weights) in (8, 16) and not torch.cat(weights).any()


def test_projector_has_no_linear_bias_and_no_shift_at_its_end() -> None:
    projector = build_projector(16, (32, 32, 8))
    assert [type(layer).__name__ for layer in projector] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + [
        "Linear",
        "BatchNorm1d",
    ]
    assert all(layer.bias is None for layer in projector if isinstance(layer, nn.Linear))
    last = projector[-1]
    assert isinstance(last, nn.BatchNorm1d) and not last.bias.requires_grad and not last.bias.any()


# Millions of parameters by (name, width): google-research/simclr, README.md, table of SimCLRv2's models.
@pytest.mark.parametrize(
    ("name", "width", "plain", "selective"),
    [("resnet50", 1, 24, 35), ("resnet50", 2, 94, 140), ("resnet101", 1, 43, 65), ("resnet152", 1, 58, 89)],
)
def test_encoders_are_as_large_as_simclrv2s(name: str, width: float, plain: int, selective: int) -> None:
    for with_selective_kernels, expected in ((False, plain), (True, selective)):
        with torch.device("meta"):
            encoder = ResNet(name, width, "7x7", with_selective_kernels).build()
        assert round(sum(p.numel() for p in encoder.parameters()) / 1e6) == expected


def test_a_selective_kernel_mixes_two_streams_by_a_softmax() -> None:
    """tf2/resnet.py, SK_Conv2D, written out with its stack and softmax over streams."""
    kernel = SelectiveKernel(6, 4, 2).eval()
    assert kernel.mix1.out_channels == 32
    images = torch.randn(3, 6, 9, 9)
    streams = torch.stack(kernel.bn(kernel.conv(images)).relu().split(4, dim=1))
    pooled = streams.sum(0).mean((2, 3), keepdim=True)
    logits = torch.stack(kernel.mix2(kernel.mix_bn(kernel.mix1(pooled)).relu()).split(4, dim=1))
    expected = (streams * logits.softmax(0)).sum(0)
    assert torch.allclose(kernel(images), expected, atol=1e-6)


@pytest.mark.parametrize("stem", ["7x7", "3x3"])
def test_encoders_with_selective_kernels_train(stem: Any) -> None:
    architecture = Architecture(ResNet("resnet50", 0.25, stem, selective_kernels=True), (16, 8))
    model = build_model(architecture, 0)
    z = model(torch.randn(4, 3, 33, 33))
    assert z.shape == (4, 8)
    z.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    # Shortcuts average instead of dropping three of four pixels; a pool of stride 1 keeps a constant picture.
    shortcut = model.encoder.layer1[0].downsample
    assert torch.allclose(shortcut[0](torch.ones(1, 2, 5, 5)), torch.ones(1, 2, 5, 5))
    assert model.encoder.layer2[0].downsample[0](torch.ones(1, 2, 5, 5)).shape[2:] == (3, 3)


def test_the_seed_alone_decides_the_weights() -> None:
    architecture = Architecture(ResNet("resnet18", 0.25, "7x7"), (16, 8))
    state = torch.random.get_rng_state()
    first, again, other = (build_model(architecture, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["encoder.conv1.weight"], other["encoder.conv1.weight"])


def test_unknown_architectures_are_refused() -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("resnet20", {}),
        ("resnet18", {"stem": "5x5"}),
        ("resnet18", {"width": 0.3}),
        ("resnet34", {"selective_kernels": True}),
        ("resnet18", {"depth": 18}),
    ]
    for name, fields in wrong:
        with pytest.raises(ValueError, match=r"resnet20|5x5|0\.3|resnet34|depth"):
            describe(name, fields)
