"""BatchNorm over groups of processes: one process that normalises in the same groups, and nobody else's messages."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from simclr_dali.model.batchnorm import average_statistics, groups_of_ranks, synchronised
from simclr_dali.model.process import Process
from simclr_dali.shards.errors import UserError
from simclr_dali.train.config import Config
from simclr_dali.train.engine import build_engine
from tests.conftest import assert_sentence, run_ranks
from tests.runs import TINY, launch, metrics, pretrain, tiny_config
from tests.test_batchnorm import CPU, small_network, some_batch


def train_in_groups(rank: int, size: int, images: Tensor, targets: Tensor) -> list[Tensor]:
    """Output of a pass of this rank's part, gradients, buffers, and buffers after they were averaged."""
    network = synchronised(small_network(), CPU, group=groups_of_ranks(size))
    own = images.chunk(dist.get_world_size())[rank], targets.chunk(dist.get_world_size())[rank]
    output = network(own[0])
    ((output - own[1]) ** 2).sum().backward()
    gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    before = [buffer.clone() for buffer in network.buffers()]
    average_statistics(network)
    return [output.detach(), *gradients, *before, *network.buffers()]


@pytest.mark.parametrize(("world", "size"), [(4, 2), (4, 1), (4, 4), (2, 1)])
def test_groups_are_parts_that_one_process_normalises_apart(world: int, size: int, tmp_path: Path) -> None:
    images, targets = some_batch()
    ranks = run_ranks(train_in_groups, world, tmp_path, size, images, targets)
    network = small_network()
    first = {name: buffer.clone() for name, buffer in network.named_buffers()}
    outputs, statistics = [], []
    for some, wanted in zip(images.chunk(world // size), targets.chunk(world // size), strict=True):
        network.load_state_dict(first, strict=False)
        output = network(some)
        ((output - wanted) ** 2).sum().backward()
        outputs.append(output.detach())
        statistics.append([buffer.clone().double() for buffer in network.buffers()])
    gradients = [p.grad for p in network.parameters()]
    count, buffers = len(gradients), len(statistics[0])
    assert torch.allclose(torch.cat([rank[0] for rank in ranks]), torch.cat(outputs), atol=1e-10)
    for number, expected in enumerate(gradients):
        together = torch.stack([rank[1 + number] for rank in ranks]).sum(0)
        assert expected is not None and torch.allclose(together, expected, atol=1e-9)
    for number in range(buffers):
        for rank, found in enumerate(ranks):
            own = statistics[rank // size][number]
            assert torch.allclose(found[1 + count + number].double(), own, atol=1e-9)
            mean = torch.stack([one[number] for one in statistics]).mean(0)
            assert torch.allclose(found[1 + count + buffers + number].double(), mean, atol=1e-9)


@pytest.mark.launch
def test_two_processes_that_normalise_alone_are_two_passes_of_one(packed: Path, tmp_path: Path) -> None:
    """And both keep the mean of their statistics, with which the run goes on as if it had not stopped."""
    config, words = tiny_config(tmp_path), ["--set", "train_micro_batch_size_per_gpu=8"]
    one = pretrain(config, packed, tmp_path / "one", *words, "--stop-after-steps", 6)
    assert one.returncode == 0, one.stderr
    alone = ["--set", "simclr.batchnorm_group=1"]
    for steps in (3, 3):
        two = launch(2, config, packed, tmp_path / "two", *words, *alone, "--stop-after-steps", steps)
        assert two.returncode == 0 and "BatchNorm sees the images of 1 process at a time" in two.stdout, two.stderr
    whole = launch(2, config, packed, tmp_path / "whole", *words, *alone, "--stop-after-steps", 6)
    assert whole.returncode == 0, whole.stderr
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two", "whole")]
    assert losses[1] == losses[2] and losses[1] == pytest.approx(losses[0], rel=1e-4)
    states = [
        torch.load(tmp_path / name / "checkpoints/step-00000006/state.pt", weights_only=True)["model"]
        for name in ("two", "whole")
    ]
    for key, value in states[0].items():  # statistics were averaged once more, which rounds once more
        same = (
            torch.allclose(value, states[1][key], rtol=1e-5) if "running" in key else torch.equal(value, states[1][key])
        )
        assert same, key
    other = launch(2, config, packed, tmp_path / "two", *words)  # it is another run
    assert_sentence(other, "simclr.batchnorm_group")


def configured(**settings: Any) -> Config:
    return Config.model_validate({**TINY, "simclr": {**TINY["simclr"], "data": "unused", "lanes": 16, **settings}})


def test_groups_that_cannot_be_are_refused() -> None:
    assert configured(batchnorm_group="node").batchnorm_processes(16, 8) == 8
    assert configured(batchnorm_group=4).batchnorm_processes(16, 8) == 4
    assert configured().batchnorm_processes(16, 8) == 16
    with pytest.raises(UserError, match=r"is 3, and groups of 3 processes do not divide the 16"):
        configured(batchnorm_group=3).batchnorm_processes(16, 8)
    with pytest.raises(UserError, match="one image at a time"):
        configured(batchnorm_group=1).batchnorm_processes(16, 8)


def refused(rank: int, hosts: tuple[str, ...]) -> str:
    class Seen:
        pass

    seen: Any = Seen()
    seen.hosts, seen.machines = hosts, hosts
    config = configured(batchnorm_group="node")
    network: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    try:
        build_engine(network, config, Process(rank, 4, 2, CPU, 1, peers=seen))
    except UserError as error:
        return str(error)
    return ""


def test_ranks_of_a_machine_must_follow_each_other(tmp_path: Path) -> None:
    uneven = run_ranks(refused, 3, tmp_path, ("a", "a", "b"))
    assert all("2 on a, 1 on b" in text for text in uneven)
    found = run_ranks(refused, 4, tmp_path, ("a", "b", "a", "b"))
    assert all("--distribution=block" in text and "1 on a, 1 on b, 1 on a, 1 on b" in text for text in found)
