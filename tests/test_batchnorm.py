"""BatchNorm over processes: what it computes, and that a compiler traces it whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_dali.model.batchnorm import SyncBatchNorm, synchronised
from tests.conftest import run_ranks

CPU = torch.device("cpu")


def small_network() -> nn.Sequential:
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5),
    )  # fmt: skip
    for parameter in network.parameters():  # scales and shifts that matter
        nn.init.normal_(parameter, 0.5)
    return network.double()


def some_batch() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 3, 9, 9, dtype=torch.float64) * 3 + 5, torch.randn(12, 5, dtype=torch.float64)


def train_twice(network: Any, module: nn.Module, images: Tensor, targets: Tensor, count: int) -> list[Tensor]:
    """The last output, gradients of the loss of these of ``count`` images, and the buffers after two passes."""
    for _ in range(2):
        module.zero_grad()
        output = network(images)
        (((output - targets) ** 2).sum() / count).backward()
    gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return [output.detach(), *gradients, *(buffer.double().clone() for buffer in module.buffers())]


class Collectives(TorchDispatchMode):
    """Counts what ranks send each other, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function).startswith("_c10d_functional.all_"):
            self.seen.append(str(function).split(".")[1])
        return function(*args, **(kwargs or {}))


def train_rank(rank: int, images: Tensor, targets: Tensor, cuts: list[int], backend: str | None) -> dict[str, Any]:
    network = synchronised(small_network(), CPU)
    types = [type(module).__name__ for module in network.modules()]
    own = slice(cuts[rank], cuts[rank + 1])
    counters = torch._dynamo.utils.counters
    called: Any = torch.compile(network, backend=backend, dynamic=False) if backend else network
    values = train_twice(called, network, images[own], targets[own], len(images))
    graphs, breaks = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
    with Collectives() as collectives:
        output = network(images[own])
        forward = list(collectives.seen)
        output.sum().backward()
    return {
        "values": values,
        "types": types,
        "graphs": graphs,
        "breaks": breaks,
        "forward": forward,
        "backward": collectives.seen[len(forward) :],
    }


@pytest.mark.parametrize(
    ("cuts", "backend"),
    [
        ([0, 12], None),
        ([0, 6, 12], None),
        ([0, 4, 12], None),
        ([0, 3, 5, 11, 12], None),
        ([0, 4, 12], "aot_eager"),
        ([0, 3, 6, 9, 12], "aot_eager"),
        ([0, 4, 12], "inductor"),
    ],
)
def test_processes_equal_one(cuts: list[int], backend: str | None, tmp_path: Path) -> None:
    """Even and uneven parts of a batch: gradients add up to, and buffers are, those of the whole batch."""
    images, targets = some_batch()
    network, world = small_network(), len(cuts) - 1
    output, *expected = train_twice(network, network, images, targets, len(images))
    ranks = run_ranks(train_rank, world, tmp_path, images, targets, cuts, backend)
    together = torch.cat([rank["values"][0] for rank in ranks])
    assert (together - output).abs().max() < 1e-10 * output.abs().max()
    count = len(list(network.parameters()))
    for number, wanted in enumerate(expected):
        parts = [rank["values"][1 + number] for rank in ranks]
        if number >= count:
            assert all(torch.equal(part, parts[0]) for part in parts)
        got = sum(parts) if number < count else parts[0]
        assert (got - wanted).abs().max() < 1e-10 * (1 + wanted.abs().max())
    for rank in ranks:
        assert rank["types"].count("SyncBatchNorm") == (3 if world > 1 else 0)
        assert rank["graphs"] == bool(backend) and not rank["breaks"]
        assert len(rank["forward"]) == len(rank["backward"]) == (3 if world > 1 else 0)


def half_precision(rank: int, images: Tensor) -> list[Tensor]:
    """Output, gradient and running variance of a layer whose input is in bfloat16."""
    world = dist.get_world_size()
    layer: Any = synchronised(nn.Sequential(nn.BatchNorm2d(images.shape[1])), CPU)[0]
    x = images.chunk(world)[rank].bfloat16().requires_grad_()
    y = layer(x)
    (y.float() ** 3).sum().backward()
    assert x.grad is not None and y.dtype == x.grad.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == layer.running_var.dtype == torch.float32
    return [y.detach().double(), x.grad.double(), layer.running_var]


def test_statistics_of_bfloat16_are_float32(tmp_path: Path) -> None:
    """Values whose mean is 1,000 times their deviation: sums in bfloat16, or of squares in float32, would lose them."""
    images = torch.randn(16, 3, 8, 8, dtype=torch.float64) * 2
    images[:, 1] += 200
    images = images.bfloat16().double()
    layer = nn.BatchNorm2d(3).double()
    x = images.clone().requires_grad_()
    y = layer(x)
    (y**3).sum().backward()
    assert x.grad is not None
    ranks = run_ranks(half_precision, 2, tmp_path, images)
    outputs, gradients = (torch.cat([rank[number] for rank in ranks]) for number in range(2))
    assert (outputs - y).abs().max() < 2**-8 * y.abs().max()
    assert (gradients - x.grad).norm() < 0.02 * x.grad.norm()
    assert layer.running_var is not None and torch.allclose(ranks[0][2].double(), layer.running_var, rtol=1e-5)


def alone(rank: int) -> bool:
    ours, theirs = SyncBatchNorm(nn.BatchNorm2d(4), "0"), nn.BatchNorm2d(4)
    images = torch.randn(3, 4, 5, 5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.allclose(ours(images), theirs(images), atol=1e-6)
    assert torch.allclose(ours.eval()(images), theirs.eval()(images), atol=1e-6)
    return True


def test_one_process_of_it_is_batchnorm_and_one_process_needs_none(tmp_path: Path) -> None:
    assert run_ranks(alone, 1, tmp_path) == [True]
    network = small_network()
    assert synchronised(network, CPU) is network and type(network[1]) is nn.BatchNorm2d
