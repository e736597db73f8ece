"""The model of scaling: what it says a step sends is what real steps send, and its figures behave."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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
    INTERCONNECTS,
    Traffic,
    all_gather,
    all_reduce,
    efficiency,
    last_that_pays,
    speedups,
    step_of,
    traffic_of,
)
from simclr_dali.train.step import train_step
from tests.conftest import ROOT, assert_sentence, run_python, run_ranks
from tests.runs import TINY

BATCH = 16
IB, ETHERNET = INTERCONNECTS["InfiniBand"], INTERCONNECTS["Ethernet"]


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


def sent_by_a_step(rank: int, passes: int, group: int | str) -> tuple[list[tuple[str, int]], Traffic]:
    """Of the second step; the first also compares which gradients there are."""
    world = torch.distributed.get_world_size()
    micro_batch = BATCH // world // passes
    raw = {**TINY, "train_micro_batch_size_per_gpu": micro_batch}
    own = {"data": "unused", "batchnorm_group": group}
    config = Config.model_validate({**raw, "simclr": {**TINY["simclr"], **own}})
    network = build_model(config.architecture(), 0)
    traffic = traffic_of(network, config.architecture().projector[-1])
    engine, _ = build_engine(network, config, Process(rank, world, world, torch.device("cpu"), 1))
    drawn = torch.Generator().manual_seed(rank)
    views = [torch.randn(2 * micro_batch, 3, 32, 32, generator=drawn) for _ in range(passes)]
    train_step(engine, views, NTXent(0.1))
    with Messages() as messages:
        train_step(engine, views, NTXent(0.1))
    return messages.seen, traffic


@pytest.mark.launch
@pytest.mark.parametrize(
    ("world", "passes", "group"), [(1, 1, "all"), (1, 2, "all"), (2, 1, "all"), (2, 2, "all"), (4, 1, 2), (4, 2, 1)]
)
def test_a_step_sends_what_the_model_says(world: int, passes: int, group: int | str, tmp_path: Path) -> None:
    for seen, traffic in run_ranks(sent_by_a_step, world, tmp_path, passes, group):
        rows = 2 * BATCH // world
        norms = [("gather", (2 * channels + 1) * FLOAT) for channels in traffic.batchnorms] * (1 + (passes > 1))
        norms += [("reduce", 2 * channels * FLOAT) for channels in traffic.batchnorms]
        loss = [("gather", rows * traffic.embedding * FLOAT), ("gather", rows * FLOAT)]
        gradients = [("reduce", numbers * FLOAT) for numbers in traffic.buckets]
        expected = passes * norms * (group != 1) + loss + gradients if world > 1 else []
        assert sorted(seen) == sorted(expected)
    assert sum(traffic.buckets) == traffic.gradients


def test_one_gpu_is_what_was_measured() -> None:
    measured = json.loads((ROOT / "scripts/bench/results/step-variants-h200.json").read_text())
    step, compiled = step_of(H200, IB, resnet50(), 1, 256), measured["compile b256"]
    assert 1e3 * step.parts["compute"] == pytest.approx(compiled["ms"], rel=0.001)
    assert efficiency(H200, step) == pytest.approx(1, abs=0.03)
    assert step.memory == pytest.approx(1e9 * compiled["peak GB"], rel=0.01) and step.passes == 1
    # What does not depend on the number of images: of the line through three uncompiled steps.
    eager = [measured[name]["ms"] for name in ("eager bench b128", "eager b256", "eager bench b512")]
    slope, fixed = np.polyfit([128, 256, 512], eager, 1)
    assert H200.fixed / (71.0e-3) == pytest.approx(fixed / eager[1], rel=0.02) and slope > 0
    # A batch that does not fit takes passes, each with the fixed part, and a third more computing.
    large = step_of(H200, IB, resnet50(), 1, 4096)
    assert large.parts["second forward pass"] == pytest.approx(large.parts["compute"] / 3)
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
    faster = replace(network, inter_node=2 * network.inter_node, hop=network.hop / 2)
    assert step_of(H200, faster, model, gpus, batch).seconds <= step.seconds
    assert step_of(H200, network, replace(model, batchnorm_group="node"), gpus, batch).seconds <= step.seconds
    assert step_of(H200, network, replace(model, gradient_bytes=2), gpus, batch).seconds <= step.seconds
    helps = speedups(H200, network, model, gpus, batch)
    assert all(helps[name] >= 0.999 for name in ("BatchNorm over a node", "gradients in bfloat16"))


def test_collectives_are_those_of_the_textbook() -> None:
    """Thakur et al. 2005: n bytes reduced over p ranks move 2 (p - 1) / p n of them, however long the hops are."""
    assert all_reduce(IB, 8, 1e12) == pytest.approx(2 * 7 / 8 * 1e12 / IB.intra_node, rel=1e-3)
    assert all_gather(IB, 8, 1e11) == pytest.approx(7 * 1e11 / IB.intra_node, rel=1e-3)
    # Between nodes each has as many links as GPUs.
    assert all_reduce(IB, 64, 1e12) == pytest.approx(2 * 7 / 8 * 1e12 / (8 * IB.inter_node), rel=1e-3)
    assert all_reduce(IB, 1, 1e9) == all_gather(IB, 1, 1e9) == 0


def test_small_collectives_take_the_latencies_that_nccl_reckons_with() -> None:
    """A ring of 128 GPUs has 16 hops between nodes and 112 inside of them less one; a tree 4 levels over 16 nodes."""
    assert all_gather(IB, 128, 4) == pytest.approx(6.8e-6 + 112 * 0.6e-6 + 15 * 2.7e-6, rel=0.01)
    assert all_reduce(IB, 128, 4) == pytest.approx(6.8e-6 + 2 * (7 * 0.6e-6 + 4 * 5.0e-6), rel=0.01)
    assert all_gather(ETHERNET, 128, 4) - all_gather(IB, 128, 4) == pytest.approx(15 * 25e-6, rel=0.01)


def test_the_point_from_which_more_stop_paying_depends_on_batch_and_links() -> None:
    model = resnet50()
    points = [last_that_pays(H200, IB, model, batch, 4096) for batch in (4096, 32768)]
    assert points[0] < points[1]
    assert last_that_pays(H200, ETHERNET, model, 4096, 4096) <= points[0]
    with pytest.raises(ValueError, match="cannot be shared"):
        step_of(H200, IB, model, 3, 4096)
    assert last_that_pays(H200, IB, model, 12288, 12) == 8  # twice as many were not asked for


def test_counts_that_divide_no_batch_are_one_sentence() -> None:
    script = ROOT / "scripts/bench/scaling.py"
    assert_sentence(run_python(script, "--gpus", 3, "--batch", 4096), "none of 3 GPUs divide a batch of 4096")
    done = run_python(script, "--gpus", 1, 2, 4, 8, 12, "--batch", 12288)
    assert done.returncode == 0 and "stop paying" not in done.stdout and "as far as was looked" in done.stdout


def test_the_script_prints_tables_and_draws(tmp_path: Path) -> None:
    words = ["--batch", 4096, "--gpus", 1, 8, 64, 512, "--json", tmp_path / "s.json", "--plot", tmp_path / "s.html"]
    done = run_python(ROOT / "scripts/bench/scaling.py", *words)
    assert done.returncode == 0 and "stop paying" in done.stdout and "800 epochs" in done.stdout, done.stderr
    assert "measured:" in done.stdout and "assumed:" in done.stdout and "128 TPU v3 cores" in done.stdout
    assert (tmp_path / "s.html").stat().st_size > 100_000 and '"pays_to"' in (tmp_path / "s.json").read_text()


MODEL = resnet50()
