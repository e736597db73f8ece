"""Gradients are the mean over ranks, and leave while the backward pass still runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from simclr_dali.model.resnet import ResNet
from simclr_dali.model.simclr import Architecture, build_model
from simclr_dali.train import reduction
from simclr_dali.train.reduction import GradientReduction
from tests.conftest import run_ranks


class Logged(GradientReduction):
    """Notes what happens in which order: a gradient comes, a bucket leaves, all is waited for."""

    def __init__(self, model: nn.Module, passes: int) -> None:
        self.log: list[str] = []
        super().__init__(model, passes)

    def _arrived(self, parameter: Tensor) -> None:
        self.log.append("gradient")
        super()._arrived(parameter)

    def _send(self, bucket: Any) -> None:
        self.log.append("bucket")
        super()._send(bucket)

    def finish(self) -> None:
        self.log.append("wait")
        super().finish()


class Layers(nn.Module):
    """Three layers, the last of which some steps leave out, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList([nn.Linear(64, 64, dtype=torch.float64) for _ in range(3)])
        self.spare = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        for layer in list(self.layers)[:depth]:
            x = torch.tanh(layer(x))
        return x


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def backward(model: nn.Module, parts: list[Tensor], depth: int) -> list[Tensor | None]:
    for part in parts:
        (model(part, depth) ** 2).sum().backward()
    return gradients(model)


def compare(rank: int, passes: int, x: Tensor) -> list[str]:
    """Three steps against the mean of what each rank has by itself; what happened in the first of them."""
    reduction.BUCKET_BYTES = 20_000  # less than a layer
    world = dist.get_world_size()
    plain, reduced = Layers(), Layers()
    logged = Logged(reduced, passes)
    parts = list(x.chunk(world)[rank].chunk(passes))
    first: list[str] = []
    for depth in (3, 2, 3):
        expected = backward(plain, parts, depth)
        found = backward(reduced, parts, depth)
        first = first or list(logged.log)
        for mean, got in zip(expected, found, strict=True):
            assert (mean is None) == (got is None)
            if mean is not None and got is not None:
                dist.all_reduce(mean)
                assert torch.allclose(got, mean / world, rtol=1e-12, atol=0)
        for model in (plain, reduced):
            model.zero_grad()
    return first


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_gradients_are_the_mean_and_leave_in_the_last_pass(world: int, passes: int, tmp_path: Path) -> None:
    x = torch.randn(world * passes * 4, 64, dtype=torch.float64)
    for log in run_ranks(compare, world, tmp_path, passes, x):
        before_the_last_pass = 6 * (passes - 1)
        assert log[:before_the_last_pass] == ["gradient"] * before_the_last_pass
        # Weight and bias of a layer come together, and go before those of the layer below come. The parameter that
        # is never used goes with what is left.
        assert log[before_the_last_pass:] == ["gradient", "gradient", "bucket"] * 3 + ["wait", "bucket"]


def used_by_some(rank: int) -> str:
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 5)])
    GradientReduction(model, 1)
    x = torch.ones(2, 3)
    y = model[0](x).sum() + (model[1](x).sum() if rank == 0 else 0.0)
    try:
        y.backward()
    except ValueError as error:
        return str(error)
    return ""


def test_a_parameter_that_some_ranks_do_not_use_is_refused(tmp_path: Path) -> None:
    for told in run_ranks(used_by_some, 2, tmp_path):
        assert told.startswith("a parameter of shape (5") and "on 1 of 2 ranks" in told


def compiled_in_two(rank: int) -> list[str]:
    reduction.BUCKET_BYTES = 100_000
    model = build_model(Architecture(ResNet("resnet18", 0.125, "7x7"), (32, 16)), 0)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    logged = Logged(model, 1)
    for part in ("early", "late"):
        setattr(model, part, torch.compile(getattr(model, part), backend="aot_eager", dynamic=False))
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad.stride() == p.stride() for p in model.parameters() if p.grad is not None)
    return logged.log


def test_a_network_compiled_in_two_parts_sends_those_of_its_last_before_those_of_its_first_are_there(
    tmp_path: Path,
) -> None:
    for log in run_ranks(compiled_in_two, 2, tmp_path):
        first_bucket, last_gradient = log.index("bucket"), len(log) - 1 - log[::-1].index("gradient")
        assert log[-1] == "wait" and log.count("bucket") > 1
        assert log[first_bucket:last_gradient].count("gradient") > 30
