"""Decoded pictures that are kept: the same views to the bit, nothing read twice, no more memory than planned."""

import errno
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from simclr_dali.model.process import from_all_ranks
from simclr_dali.pipeline import kept_memory
from simclr_dali.pipeline.draws import Recipe
from simclr_dali.pipeline.files import LocalFiles, Split
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.kept_memory import Processes, set_aside
from simclr_dali.pipeline.kept_pictures import KeptPictures, Places, bytes_to_keep
from simclr_dali.pipeline.kept_place import Place
from simclr_dali.pipeline.loader import central_views
from simclr_dali.pipeline.order import Order
from simclr_dali.pipeline.stream import Batch
from simclr_dali.shards.free_memory import free_memory
from simclr_dali.shards.manifest import ShardSet, load_split
from simclr_dali.shards.pack import pack
from simclr_dali.shards.plan import Options
from tests.conftest import ROOT, assert_sentence, run_python, run_ranks
from tests.loaders import local, two_views
from tests.runs import launch, metrics, pretrain, tiny_config

CPU = torch.device("cpu")
SETTING = LoaderConfig(size=32, device=CPU)


@pytest.fixture(params=["one size", "odd sizes"])
def shards(request: pytest.FixtureRequest, train_split: ShardSet, odd_pictures: Path, tmp_path: Path) -> ShardSet:
    if request.param == "one size":
        return train_split
    pack(odd_pictures, tmp_path / "packed odd", Options(samples_per_shard=8))
    return load_split(tmp_path / "packed odd", "train")


def order_of(shards: ShardSet) -> Order:
    return Order(shards.shard_sizes(), 12, 4, 2, 9)


def memory_for(shards: ShardSet, **options: Any) -> KeptPictures:
    kept, words = set_aside(shards, "host", CPU, **options)
    assert kept, words
    return kept


