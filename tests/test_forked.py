"""A process that is forked from one in which DALI's threads run."""

import multiprocessing
from pathlib import Path

import pytest

from simclr_dali import load
from simclr_dali.shards.errors import UserError


def embed_in_a_forked_worker(pictures: Path, run: Path) -> None:
    from torch.utils.data import DataLoader, Dataset

    encoder = load(run)
    first = sorted(pictures.rglob("*.jpg"))[0]
    encoder(first)

    class Pictures(Dataset[Path]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, _: int) -> Path:
            return first

    with pytest.raises(UserError, match="multiprocessing_context='spawn'"):
        list(DataLoader(Pictures(), num_workers=1, collate_fn=encoder, multiprocessing_context="fork", timeout=60))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are not forked here")
def test_it_is_told_to_be_spawned_and_does_not_hang(pictures: Path, trained: Path) -> None:
    """In a process of its own, whose threads are those of its first picture."""
    worker = multiprocessing.get_context("spawn").Process(target=embed_in_a_forked_worker, args=(pictures, trained))
    worker.start()
    worker.join(120)
    assert worker.exitcode == 0
