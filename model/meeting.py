"""Processes that were started together find one another at a store that others have used before them."""

import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from simclr_dali.shards.wording import counted

_PERIOD = 0.05  # seconds


def own_part(store: Any, rank: int, world: int, patience: timedelta) -> Any:
    """A part of the store that nobody used before the ranks that call this together.

    torchrun keeps one store for all its restarts, in which the ranks of an earlier start have left addresses; whoever
    reads them waits for the dead (https://github.com/pytorch/pytorch/issues/135712). So each rank says a word of its
    own, rank 0 answers it with the name of the part, and is done when all have come there. It answers words of the
    dead too, and nobody hears it.

    Raises RuntimeError where the others do not come within ``patience``.
    """
    if rank:
        word = uuid.uuid4().hex
        store.set(f"meeting/{rank}", word)
        store.wait([f"meeting/{word}"], patience)
        part = dist.PrefixStore(store.get(f"meeting/{word}").decode(), store)  # type: ignore[attr-defined]
        part.set(f"here/{rank}", "")
        return part
    name, until = uuid.uuid4().hex, time.monotonic() + patience.total_seconds()
    part = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    answered = dict.fromkeys(range(1, world), b"")
    while answered:
        for other, word_before in list(answered.items()):
            if part.check([f"here/{other}"]):
                del answered[other]
            elif store.check([f"meeting/{other}"]) and (said := store.get(f"meeting/{other}")) != word_before:
                store.set(f"meeting/{said.decode()}", name)
                answered[other] = said
        if answered and time.monotonic() > until:
            raise RuntimeError(f"{counted(len(answered), 'rank')} did not come, rank {min(answered)} among them")
        time.sleep(_PERIOD)
    return part
