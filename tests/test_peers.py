"""What the ranks of a run find out about each other."""

import os
from pathlib import Path

import pytest
import torch

from simclr_dali.model.peers import Peers, lost_connection
from tests.conftest import run_ranks

HOSTS = {"10.99.0.1": "node-a", "10.99.0.12": "node-c", "10.99.0.2": "node-b"}


def same_cores(rank: int) -> tuple[int, ...]:
    """Of four ranks, two may use one core, and two another."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[rank % 2]})
    peers = Peers(torch.distributed.distributed_c10d._get_default_store(), rank, 4)
    os.sched_setaffinity(0, before)
    peers.say_goodbye()
    return peers.same_cores


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
def test_ranks_that_have_cores_of_their_own_share_them_with_nobody(tmp_path: Path) -> None:
    """As srun and mpirun bind them."""
    assert run_ranks(same_cores, 4, tmp_path) == [(0, 2), (1, 3), (0, 2), (1, 3)]


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("[pair.cc:553] Connection closed by peer [10.99.0.2]:35981. This is typically caused by", "node-b"),
        ("[pair.cc:537] Read error [10.99.0.12]:37062: Connection reset by peer. This is typically", "node-c"),
        ("writev [10.99.0.2]:40012: Broken pipe", "node-b"),
        ("Application timeout caused pair closure", "another machine"),
        ("NCCL error: remote process exited or there was a network error, NCCL version 2.28", "another machine"),
        ("connect [10.99.0.1]:29500: No route to host", "node-a"),
    ],
)
def test_an_error_of_a_collective_names_the_machine_that_is_gone(text: str, host: str) -> None:
    assert f"a process on {host} is gone (" in lost_connection(RuntimeError(text), HOSTS)


def test_other_errors_are_no_lost_machine() -> None:
    assert not lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied (10.99.0.2)"), HOSTS)
