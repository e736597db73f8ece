"""LARS against a literal transcription of the reference, step by step; groups; schedule."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from model.encoder import Architecture, build_model
from train.lars import LARS, parameter_groups
from train.schedule import LR_RULES, learning_rate


class Reference:
    """google-research/simclr, lars_optimizer.py, classic momentum, for one tensor."""

    def __init__(self, momentum: float, decay: float, eeta: float, adapt: bool) -> None:
        self.momentum, self.decay, self.eeta, self.adapt = momentum, decay, eeta, adapt
        self.v: Tensor | float = 0.0

    def step(self, param: Tensor, grad: Tensor, learning_rate: float) -> Tensor:
        grad = grad + self.decay * param
        trust_ratio = 1.0
        if self.adapt:
            w_norm, g_norm = param.norm(), grad.norm()
            trust_ratio = float(self.eeta * w_norm / g_norm) if w_norm > 0 and g_norm > 0 else 1.0
        self.v = self.momentum * self.v + learning_rate * trust_ratio * grad
        return param - self.v


def test_fifty_steps_equal_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # A zero weight, and from step 10 to 20 zero gradients, meet the cases where a norm is 0.
    weights = [nn.Parameter(randn(5, 3)), nn.Parameter(randn(7)), nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))]
    plain = [nn.Parameter(randn(6))]
    groups = [
        {"params": weights, "weight_decay": 0.01, "adapt": True},
        {"params": plain, "weight_decay": 0.0, "adapt": False},
    ]
    optimizer = LARS(groups, lr=0.0, momentum=0.9, trust_coefficient=0.02)
    references = [Reference(0.9, 0.01, 0.02, True) for _ in weights] + [Reference(0.9, 0.0, 0.02, False)]
    expected = [p.detach().clone() for p in (*weights, *plain)]
    for step in range(50):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * math.cos(step / 30)
        for number, parameter in enumerate((*weights, *plain)):
            zero = 10 <= step < 20 and number == 2
            parameter.grad = torch.zeros_like(parameter) if zero else randn(*parameter.shape)
            expected[number] = references[number].step(expected[number], parameter.grad, 0.5 * math.cos(step / 30))
        optimizer.step()
        for parameter, wanted in zip((*weights, *plain), expected, strict=True):
            assert (parameter - wanted).abs().max() <= 1e-13 * (1 + wanted.abs().max())


def test_biases_and_batchnorm_get_neither_decay_nor_adaptation() -> None:
    model = build_model(Architecture("resnet18", 0.25, "7x7", (32, 8)), 0)
    weights, plain = parameter_groups(model, 1e-4)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert weights["weight_decay"] == 1e-4 and weights["adapt"]
    assert plain["weight_decay"] == 0 and not plain["adapt"]
    assert all(parameter.dim() > 1 for parameter in weights["params"])
    assert all(parameter.dim() == 1 for parameter in plain["params"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {names[id(p)] for p in (*weights["params"], *plain["params"])} == trained
    # The last BatchNorm of the projector has no shift.
    assert set(names.values()) - trained == {"projector.4.bias"}


def test_state_survives_a_checkpoint() -> None:
    def make() -> tuple[nn.Parameter, LARS]:
        parameter = nn.Parameter(torch.arange(6, dtype=torch.float64).reshape(2, 3) + 1)
        return parameter, LARS([parameter], lr=0.1, trust_coefficient=0.1)

    def step(parameter: nn.Parameter, optimizer: LARS) -> None:
        parameter.grad = parameter.detach().sin()
        optimizer.step()

    p, optimizer = make()
    step(p, optimizer)
    q, resumed = make()
    with torch.no_grad():
        q.copy_(p)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(p, optimizer)
    step(q, resumed)
    assert torch.equal(p, q)


def test_schedule_is_exact_at_its_corners() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, 4.8, 100, 1100)

    assert rate(0) == 0 and rate(50) == pytest.approx(2.4) and rate(99) == pytest.approx(4.8 * 0.99)
    assert rate(100) == 4.8 and rate(600) == pytest.approx(2.4) and rate(1100) == pytest.approx(0, abs=1e-12)
    assert learning_rate(0, 1.0, 0, 10) == 1.0


def test_rules_give_the_papers_rate_at_4096() -> None:
    assert LR_RULES["linear"](4096) == pytest.approx(4.8) and LR_RULES["sqrt"](4096) == pytest.approx(4.8)