def assert_equal(batches: Iterator[Batch] | list[Batch], expected: Iterator[Batch] | list[Batch]) -> None:
    for ours, wanted in zip(batches, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_views_are_the_same_to_the_bit_over_epochs(shards: ShardSet) -> None:
    kept = memory_for(shards)
    plain = two_views(shards, order_of(shards), Recipe(), SETTING, epochs=3)
    assert_equal(two_views(shards, order_of(shards), Recipe(), SETTING, epochs=3, kept=kept), plain)
    assert kept.has(np.arange(len(shards))).mean() > 0.9


def test_what_is_kept_is_neither_fetched_nor_read_again(shards: ShardSet, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards.folder, copy / "train")
    own = load_split(copy, "train")
    kept = memory_for(own)
    expected = list(two_views(shards, order_of(shards), Recipe(), SETTING, epochs=3))
    first = len(expected) // 3
    begun = two_views(own, order_of(own), Recipe(), SETTING, epochs=1, kept=kept)
    assert_equal(begun, expected[:first])
    list(central_views(local(own), SETTING, batch=12, kept=kept))  # those that an epoch leaves out
    for tar in (copy / "train").glob("*.tar"):
        os.truncate(tar, 0)
    rest = two_views(own, order_of(own), Recipe(), SETTING, epochs=3, start=(1, 0), kept=kept)
    assert_equal(rest, expected[first:])
    assert rest.damaged() == []


class _Watched(LocalFiles):
    """Notes which shards it is told to fetch."""

    expected: ClassVar[set[int]] = set()

    def expect(self, current: Sequence[int], upcoming: Sequence[int]) -> None:
        self.expected.update(current, upcoming)
        super().expect(current, upcoming)


def test_shards_of_which_all_is_kept_are_not_fetched(shards: ShardSet) -> None:
    """Also where only a part of the set is to be kept, and nothing else is read."""
    watched = Split(shards, lambda: _Watched(shards))
    every = np.arange(len(shards))
    for ids in (every, every[: len(shards) // 2]):
        kept = memory_for(shards, ids=ids)
        for expected in (set(shards.samples["shard"][ids].tolist()), set()):
            _Watched.expected.clear()
            list(central_views(watched, SETTING, batch=7, ids=ids, kept=kept))
            assert _Watched.expected == expected


def test_a_damaged_sample_is_replaced_as_without(shards: ShardSet, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards.folder, copy / "train")
    own = load_split(copy, "train")
    for sample in (7, 8, len(own) - 1):  # the last one's stand-in is the first
        tar = copy / "train" / own.shards[own.samples[sample]["shard"]].name
        data = bytearray(tar.read_bytes())
        data[int(own.samples[sample]["offset"]) + int(own.samples[sample]["length"]) // 2] ^= 4
        tar.write_bytes(data)
    options: dict[str, Any] = {"epochs": 4, "max_bad_fraction": 0.2}
    plain = two_views(own, order_of(own), Recipe(), SETTING, **options)
    kept = memory_for(own)
    keeping = two_views(own, order_of(own), Recipe(), SETTING, kept=kept, **options)
    assert_equal(keeping, plain)
    assert keeping.damaged() == plain.damaged() == [7, 8, len(own) - 1]
    assert not kept.has(np.array(plain.damaged())).any()


def test_going_on_in_the_middle_of_the_first_epoch(shards: ShardSet) -> None:
    order = order_of(shards)
    middle = (0, order.steps_per_epoch // 2)
    rest = two_views(shards, order, Recipe(), SETTING, epochs=3, start=middle)
    kept = memory_for(shards)
    loader = two_views(shards, order, Recipe(), SETTING, epochs=3, kept=kept)
    for _ in range(middle[1]):
        next(loader)
    state = loader.state_dict()
    assert_equal(two_views(shards, order, Recipe(), SETTING, epochs=3, start=middle, kept=memory_for(shards)), rest)
    again = two_views(shards, order, Recipe(), SETTING, epochs=3, kept=kept)  # with what was kept before
    again.load_state_dict(state)
    assert_equal(again, two_views(shards, order, Recipe(), SETTING, epochs=3, start=middle))


def test_parts_of_a_set_and_other_views_of_it_may_be_kept(shards: ShardSet) -> None:
    some = np.arange(1, len(shards), 3)
    kept = memory_for(shards, ids=some)
    everything = np.arange(len(shards))
    for size in (32, 48):  # of the same pictures
        setting = replace(SETTING, size=size)
        plain = central_views(local(shards), setting, batch=7)
        assert_equal(central_views(local(shards), setting, batch=7, kept=kept), plain)
        assert np.array_equal(np.flatnonzero(kept.has(everything)), some)


def test_a_picture_of_another_size_than_its_row_says_is_not_kept(train_split: ShardSet) -> None:
    wrong = replace(train_split, samples=train_split.samples.copy())
    wrong.samples["height"][5] -= 1
    kept = memory_for(wrong)
    list(central_views(local(wrong), SETTING, batch=50, kept=kept))
    assert np.flatnonzero(~kept.has(np.arange(len(wrong)))).tolist() == [5]


@pytest.mark.parametrize("place", ["auto", "host", "gpu"])
def test_memory_is_planned_and_what_does_not_fit_is_not_kept(
    place: Place, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = shards.samples
    needed = int((3 * samples["width"].astype(np.int64) * samples["height"]).sum())
    assert bytes_to_keep(shards, None, CPU) == Places(shards, None, CPU).bytes == needed
    taken = needed + -(-len(shards) // mmap.PAGESIZE) * mmap.PAGESIZE  # with the flags
    share = 0.9 if place == "host" else 0.5
    for free, fits in ((int(taken / share) + 2, True), (int(taken / share) - 2, False)):
        monkeypatch.setattr(kept_memory, "free_memory", lambda free=free: free)
        kept, words = set_aside(shards, place, CPU)
        assert (kept is not None) == fits
        assert ("kept in host memory" in words) == fits and ("more than" in words) != fits
        assert ("there is no GPU" in words) == (place == "gpu")
    assert set_aside(shards, "no", CPU)[0] is None


def keep_together(rank: int, folder: str) -> tuple[str, list[int], bool]:
    """Each of two ranks decodes every second picture; what it finds then, and whether views of all are right."""
    shards = load_split(folder, "train")
    kept, words = set_aside(shards, "auto", CPU, processes=Processes(rank, from_all_ranks))
    assert kept
    everything = np.arange(len(shards))
    own = everything[rank::2]
    list(central_views(local(shards), SETTING, batch=12, ids=own, kept=kept))
    from_all_ranks(None)
    found = np.flatnonzero(kept.has(everything)).tolist()
    pairs = zip(
        central_views(local(shards), SETTING, batch=12, kept=kept),
        central_views(local(shards), SETTING, batch=12),
        strict=True,
    )
    equal = all(torch.equal(ours.views, wanted.views) for ours, wanted in pairs)
    return words, found, equal


def test_processes_of_a_machine_share_one_copy(shards: ShardSet, tmp_path: Path) -> None:
    for words, found, equal in run_ranks(keep_together, 2, tmp_path, str(shards.folder.parent)):
        assert "one copy for 2 processes" in words and found == list(range(len(shards))) and equal


def plan_in_containers(rank: int, folder: str) -> str:
    """Ranks that cannot open each other's memory, though they share the machine's."""
    kernel = kept_memory._machine().kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_memory, "_machine", lambda: kept_memory._Machine(kernel, f"container {rank}"))
        patch.setattr(kept_memory, "free_memory", lambda: 40_000_000)
        shards = load_split(folder, "train")
        return set_aside(shards, "auto", CPU, processes=Processes(rank, from_all_ranks))[1]


def test_containers_of_a_machine_do_not_plan_with_the_same_memory(train_split: ShardSet, tmp_path: Path) -> None:
    size = bytes_to_keep(train_split, None, CPU) + mmap.PAGESIZE
    for words in run_ranks(plan_in_containers, 2, tmp_path, str(train_split.folder.parent)):
        assert f"{size / 20_000_000:.1%} of what is free" in words and "one copy" not in words


def refuse_on_rank_1(rank: int, folder: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(kept_memory, "_in_host_memory", lambda *_: (None, "rank 1 cannot"))
        kept, words = set_aside(load_split(folder, "train"), "host", CPU, processes=Processes(rank, from_all_ranks))
    assert (kept is None) == (rank == 1)
    return words


def test_what_ranks_decided_differently_is_told_by_rank(train_split: ShardSet, tmp_path: Path) -> None:
    for words in run_ranks(refuse_on_rank_1, 2, tmp_path, str(train_split.folder.parent)):
        assert words.startswith("rank 0: decoded pictures are kept") and words.endswith("rank 1: rank 1 cannot")


def test_memory_that_the_system_does_not_give_is_told(train_split: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    opened = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    kept, words = set_aside(train_split, "auto", CPU)
    assert kept is None and "the system gives no memory for them (Cannot allocate memory)" in words
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


def test_memory_without_a_name_where_python_has_no_call_for_it(
    train_split: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    before = set(Path("/dev/shm").iterdir())
    kept = memory_for(train_split)
    assert set(Path("/dev/shm").iterdir()) == before
    plain = two_views(train_split, order_of(train_split), Recipe(), SETTING, epochs=2)
    assert_equal(two_views(train_split, order_of(train_split), Recipe(), SETTING, epochs=2, kept=kept), plain)


def test_what_is_not_the_memory_that_was_offered_is_not_taken(train_split: ShardSet, tmp_path: Path) -> None:
    """As where another process has the number that one on another machine has there."""
    (tmp_path / "other").write_bytes(b"x" * 10_000_000)
    with (tmp_path / "other").open("r+b") as file:
        offer = kept_memory._Offer("kept", os.getpid(), file.fileno(), (1, 2))
        kept, words = kept_memory._in_host_memory(train_split, None, offer, CPU)
    assert kept is None and "is another one's here" in words


def test_memory_that_another_process_does_not_open_is_told(train_split: ShardSet) -> None:
    offer = kept_memory._Offer("kept", 2**22 + 1, 5)  # beyond the largest number that a process can have
    kept, words = kept_memory._in_host_memory(train_split, None, offer, CPU)
    assert kept is None and "cannot be mapped (No such file or directory)" in words


@pytest.mark.launch
def test_a_run_is_the_same_with_and_without_on_two_processes(packed: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    losses = {}
    for place in ("host", "no"):
        done = launch(2, config, packed, tmp_path / place, "--set", f"simclr.keep_decoded={place}")
        assert done.returncode == 0, done.stderr
        assert ("kept in host memory" in done.stdout) == (place == "host")
        losses[place] = [line["loss"] for line in metrics(tmp_path / place)]
    assert losses["host"] == losses["no"] and len(losses["no"]) == 30


def test_a_run_says_where_decoded_pictures_are_and_may_change_it(packed: Path, tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path), tmp_path / "run"
    first = pretrain(config, packed, run, "--stop-after-steps", "20")
    assert "decoded pictures are kept in host memory" in first.stdout, first.stderr
    rest = pretrain(config, packed, run, "--set", "simclr.keep_decoded=no")
    assert rest.returncode == 0 and "decoded pictures are not kept" in rest.stdout
    once = pretrain(config, packed, tmp_path / "once", "--set", "simclr.epochs=1")
    assert "each is used once" in once.stdout
    last = pretrain(config, packed, tmp_path / "last", "--stop-after-steps", "15")
    assert "kept in host memory" in last.stdout
    assert "each is used once" in pretrain(config, packed, tmp_path / "last").stdout  # of two epochs, one is left


@pytest.mark.parametrize(
    ("script", "words", "result"),
    [
        ("linear", ["--protocol", "mmpretrain-lars-90e", "--epochs", 3], "linear-mmpretrain-lars-90e"),
        ("finetune", ["--fraction", 0.5, "--epochs", 3], "finetune-0.5"),
    ],
)
def test_evaluations_are_the_same_with_and_without(
    script: str, words: list[Any], result: str, run: Path, tmp_path: Path
) -> None:
    figures = []
    for place in ("host", "no"):
        out = tmp_path / place
        given = ["--ckpt", run, *words, "--train-batch", 16, "--keep-decoded", place, "--out", out]
        done = run_python(ROOT / f"eval/{script}.py", *given)
        assert done.returncode == 0, done.stderr
        assert ("kept in host memory" in done.stdout) == (place == "host")
        found = json.loads((out / f"{result}.json").read_text())
        figures.append({name: value for name, value in found.items() if "seconds" not in name})
    assert figures[0] == figures[1]
    fast = run_python(ROOT / "eval/linear.py", "--ckpt", run, "--keep-decoded", "host")
    assert_sentence(fast, "--keep-decoded", "mean nothing to the protocol fast")


@pytest.mark.parametrize(
    ("own_groups", "files", "free"),
    [
        ("0::/job", {}, 7812 * 1024),
        ("0::/job", {"job/memory.max": "max", "job/memory.current": "5000000"}, 7812 * 1024),
        ("0::/job", {"job/memory.max": "6000000", "job/memory.current": "5000000"}, 1_000_500),
        ("0::/job/step", {"job/memory.max": "6000000", "job/memory.current": "5000000"}, 1_000_500),
        ("0::/job", {"job/memory.max": "5000000", "job/memory.current": "6000000"}, 0),
        (
            "4:memory:/job",
            {"memory/job/memory.limit_in_bytes": "6000000", "memory/job/memory.usage_in_bytes": "5000000"},
            1_000_500,
        ),
        ("nonsense", {}, 7812 * 1024),
    ],
)
def test_free_memory_of_machines_and_control_groups(
    own_groups: str, files: dict[str, str], free: int, tmp_path: Path
) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text(f"{own_groups}\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 7812 kB\nHugePages_Total: 0\n")
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
        (path.parent / "memory.stat").write_text("anon 1\ninactive_file 300\nactive_file 200\n")
    assert free_memory(tmp_path / "self", tmp_path / "groups") == free
    assert free_memory() > 0
