"""How well are samples mixed? Our order against DALI's reader shuffle and a true permutation, at ImageNet's size.

    python scripts/bench/shuffle.py [--json FILE]

1,281,167 samples in shards of 1,000, a global batch of 4,096 over 8 processes, one epoch of each. DALI's reader
(fn.readers.webdataset, random_shuffle) is the real one, on shards whose samples hold their own number. Per order:

- shards: how many different shards a global batch draws from, and the share of the commonest;
- pairs: how often two samples of a batch come from one shard, relative to a true permutation (1 is ideal);
- classes: how many of 1,000 classes a batch holds if the storage were sorted by class, the worst case for an order
  (our packer shuffles all images once, after which every order sees nearly as many classes as a true permutation);
- correlation: Spearman's, between storage position and place in the epoch.

Also the time of a cold ``Order.batch``, at random positions; and our order on 100 million samples, in shards of 1,000
and of 10,000: shards and pairs of 30 batches spread over an epoch, and how many shards are read from at a time, with
those that come after, which is what a cache of remote shards has to hold. About 2 minutes and 700 MB of disk.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2] / ".package")

from simclr_dali.shards.command_line import file_to_write
from simclr_dali.shards.errors import run_main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there too")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import numpy as np
import numpy.typing as npt
from nvidia.dali import fn, pipeline_def
from scipy.stats import spearmanr

from simclr_dali.pipeline import order as order_module
from simclr_dali.pipeline.order import Order

SAMPLES, SHARD, CLASSES = 1_281_167, 1_000, 1_000
BATCH, WORLD, LANES, WINDOW = 4_096, 8, 64, 8
LARGE, BATCHES_OF_LARGE = 100_000_000, 30
BLOCK = 512  # bytes; DALI wants samples on such borders

Ids = npt.NDArray[np.int64]


def main(arguments: argparse.Namespace) -> None:

    sizes = [min(SHARD, SAMPLES - at) for at in range(0, SAMPLES, SHARD)]
    ours = Order(tuple(sizes), BATCH, LANES, WINDOW, seed=0)
    rows = {
        "true permutation": measure(np.random.default_rng(0).permutation(SAMPLES)),
        "ours": measure(np.concatenate([ours.batch(0, step) for step in range(ours.steps_per_epoch)])),
    }
    with tempfile.TemporaryDirectory() as folder:
        tars = list(write_numbered_shards(Path(folder), sizes))
        for fill in (1024, 4096):
            for permuted in (False, True):
                name = f"DALI initial_fill {fill}{', shards permuted' if permuted else ''}"
                rows[name] = measure(dali_epoch(tars, fill, permuted))

    print(f"{'':36} shards  commonest  pairs  classes  correlation")
    for name, row in rows.items():
        print(
            f"{name:36} {row['shards']:6.1f} {row['commonest']:10.2%} {row['pairs']:6.1f} {row['classes']:8.1f}"
            f" {row['correlation']:12.3f}"
        )
    cold = cold_times(ours)
    print(
        f"a batch of {BATCH} at a random position, nothing cached: {np.median(cold):.1f} ms (max {max(cold):.1f}) for "
        f"all lanes, of {len(cold)}"
    )
    large = {}
    for per_shard in (1_000, 10_000):
        found = large[str(per_shard)] = of_large(per_shard)
        print(
            f"100 million samples in shards of {per_shard:,}: a batch draws from {found['shards']:.0f}, pairs "
            f"{found['pairs']:.1f}; {found['current']} are read from at a time, {found['with_next']} with the next"
        )
    if arguments.json:
        result = {"orders": rows, "large": large, "cold_batch_ms": {"median": float(np.median(cold)), "max": max(cold)}}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def of_large(per_shard: int) -> dict[str, float]:
    order = Order((per_shard,) * (LARGE // per_shard), BATCH, LANES, WINDOW, seed=0)
    steps = np.linspace(0, order.steps_per_epoch - 1, BATCHES_OF_LARGE).astype(int).tolist()
    found = measure(np.concatenate([order.batch(0, step) for step in steps]), per_shard, LARGE)
    windows = [order.windows(0, step) for step in steps]
    return {
        "shards": found["shards"],
        "pairs": found["pairs"],
        "current": max(len(current) for current, _ in windows),
        "with_next": max(len(current) + len(after) for current, after in windows),
    }


def measure(ids: Ids, per_shard: int = SHARD, samples: int = SAMPLES) -> dict[str, float]:
    """The figures of an epoch that visits ``ids`` in this order, averaged over its full batches."""
    batches = ids[: len(ids) // BATCH * BATCH].reshape(-1, BATCH)
    shards, commonest, pairs, classes = [], [], [], []
    for batch in batches:
        counts = np.bincount(batch // per_shard)
        shards.append(np.count_nonzero(counts))
        commonest.append(counts.max() / BATCH)
        pairs.append((counts * (counts - 1)).sum() / (BATCH * (BATCH - 1)))
        classes.append(len(np.unique(batch * CLASSES // samples)))
    by_chance = (per_shard - 1) / (samples - 1)
    return {
        "shards": float(np.mean(shards)),
        "commonest": float(np.mean(commonest)),
        "pairs": float(np.mean(pairs)) / by_chance,
        "classes": float(np.mean(classes)),
        "correlation": float(spearmanr(ids, np.arange(len(ids))).statistic),
    }


def write_numbered_shards(folder: Path, sizes: list[int]) -> Iterator[tuple[str, str]]:
    """What DALI takes for tars with an index; each sample is one block that begins with its number."""
    first = 0
    for number, size in enumerate(sizes):
        blocks = np.zeros((size, BLOCK // 8), np.int64)
        blocks[:, 0] = first + np.arange(size)
        tar, index = folder / f"{number:06d}.tar", folder / f"{number:06d}.idx"
        blocks.tofile(tar)
        lines = [f"bin {at * BLOCK} 8 {at}.bin" for at in range(size)]
        index.write_text(f"v1.2 {size}\n" + "\n".join(lines) + "\n")
        first += size
        yield str(tar), str(index)


def dali_epoch(tars: list[tuple[str, str]], fill: int, permuted: bool) -> Ids:
    """One epoch in global batches, rank by rank, as DALI's reader shuffles."""
    share = BATCH // WORLD
    steps = SAMPLES // WORLD // share

    @pipeline_def(batch_size=share, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def reader(rank: int) -> object:
        return fn.readers.webdataset(
            paths=[tar for tar, _ in tars],
            index_paths=[index for _, index in tars],
            ext=["bin"],
            random_shuffle=True,
            initial_fill=fill,
            shuffle_after_epoch=permuted,
            num_shards=WORLD,
            shard_id=rank,
            seed=rank,
            dont_use_mmap=True,
            tensor_init_bytes=16,
        )

    parts = []
    for rank in range(WORLD):
        pipeline = reader(rank)
        pipeline.build()
        outputs = (pipeline.run()[0].as_array() for _ in range(steps))
        parts.append(np.stack([output.view(np.int64).reshape(share) for output in outputs]))
    return np.concatenate(parts, axis=1).reshape(-1)


def cold_times(order: Order) -> list[float]:
    """Milliseconds of the first batch asked of an order, at random positions."""
    random, times = np.random.default_rng(0), []
    for _ in range(50):
        order_module.layout.cache_clear()
        epoch, step = int(random.integers(200)), int(random.integers(order.steps_per_epoch))
        started = time.perf_counter()
        order.batch(epoch, step)
        times.append(1e3 * (time.perf_counter() - started))
    return times


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
