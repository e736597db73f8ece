"""Which pictures a JPEG engine decodes: by picture alone, and without a change to what the graph computes elsewhere."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simclr_dali.pipeline.draws import Recipe
from simclr_dali.pipeline.engine import EngineChoice, drawn_for_engine
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.order import Order
from simclr_dali.shards.jpeg import is_baseline
from simclr_dali.shards.manifest import ShardSet
from tests.loaders import two_views

CPU = LoaderConfig(size=32, device=torch.device("cpu"))


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**40))
def test_a_picture_is_in_or_out_whatever_is_around_it(one: float, other: float, first: int) -> None:
    smaller, larger = sorted((one, other))
    ids = np.arange(first, first + 2_000)
    inside = drawn_for_engine(ids, larger)
    # Five standard deviations of a share of 2,000.
    assert abs(inside.mean() - larger) < 5 * (larger * (1 - larger) / 2_000) ** 0.5 + 1e-3
    assert not (drawn_for_engine(ids, smaller) & ~inside).any()
    shuffled = np.random.default_rng(0).permutation(ids)
    assert np.array_equal(drawn_for_engine(shuffled, larger), inside[shuffled - first])
    assert drawn_for_engine(ids, 1.0).all() and not drawn_for_engine(ids, 0.0).any()


def encoded(mode: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)).convert(mode).save(
        buffer, **{"format": "JPEG", **options}
    )
    return buffer.getvalue()


def test_engines_are_given_baseline_jpegs_only() -> None:
    exif = PIL.Image.Exif()
    exif[0x010E] = "a thumbnail and its frame may lie in here " * 100
    takes = [encoded("RGB"), encoded("L"), encoded("RGB", subsampling=0), encoded("RGB", exif=exif.tobytes())]
    assert all(map(is_baseline, takes))
    refuses = [encoded("RGB", progressive=True), encoded("CMYK"), encoded("RGB", format="PNG"), b"", b"\xff\xd8\xff"]
    assert not any(map(is_baseline, [*refuses, *(takes[0][:length] for length in (2, 4, 20, 150))]))
    choice = EngineChoice(9, 1.0)
    arrays = [np.frombuffer(data, np.uint8) for data in (*takes, *refuses)]
    for _ in range(2):  # the second time it is known
        assert choice.of(np.arange(9), arrays).tolist() == [True] * 4 + [False] * 5
    assert not EngineChoice(9, 0.0).of(np.arange(9), arrays).any()


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("settings", [{}, {"region": True}, {"conditionals": False}], ids=str)
def test_two_equal_decoders_give_the_bits_of_one(share: float, settings: dict[str, Any], train_split: ShardSet) -> None:
    """On a CPU both are the same, so that only how the graph splits and joins a batch is left to differ."""
    order = Order(train_split.shard_sizes(), 24, 4, 2, 9)
    one = replace(CPU, **settings)
    for micro_batch in (24, 6):
        loaders = [
            two_views(train_split, order, Recipe(), config, epochs=1, micro_batch=micro_batch)
            for config in (one, replace(one, engine_share=share))
        ]
        for expected, ours in zip(*loaders, strict=True):
            assert torch.equal(ours.views, expected.views)
