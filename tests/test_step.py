"""Gradient caching: micro-batches with the whole global batch as negatives."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_dali.model.ntxent import NTXent
from simclr_dali.model.resnet import ResNet
from simclr_dali.model.simclr import Architecture, build_model
from simclr_dali.train.config import Config
from simclr_dali.train.engine import build_optimizer
from simclr_dali.train.micro_batches import MicroBatches
from simclr_dali.train.step import train_step


class PlainEngine:
    """What train_step uses of DeepSpeed's engine, for one process: gradients add up until the last micro-batch."""

    def __init__(self, module: nn.Module, passes: int) -> None:
        self.module, self.passes, self.calls = module, passes, 0
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def __call__(self, images: Tensor) -> Any:
        return self.module(images)

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
        (loss / self.passes if scale_wrt_gas else loss).backward()

    def step(self) -> None:
        self.calls += 1
        if self.calls % self.passes == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()


def model_with_fixed_statistics() -> nn.Module:
    """BatchNorm in eval mode: micro-batches then see what one batch sees."""
    model = build_model(Architecture(ResNet("resnet18", 0.25, "7x7"), (16, 8)), 0).double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            nn.init.ones_(module.weight)
    return model


class HostReads(TorchDispatchMode):
    """The operations by which Python learns a tensor's value or size that depends on values: each waits for a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(function) for name in self.WAITING):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("name", ["LARS", "SGD"])
def test_a_step_never_waits_for_a_value(name: str, passes: int) -> None:
    """AdamW is left out: torch's reads its step counters, which lie on the CPU on purpose."""
    raw = {"train_batch_size": 8, "optimizer": {"type": name, "params": {"lr": 0.1}}}
    raw["simclr"] = {"lr_rule": "none", "lanes": 8}
    model = build_model(Architecture(ResNet("resnet18", 0.25, "7x7"), (16, 8)), 0)
    engine = PlainEngine(model, passes)
    engine.optimizer = build_optimizer(model, Config.model_validate(raw))
    parts = [torch.randn(8, 3, 32, 32) for _ in range(passes)]
    train_step(engine, parts, NTXent(0.1))  # the state of the optimizer is made
    with HostReads() as reads:
        result = train_step(engine, parts, NTXent(0.1))
    assert not reads.seen
    with reads:
        result.gradient_norm.item()
    assert reads.seen == ["aten._local_scalar_dense.default"]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("name", "lr"), [("LARS", 2.0), ("SGD", 0.1), ("AdamW", 1e-3)])
def test_steps_on_one_batch_fit_it(name: str, lr: float, passes: int) -> None:
    """Two views each of 16 pictures of noise, as unlike as any two pictures: only learning makes pairs of them."""
    raw = {"train_batch_size": 16, "optimizer": {"type": name, "params": {"lr": lr}}}
    raw["simclr"] = {"lr_rule": "none", "lanes": 8}
    model = build_model(Architecture(ResNet("resnet18", 0.25, "7x7"), (16, 8)), 0)
    engine = PlainEngine(model, passes)
    engine.optimizer = build_optimizer(model, Config.model_validate(raw))
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    views = torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    parts = [part.flatten(0, 1) for part in views.chunk(passes, dim=1)]
    losses = [train_step(engine, parts, NTXent(0.5)).loss.item() for _ in range(40)]
    # Embeddings that tell nothing have log 31 = 3.43. Over two seeds, 3.74 and more became 1.86 and less.
    assert losses[0] > 3.4 and losses[-1] < 2.4


@pytest.mark.parametrize("passes", [2, 4, 8])
def test_micro_batches_equal_one_batch_when_batchnorm_is_fixed(passes: int) -> None:
    model = model_with_fixed_statistics()
    views = torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)
    whole, parts = PlainEngine(copy.deepcopy(model), 1), PlainEngine(copy.deepcopy(model), passes)
    for _ in range(2):
        one = train_step(whole, [views.flatten(0, 1)], NTXent(0.1))
        many = train_step(parts, [part.flatten(0, 1) for part in views.chunk(passes, dim=1)], NTXent(0.1))
        assert abs(one.loss - many.loss) < 1e-10
        assert abs(one.gradient_norm - many.gradient_norm) < 1e-10 * one.gradient_norm
    for a, b in zip(whole.module.parameters(), parts.module.parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-10 * (1 + a.abs().max())


def test_running_statistics_count_each_micro_batch_once() -> None:
    architecture = Architecture(ResNet("resnet18", 0.25, "7x7"), (16, 8))
    cached, plain = build_model(architecture, 0), build_model(architecture, 0)
    parts = [torch.randn(8, 3, 32, 32) for _ in range(3)]
    engine = PlainEngine(cached, 3)
    engine.optimizer = torch.optim.SGD(cached.parameters(), lr=0.0)
    train_step(engine, parts, NTXent(0.1))
    for part in parts:
        plain(part)
    for (name, a), b in zip(cached.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-7), name


def test_kept_views_come_from_the_loader_first_and_again_as_often_as_asked_for() -> None:
    taken = []

    def loader() -> Iterator[Tensor]:
        for number in range(6):
            taken.append(number)
            yield torch.tensor(float(number))

    stream, micro_batches = loader(), MicroBatches(torch.device("cpu"), 3)
    for step, expected in enumerate(([0, 1, 2], [3, 4, 5])):
        micro_batches.begin(stream)
        assert len(micro_batches) == 3
        for place, views in enumerate(micro_batches):
            assert float(views) == expected[place]
            assert len(taken) == 3 * step + place + 1  # none is asked for before it is needed
        assert micro_batches.waited() > 0 and micro_batches.waited() == 0
        for _ in range(2):
            assert [float(views) for views in micro_batches] == expected


def test_a_captured_model_gives_the_same_embeddings_from_one_graph() -> None:
    model = build_model(Architecture(ResNet("resnet18", 0.25, "7x7"), (16, 8)), 0)
    images = torch.randn(4, 3, 32, 32)
    expected = model(images)
    counters = torch._dynamo.utils.counters
    counters.clear()
    model.compile(backend="eager")
    assert torch.equal(model(images), expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert not any("_orig_mod" in key for key in model.state_dict())
