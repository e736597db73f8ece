"""The model of scaling: what it says a step sends is what real steps send, and its figures behave."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.bench.scaling import resnet50
from simclr_dali.model.ntxent import NTXent
from simclr_dali.model.process import Process
from simclr_dali.model.simclr import build_model
from simclr_dali.train.config import Config
from simclr_dali.train.engine import build_engine
from simclr_dali.train.scaling import (
    FLOAT,
    H200,
    NETWORKS,
    Model,
    all_gather,
    all_reduce,
    cures,
    efficiency,
    last_that_pays,
    of_network,
    step_of,
)
from simclr_dali.train.step import train_step
from tests.conftest import ROOT, run_python, run_ranks
from tests.runs import TINY

BATCH = 16
IB, ETHERNET = NETWORKS["InfiniBand"], NETWORKS["Ethernet"]


class Messages(TorchDispatchMode):
    """What a rank gives to collectives: kind and bytes of each, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith(("c10d.", "_c10d_functional.all")):
            kind = "gather" if "gather" in name else "reduce" if "reduce" in name else name
            given = args[1] if name.startswith("c10d._allgather_base") else args[0]
            self.seen.append((kind, sum(tensor.nbytes for tensor in (given if isinstance(given, list) else [given]))))
        return function(*args, **(kwargs or {}))


def sent_by_a_step(rank: int) -> tuple[list[tuple[str, int]], Model]:
    """Of the second step; the first also compares which gradients there are."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    raw = {**TINY, "train_micro_batch_size_per_gpu": BATCH // world}
    config = Config.model_validate({**raw, "simclr": {**TINY["simclr"], "data": "unused"}})
    network = build_model(config.architecture(), 0)
    model = of_network(network, config.architecture().projector[-1])
    engine, _ = build_engine(network, config, Process(rank, world, world, torch.device("cpu"), 1))
    views = torch.randn(2 * BATCH // world, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
    train_step(engine, [views], NTXent(0.1))
    with Messages() as messages:
        train_step(engine, [views], NTXent(0.1))
    return messages.seen, model


@pytest.mark.launch
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_sends_what_the_model_says(world: int, tmp_path: Path) -> None:
    for seen, model in run_ranks(sent_by_a_step, world, tmp_path):
        rows = 2 * BATCH // world
        norms = [("gather", (2 * channels + 1) * FLOAT) for channels in model.batchnorms]
        norms += [("reduce", 2 * channels * FLOAT) for channels in model.batchnorms]
        loss = [("gather", rows * model.embedding * FLOAT), ("gather", rows * FLOAT)]
        gradients = [("reduce", numbers * FLOAT) for numbers in model.buckets]
        assert sorted(seen) == (sorted(norms + loss + gradients) if world > 1 else [])
    assert sum(model.buckets) == model.gradients


def test_one_gpu_is_what_was_measured() -> None:
    step = step_of(H200, IB, resnet50(), 1, 256)
    assert 1e3 * step.parts["compute"] == pytest.approx(70.6) and efficiency(H200, step) == pytest.approx(1, abs=0.03)
    assert step.memory == pytest.approx(22.2e9, rel=0.01) and step.passes == 1
    assert step.images_per_s == pytest.approx(256 / 0.0706, rel=0.03)
    # A batch that does not fit takes passes, each with the fixed part, and a third more computing.
    large = step_of(H200, IB, resnet50(), 1, 4096)
    assert large.passes == 4 and large.memory < H200.memory
    assert large.seconds > 4 / 3 * 4096 * H200.per_image


def test_resnet50_sends_what_is_known_of_it() -> None:
    model = resnet50()
    assert model.gradients == pytest.approx(27.97e6, rel=0.001)  # as mmpretrain counts it
    assert len(model.batchnorms) == 53 + 2 and max(model.batchnorms) == 2048


GPUS, SIZES = st.sampled_from([2**power for power in range(11)]), st.sampled_from([4096, 16384, 65536])


@settings(max_examples=60)
@given(GPUS, SIZES, st.sampled_from([IB, ETHERNET]))
def test_more_of_anything_costs_more_and_better_links_less(gpus: int, batch: int, network: Any) -> None:
    model = MODEL
    step = step_of(H200, network, model, gpus, batch)
    assert 0 < efficiency(H200, step) < 1.1 and all(part >= 0 for part in step.parts.values())
    assert step_of(H200, network, model, gpus, 2 * batch).seconds > step.seconds
    faster = replace(network, between=2 * network.between, hop_between=network.hop_between / 2)
    assert step_of(H200, faster, model, gpus, batch).seconds <= step.seconds
    assert step_of(H200, network, replace(model, group="node"), gpus, batch).seconds <= step.seconds
    assert step_of(H200, network, replace(model, gradient_bytes=2), gpus, batch).seconds <= step.seconds
    assert all(factor >= 0.999 for name, factor in cures(H200, network, model, gpus, batch).items() if name[0] != "t")


def test_collectives_are_those_of_the_textbook() -> None:
    """Thakur et al. 2005: n bytes reduced over p ranks move 2 (p - 1) / p n of them."""
    free = replace(IB, launch=0.0, hop_inside=0.0, hop_between=0.0)
    assert all_reduce(free, 8, 1e9) == pytest.approx(2 * 7 / 8 * 1e9 / free.inside)
    assert all_gather(free, 8, 1e6) == pytest.approx(7 * 1e6 / free.inside)
    # Between machines each has as many links as GPUs.
    assert all_reduce(free, 64, 1e9) == pytest.approx(2 * 7 / 8 * 1e9 / (8 * free.between))
    assert all_reduce(IB, 1, 1e9) == 0 and all_reduce(IB, 2, 4) >= IB.launch


def test_the_point_from_which_more_stop_paying_depends_on_batch_and_links() -> None:
    model = resnet50()
    points = [last_that_pays(H200, IB, model, batch, 4096) for batch in (4096, 32768)]
    assert points[0] < points[1]
    assert last_that_pays(H200, ETHERNET, model, 4096, 4096) <= points[0]
    with pytest.raises(ValueError, match="cannot be shared"):
        step_of(H200, IB, model, 3, 4096)


def test_the_script_prints_tables_and_draws(tmp_path: Path) -> None:
    words = ["--batch", 4096, "--gpus", 1, 8, 64, 512, "--json", tmp_path / "s.json", "--plot", tmp_path / "s.html"]
    done = run_python(ROOT / "scripts/bench/scaling.py", *words)
    assert done.returncode == 0 and "stop paying" in done.stdout and "800 epochs" in done.stdout, done.stderr
    assert "measured:" in done.stdout and "assumed:" in done.stdout and "128 TPU v3 cores" in done.stdout
    assert (tmp_path / "s.html").stat().st_size > 100_000 and '"pays_to"' in (tmp_path / "s.json").read_text()


MODEL = resnet50()
