"""What each stage of the input pipeline costs on this machine, and which one holds it back.

    python scripts/bench/stages.py SHARDS                          # on the CPU, all cores
    python scripts/bench/stages.py SHARDS --device gpu --threads 8

Reading is timed alone (from the page cache, if the shards are in it). The stages of the graph are timed by building it
up to each of them, on images that are in memory already, and taking differences. The loader is timed as training uses
it, and once more with decoded pictures kept, where they fit. Medians over the rounds; two views of each image.
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from simclr_dali.shards.command_line import file_to_write, positive_int
from simclr_dali.shards.errors import UserError, run_main
from simclr_dali.shards.sources.source import SPLITS


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the input pipeline by stage.")
    parser.add_argument("data", type=Path, metavar="SHARDS", help="folder made by scripts/make_shards.sh")
    parser.add_argument("--split", choices=SPLITS, default="train", help="default: train")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="where the graph runs (default: cpu)")
    parser.add_argument("--threads", type=positive_int, default=len(os.sched_getaffinity(0)), help="default: the cores")
    parser.add_argument("--batch", type=positive_int, default=64, metavar="N", help="images a batch (default: 64)")
    parser.add_argument("--images", type=positive_int, default=512, metavar="N", help="a round (default: 512)")
    parser.add_argument("--rounds", type=positive_int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--size", type=positive_int, default=224, metavar="PX", help="of a view (default: 224)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there too")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import numpy as np
import torch

from simclr_dali.pipeline import graph
from simclr_dali.pipeline.batch_plan import BatchPlan
from simclr_dali.pipeline.draws import Recipe, draw_views
from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.kept_memory import set_aside
from simclr_dali.pipeline.loader import TwoViews, central_views
from simclr_dali.pipeline.order import Order
from simclr_dali.pipeline.reader import SampleReader

_WARM_UP = 4  # batches
# Each stage is the graph up to it, less the graph up to the stage before: where it ends, and the steps it has.
STAGES: dict[str, tuple[str | None, frozenset[str]]] = {
    "decode": ("decode", frozenset()),
    "crop": ("crop", frozenset()),
    "output": (None, frozenset()),
    "color": (None, frozenset({"color"})),
    "blur": (None, frozenset({"color", "blur"})),
}


def measure(split: Split, config: LoaderConfig, *, batch: int, images: int, rounds: int) -> dict[str, float]:
    """Milliseconds per image: of reading (all threads), of each stage of the graph, and of the whole loader.

    "take": of the thread that asks for a batch which lies ready, as a training does that computes longer than this; of
    decoded pictures that are kept, where they fit.
    """
    shards = split.shards
    order = Order(shards.shard_sizes(), batch, 1, 8, 0)
    batches = -(-images // batch)
    places = [divmod(number, order.steps_per_epoch) for number in range(batches)]
    ids = [order.batch(epoch, step) for epoch, step in places]
    reader = SampleReader(split)

    def read_all() -> None:
        with ThreadPoolExecutor(config.threads) as pool:
            list(pool.map(reader.read, ids))

    taken = {"read": _seconds(read_all, rounds)}
    batches_read = []
    for some in ids:
        rows = shards.samples[some]
        size = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
        batches_read.append((reader.read(some)[0], draw_views([Recipe()] * 2, order.seed, 0, some, *size)))
    reader.close()

    before = 0.0
    for stage, (until, steps) in STAGES.items():
        inputs = [graph.graph_inputs(images, draws, steps, config) for images, draws in batches_read]
        up_to = _seconds(_graph_run(cycle(inputs), config, batch, batches, until, steps), rounds)
        taken[stage], before = max(0.0, up_to - before), up_to
    taken["graph"] = before

    kept, _ = set_aside(shards, "auto", config.device, beside=lambda: 0)
    for name, pictures in {"loader": None, "kept": kept}.items():
        if pictures:
            for _ in central_views(split, config, batch=batch, kept=pictures):
                pass
        elif name == "kept":
            continue
        loader = TwoViews(split, BatchPlan(order, epochs=10**6), Recipe(), config, kept=pictures)
        taken[name] = _seconds(_load(loader, config, batches), rounds)
        waiting = _take_ready(loader, 1.5 * taken[name] / batches, rounds * batches)
        taken["take"] = batches * statistics.median(waiting)
        loader.close()
    return {name: 1e3 * seconds / (batches * batch) for name, seconds in taken.items()}


def _load(loader: TwoViews, config: LoaderConfig, batches: int) -> Callable[[], None]:
    for _ in range(_WARM_UP):
        next(loader)

    def load() -> None:
        for _ in range(batches):
            next(loader)
        _wait(config)

    return load


def _graph_run(
    inputs: Iterator[Any], config: LoaderConfig, batch: int, batches: int, until: str | None, steps: frozenset[str]
) -> Callable[[], None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The external source node", Warning)  # a cut graph leaves inputs unused
        pipeline = graph.build(lambda: next(inputs), config, batch=batch, views=2, steps=steps, until=until)
    for _ in range(_WARM_UP):
        pipeline.run()

    def run() -> None:
        for _ in range(batches):
            pipeline.run()
        _wait(config)

    return run


def _take_ready(loader: TwoViews, until_ready: float, count: int) -> Iterator[float]:
    """Seconds that each of ``count`` batches takes of who asks for it, after so many in which it could be made."""
    for _ in range(count):
        time.sleep(until_ready)
        started = time.perf_counter()
        next(loader)
        yield time.perf_counter() - started


def _wait(config: LoaderConfig) -> None:
    if config.device.type == "cuda":
        torch.cuda.synchronize(config.device)


def _seconds(run: Callable[[], None], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def verdict(taken: dict[str, float]) -> str:
    """The bottleneck in a sentence."""
    slowest = max(STAGES, key=lambda stage: taken[stage])
    if taken["read"] > taken["graph"]:
        return f"bottleneck: reading, {taken['read'] / taken['graph']:.1f} times as long as the graph"
    share = taken[slowest] / taken["graph"]
    around = taken["loader"] / taken["graph"] - 1
    return f"bottleneck: {slowest}, {share:.0%} of the graph; the loader takes {around:+.0%} on top of the graph"


def main(given: argparse.Namespace) -> None:
    if given.device == "gpu" and not torch.cuda.is_available():
        raise UserError("--device is gpu, but torch sees none here; leave it out to measure the CPU")
    on_gpu = given.device == "gpu"
    config = LoaderConfig(
        size=given.size,
        device=torch.device("cuda", 0) if on_gpu else torch.device("cpu"),
        threads=given.threads,
        dtype=torch.float16 if on_gpu else torch.float32,
    )
    split = Split.local(given.data, given.split)
    taken = measure(split, config, batch=given.batch, images=given.images, rounds=given.rounds)
    print(f"{given.threads} threads, {given.device}, two {given.size} px views, batch {given.batch}")
    print("stage     ms/image    images/s")
    for name, milliseconds in taken.items():
        rate = f"{1e3 / milliseconds:11,.0f}" if milliseconds else f"{'-':>11}"
        print(f"{name:8} {milliseconds:9.3f} {rate}")
    print(verdict(taken))
    print(f"a batch that lies ready takes {1e3 * taken['take'] * given.batch:,.0f} us of the thread that asks for it")
    if given.json:
        figures = {"ms_per_image": taken, "threads": given.threads, "device": given.device, "batch": given.batch}
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
