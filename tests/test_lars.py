"""LARS against a literal transcription of the reference, step by step; groups; schedule."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simclr_dali.model.lars import LARS, parameter_groups
from simclr_dali.model.resnet import ResNet
from simclr_dali.model.schedule import learning_rate
from simclr_dali.model.simclr import Architecture, build_model
from simclr_dali.train.config import LR_RULES, Config
from simclr_dali.train.engine import build_optimizer


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

    # A zero weight, and from step 10 to 20 zero gradients, also without decay, meet the cases where a norm is 0.
    weights = [nn.Parameter(randn(5, 3)), nn.Parameter(randn(7)), nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))]
    undecayed, plain = [nn.Parameter(randn(2, 3))], [nn.Parameter(randn(6))]
    groups = [
        {"params": weights, "weight_decay": 0.01, "adapt": True},
        {"params": undecayed, "weight_decay": 0.0, "adapt": True},
        {"params": plain, "weight_decay": 0.0, "adapt": False},
    ]
    optimizer = LARS(groups, lr=0.0, momentum=0.9, trust_coefficient=0.02)
    references = [Reference(0.9, 0.01, 0.02, True) for _ in weights]
    references += [Reference(0.9, 0.0, 0.02, True), Reference(0.9, 0.0, 0.02, False)]
    everything = (*weights, *undecayed, *plain)
    expected = [p.detach().clone() for p in everything]
    for step in range(50):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * math.cos(step / 30)
        for number, parameter in enumerate(everything):
            zero = 10 <= step < 20 and number in (2, 3)
            parameter.grad = torch.zeros_like(parameter) if zero else randn(*parameter.shape)
            expected[number] = references[number].step(expected[number], parameter.grad, 0.5 * math.cos(step / 30))
        optimizer.step()
        for parameter, wanted in zip(everything, expected, strict=True):
            assert (parameter - wanted).abs().max() <= 1e-13 * (1 + wanted.abs().max())


def mmpretrain_step(
    param: Tensor, grad: Tensor, lr: float, decay: float, buffer: Tensor | None
) -> tuple[Tensor, Tensor]:
    """mmpretrain, engine/optimizers/lars.py, with momentum 0.9: its trust ratio has |g| + decay |w| + 1e-8 below."""
    w_norm, g_norm = float(param.norm()), float(grad.norm())
    trust = 0.001 * w_norm / (g_norm + decay * w_norm + 1e-8) if w_norm != 0 and g_norm != 0 else 1.0
    update = (grad + decay * param) * (trust * lr)
    buffer = update if buffer is None else 0.9 * buffer + update
    return param - buffer, buffer


@pytest.mark.parametrize(("decay", "tolerance"), [(0.0, 1e-7), (1e-6, 1e-4), (0.1, None)])
def test_mmpretrains_rule_differs_by_the_decay_in_the_norm_only(decay: float, tolerance: float | None) -> None:
    """|g + decay w| here and in the reference, |g| + decay |w| there: one without decay, and close at the paper's 1e-6.

    The difference is of the order decay |w| / |g|. With a decay that matters theirs takes smaller steps.
    """
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(8, 5, generator=generator, dtype=torch.float64))
    start = weight.detach().clone()
    theirs, buffer = start.clone(), None
    optimizer = LARS([weight], lr=4.8, momentum=0.9, weight_decay=decay)
    for _ in range(20):
        weight.grad = 0.1 * torch.randn(8, 5, generator=generator, dtype=torch.float64)
        theirs, buffer = mmpretrain_step(theirs, weight.grad, 4.8, decay, buffer)
        optimizer.step()
    difference = (weight - theirs).norm() / (weight - start).norm()
    if tolerance is not None:
        assert difference < tolerance
    else:
        assert difference > 1e-2
        assert (theirs - start).norm() < (weight - start).norm()


def test_biases_and_batchnorm_get_neither_decay_nor_adaptation() -> None:
    model = build_model(Architecture(ResNet("resnet18", 0.25, "7x7"), (32, 8)), 0)
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


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("LARS", {"lr": 0.3, "weight_decay": 0.25, "trust_coefficient": 0.5, "momentum": 0.5}),
        ("SGD", {"lr": 0.3, "weight_decay": 0.25, "momentum": 0.5, "nesterov": True}),
        ("AdamW", {"lr": 0.3, "weight_decay": 0.25, "betas": [0.5, 0.75], "eps": 1e-3}),
    ],
)
def test_the_named_optimizer_is_built_as_configured(name: str, params: dict[str, Any]) -> None:
    raw = {
        "train_batch_size": 64,
        "optimizer": {"type": name, "params": params},
        "simclr": {"lr_rule": "none", "data": "d"},
    }
    model = build_model(Architecture(ResNet("resnet18", 0.125, "7x7"), (32, 8)), 0)
    optimizer = build_optimizer(model, Config.model_validate(raw))
    weights, plain = optimizer.param_groups
    assert type(optimizer).__name__ == name
    assert plain["weight_decay"] == 0
    for key, value in params.items():
        assert weights[key] == (tuple(value) if isinstance(value, list) else value)
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # Without gradient, the decay alone moves; biases, BatchNorm and the frozen shift stay.
    decayed = {id(p) for p in weights["params"]}
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old) == (id(parameter) not in decayed)


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
    # Rising up to the peak, falling after it, without a jump.
    rates = [rate(step) for step in range(1101)]
    assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= 4.8 / 100 + 1e-12


def test_rules_give_the_papers_rate_at_4096() -> None:
    assert LR_RULES["linear"](4096) == pytest.approx(4.8) and LR_RULES["sqrt"](4096) == pytest.approx(4.8)
