"""The number of processes and micro-batches does not change a step: BatchNorm, NT-Xent, DeepSpeed's average, LARS."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simclr_dali.model.batchnorm import synchronised
from simclr_dali.model.ntxent import NTXent
from simclr_dali.model.process import Process
from simclr_dali.model.resnet import ResNet
from simclr_dali.model.schedule import learning_rate
from simclr_dali.model.simclr import Architecture, build_model
from simclr_dali.train.config import Config
from simclr_dali.train.engine import build_engine, build_optimizer, import_deepspeed
from simclr_dali.train.step import train_step
from tests.conftest import run_ranks
from tests.runs import TINY

pytestmark = pytest.mark.launch

BATCH = 16


def some_views(steps: int) -> Tensor:
    """[steps, view, image, 3, 32, 32] for all ranks."""
    return torch.randn(steps, 2, BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def start() -> Tensor:
    return flat(build_model(Architecture(ResNet("resnet18", 0.125, "7x7"), (32, 16)), 0))


def configured(world: int, passes: int, settings: dict[str, Any]) -> Config:
    raw = {**TINY, "train_micro_batch_size_per_gpu": BATCH // world // passes}
    raw["simclr"] = {**TINY["simclr"], "data": "unused", **settings}
    return Config.model_validate(raw)


def train_fixed(rank: int, passes: int, settings: dict[str, Any], views: Tensor) -> Tensor:
    """Parameters after all steps. BatchNorm uses its running statistics: micro-batches then see what a batch sees."""
    world = torch.distributed.get_world_size()
    backend = settings.pop("backend", None)
    config = configured(world, passes, settings)
    model = build_model(config.architecture(), 0)
    if backend:  # as build_engine compiles it, by a backend that needs no compiler
        model.compile(backend=backend)
    engine, _ = build_engine(model, config, Process(rank, world, world, torch.device("cpu"), 1))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    for own in views.chunk(world, dim=2)[rank]:
        parts = [part.flatten(0, 1) for part in own.chunk(passes, dim=1)]
        train_step(engine, parts, NTXent(config.simclr.temperature))
    return flat(model)


def train(rank: int, views: Tensor) -> dict[str, Tensor]:
    """Parameters after all steps with BatchNorm over all processes: as a run does it, and in float64 at full rate."""
    world = torch.distributed.get_world_size()
    config = configured(world, 1, {})
    process = Process(rank, world, world, torch.device("cpu"), 1)
    results = {}
    for precision in ("float32", "float64"):
        model = synchronised(build_model(config.architecture(), 0), process.device)
        if precision == "float32":
            engine, optimizer = build_engine(model, config, process)
        else:
            engine, optimizer = engine_in_float64(model.double(), config, world)
        for step, own in enumerate(views.chunk(world, dim=2)[rank].to(getattr(torch, precision))):
            if precision == "float32":
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, config.optimizer.params.lr, 100, 1000)
            train_step(engine, [own.flatten(0, 1)], NTXent(config.simclr.temperature))
        results[precision] = flat(model)
    return results


def engine_in_float64(model: nn.Module, config: Config, world: int) -> tuple[Any, torch.optim.Optimizer]:
    deepspeed = import_deepspeed(torch.device("cpu"))
    deepspeed.get_accelerator().supported_dtypes = lambda: [torch.float64]  # which it reduces, but does not list
    optimizer = build_optimizer(model, config)
    settings = {"train_micro_batch_size_per_gpu": BATCH // world, "gradient_clipping": 0.0}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    engine.communication_data_type = torch.float64
    return engine, optimizer


def start_apart(rank: int) -> tuple[Tensor, Tensor]:
    """Parameters and statistics of an engine whose ranks began with their own."""
    world = torch.distributed.get_world_size()
    config = configured(world, 1, {})
    model = build_model(config.architecture(), seed=rank)
    for buffer in model.buffers():
        buffer.fill_(rank + 1)
    build_engine(model, config, Process(rank, world, world, torch.device("cpu"), 1))
    return flat(model), torch.cat([buffer.float().flatten() for buffer in model.buffers()])


def test_all_ranks_start_from_the_weights_and_statistics_of_rank_0(tmp_path: Path) -> None:
    for parameters, statistics in run_ranks(start_apart, 2, tmp_path):
        assert torch.equal(parameters, start())
        assert torch.equal(statistics, torch.ones_like(statistics))


def test_any_split_into_processes_and_micro_batches_gives_the_same_step(tmp_path: Path) -> None:
    splits: list[tuple[int, int, dict[str, Any]]]
    splits = [(1, 1, {}), (1, 4, {}), (2, 1, {}), (2, 2, {}), (4, 2, {}), (1, 1, {"backend": "aot_eager"})]
    results = []
    for number, (world, passes, settings) in enumerate(splits):
        folder = tmp_path / str(number)
        folder.mkdir()
        ranks = run_ranks(train_fixed, world, folder, passes, settings, some_views(2))
        assert all(torch.equal(rank, ranks[0]) for rank in ranks)
        results.append(ranks[0])
    moved = (results[0] - start()).norm()
    assert moved > 0
    for split, result in zip(splits, results, strict=True):
        assert (result - results[0]).norm() < 1e-5 * moved, split


def test_twenty_steps_of_one_two_and_four_processes_give_the_same_parameters(tmp_path: Path) -> None:
    """In float32 during warm-up, as every run begins: at a full rate these networks amplify a rounding a millionfold in
    twenty steps. In float64 at the full rate, where that leaves the parameters equal all the same."""
    views = some_views(20)
    alone, *others = (run_ranks(train, world, tmp_path, views) for world in (1, 2, 4))
    for precision, least_move, tolerance in (("float32", 1e-2, 1e-5), ("float64", 0.1, 1e-10)):
        expected = alone[0][precision]
        assert (expected - start()).norm() > least_move * expected.norm()
        for ranks in others:
            assert all(torch.equal(rank[precision], ranks[0][precision]) for rank in ranks)
            assert (ranks[0][precision] - expected).norm() < tolerance * expected.norm(), precision
