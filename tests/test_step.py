"""Gradient caching: micro-batches with the whole global batch as negatives."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.encoder import Architecture, build_model
from train.step import train_step


class PlainEngine:
    """What train_step uses of DeepSpeed's engine, for one process: gradients add up until the last micro-batch."""

    def __init__(self, module: nn.Module, passes: int) -> None:
        self.module, self.passes, self.calls = module, passes, 0
        self.optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

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
    model = build_model(Architecture("resnet18", 0.25, "7x7", (16, 8)), 0).double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            nn.init.ones_(module.weight)
    return model


@pytest.mark.parametrize("passes", [2, 4, 8])
def test_micro_batches_equal_one_batch_when_batchnorm_is_fixed(passes: int) -> None:
    model = model_with_fixed_statistics()
    views = torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)
    whole, parts = PlainEngine(copy.deepcopy(model), 1), PlainEngine(copy.deepcopy(model), passes)
    for _ in range(2):
        one = train_step(whole, [views.flatten(0, 1)], 0.1)
        many = train_step(parts, [part.flatten(0, 1) for part in views.chunk(passes, dim=1)], 0.1)
        assert abs(one.loss - many.loss) < 1e-10
    for a, b in zip(whole.module.parameters(), parts.module.parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-10 * (1 + a.abs().max())


def test_running_statistics_count_each_micro_batch_once() -> None:
    architecture = Architecture("resnet18", 0.25, "7x7", (16, 8))
    cached, plain = build_model(architecture, 0), build_model(architecture, 0)
    parts = [torch.randn(8, 3, 32, 32) for _ in range(3)]
    engine = PlainEngine(cached, 3)
    engine.optimizer = torch.optim.SGD(cached.parameters(), lr=0.0)
    train_step(engine, parts, 0.1)
    for part in parts:
        plain(part)
    for (name, a), b in zip(cached.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-7), name
    momenta = {m.momentum for m in cached.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert momenta == {0.1}
