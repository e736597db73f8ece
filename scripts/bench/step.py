"""Where the time of a training step goes, with input that is there already and with the real input.

    deepspeed scripts/bench/step.py --config ds_lars.json --json FILE            # a GPU per process
    deepspeed --num_gpus 2 scripts/bench/step.py --config imagenette.json --data SHARDS
    python scripts/bench/step.py --config ds_lars.json --synthetic-only          # needs no data
    python scripts/bench/step.py --config ds_lars.json --synthetic-only --compile eager compiled deterministic

Model, engine, loss and input are those that train/pretrain.py builds from the same config (--set works too). Each round
runs --steps steps on random views that lie on the device, then --steps steps on the views of the shards, after
--warm-up steps each, and before real views as many more as batches lie ready. The phases of a step are the time from
one mark to the next: on a GPU by events in its stream, so that nothing waits while measuring and "data wait" is time in
which the GPU had nothing to do; on a CPU by the clock.

    data wait   until the views are there
    forward     encoder and projector; with several micro-batches both passes, and bringing their views back
    loss        NT-Xent, its share of the gathering, and the metrics
    backward    from the loss to the gradients of this process, and their norm
    reduction   waiting for the means of the gradients over processes, most of which are made during backward
    optimizer   update and zeroing

Of a round, a step's time is the whole time over the number of steps, a phase's the mean over the steps. Figures are
medians over the rounds with the extremes. "lost to input" is 1 - synthetic / real of the step's time within a round.
"first step" is when the first was done, from the start of the process. --compile measures ways to compute the same step
(ROWS below), each in a process of its own, one after the other, and compares them with the first.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from simclr_dali.shards.command_line import file_to_write, positive_int
from simclr_dali.shards.errors import UserError, run_main

# Ways to compute a step, by what the config is set to; all but the first are compiled.
ROWS = {
    "eager": ("simclr.compile=no",),
    "compiled": ("simclr.compile=inductor",),
    "tuned": ("simclr.compile=coordinate-descent-tuning",),
    "autotuned": ("simclr.compile=max-autotune-no-cudagraphs",),
    "kernels": ("simclr.compile=inductor", "simclr.batchnorm_kernels=true"),
    "deterministic": ("simclr.compile=inductor", "simclr.deterministic=true"),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="a JSON file, or a preset of train/configs")
    parser.add_argument("--data", help="folder of packed shards (default: the config's simclr.data)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")
    parser.add_argument("--compile", nargs="+", choices=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--synthetic-only", action="store_true", help="leave the real input out")
    parser.add_argument("--steps", type=positive_int, default=10, help="measured, a round (default: 10)")
    parser.add_argument("--warm-up", type=positive_int, default=3, help="steps before, a round (default: 3)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="default: 3")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there too")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import torch
from torch import Tensor

from scripts.bench.figures import extremes, machine, spread
from simclr_dali.model.ntxent import NTXent
from simclr_dali.model.process import Process, leave
from simclr_dali.model.simclr import build_model
from simclr_dali.pipeline.remote import open_split
from simclr_dali.train.config import Config
from simclr_dali.train.config_file import load_config
from simclr_dali.train.determinism import compute_deterministically
from simclr_dali.train.engine import build_engine, deepspeed_config, start
from simclr_dali.train.footprint import bytes_per_image
from simclr_dali.train.job import Job, build_order, view_dtype
from simclr_dali.train.micro_batches import MicroBatches
from simclr_dali.train.step import train_step

PHASES = ("data wait", "forward", "loss", "backward", "reduction", "optimizer")
BEGIN = "begin"  # of a step
PACKAGES = ("torch", "deepspeed", "nvidia-dali-cuda120")


class Clock:
    """Marks where a phase begins; nothing is read, and so nothing waits, before the end."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """A phase begins; BEGIN begins a step."""
        if self._on_gpu:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((phase, now))

    def timed(self, source: Iterator[Tensor]) -> Iterator[Tensor]:
        """``source``, with the time until each of its tensors is there marked as data wait."""
        while True:
            self.mark("data wait")
            views = next(source, None)
            self.mark("forward")
            if views is None:
                return
            yield views

    def read(self) -> list[dict[str, float]]:
        """Milliseconds of each phase of each step marked since the last call."""
        if self._on_gpu:
            torch.cuda.synchronize()
        steps: list[dict[str, float]] = []
        for (phase, begun), (_, ended) in pairwise(self._marks):
            if phase == BEGIN:
                steps.append(dict.fromkeys(PHASES, 0.0))
                phase = PHASES[0]
            steps[-1][phase] += begun.elapsed_time(ended) if self._on_gpu else 1e3 * (ended - begun)
        self._marks.clear()
        return steps


class TimedEngine:
    """DeepSpeed's engine as train_step uses it, with marks."""

    def __init__(self, engine: Any, clock: Clock) -> None:
        self._engine, self._clock, self.module = engine, clock, engine.module
        reduction = getattr(engine, "reduction", None)
        if reduction is None:  # one process
            return
        finish: Callable[[], None] = reduction.finish

        def timed() -> None:
            clock.mark("reduction")
            finish()
            clock.mark("backward")

        reduction.finish = timed

    def __call__(self, views: Tensor) -> Any:
        self._clock.mark("forward")
        z = self._engine(views)
        if torch.is_grad_enabled():
            self._clock.mark("loss")
        return z

    def backward(self, loss: Tensor, **named: Any) -> None:
        self._clock.mark("backward")
        self._engine.backward(loss, **named)

    def step(self) -> None:
        self._clock.mark("optimizer")
        self._engine.step()
        self._clock.mark("forward")  # of the next micro-batch, if there is one


def main(given: argparse.Namespace) -> None:
    data = "unused" if given.synthetic_only else given.data
    config = load_config(given.config, given.set, data, "unused")
    if config.simclr.deterministic:
        compute_deterministically()
    process = start(timedelta(minutes=30))
    config.micro_batch(process.world)  # refuses a number of processes that cannot share the batch
    network = build_model(config.architecture(), config.simclr.seed)
    engine, optimizer = build_engine(network, config, process)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the same work, and the loss stays what it is however long this runs
    clock = Clock(process.device)
    timed = TimedEngine(engine, clock)
    inputs: dict[str, Iterator[Tensor]] = {"synthetic": random_views(config, process)}
    loader, ready = None, 0
    if not given.synthetic_only:
        split = open_split(config.simclr.data, "train", config.shard_cache())
        loader = Job(config, split, build_order(config, split.shards), process, Path(config.simclr.run)).views()
        inputs["real"] = (batch.views for batch in loader)
        passes = config.passes(process.world)
        # Batches that lie ready, in the graph and in hand, were made while something else was measured.
        ready = -(-(config.simclr.graph.on(process.device.type)["prefetch"] + 3) // passes)
        steps = given.rounds * (given.warm_up + ready + given.steps)
        if steps * passes > len(loader):
            raise UserError(
                f"{steps} steps are asked for, but the run has {len(loader) // passes}; lower --steps or --rounds, or "
                "set simclr.epochs higher"
            )
    engine.train()
    run(timed, clock, config, process, inputs["synthetic"], 1)
    if engine.compiled_by and engine.compiled_by.failed:
        raise UserError("the network could not be compiled, as the warning above says, so there is nothing to measure")
    first_step = time.monotonic() - STARTED
    rounds: dict[str, list[list[dict[str, float]]]] = {name: [] for name in inputs}
    for _ in range(given.rounds):
        for name, views in inputs.items():
            before = given.warm_up + (ready if name == "real" else 0)
            rounds[name].append(run(timed, clock, config, process, views, before + given.steps)[before:])
    if loader is not None:
        loader.close()
    if process.rank == 0:
        report(given, config, process, rounds, first_step)
    leave(process)


def random_views(config: Config, process: Process) -> Iterator[Tensor]:
    size, rows = config.simclr.image_size, 2 * config.micro_batch(process.world)
    views = torch.randn(rows, size, size, 3, device=process.device, dtype=view_dtype(config, process.device))
    while True:
        yield views.permute(0, 3, 1, 2)


def run(
    engine: TimedEngine,
    clock: Clock,
    config: Config,
    process: Process,
    views: Iterator[Tensor],
    steps: int,
) -> list[dict[str, float]]:
    """Milliseconds of the phases of each of these steps."""
    micro_batches = MicroBatches(process.device, config.passes(process.world))
    loss = NTXent(config.simclr.temperature)
    for _ in range(steps):
        clock.mark(BEGIN)
        micro_batches.begin(clock.timed(views))
        train_step(engine, micro_batches, loss)
    clock.mark("end")
    return clock.read()


def report(
    given: argparse.Namespace,
    config: Config,
    process: Process,
    rounds: dict[str, list[list[dict[str, float]]]],
    first_step: float,
) -> None:
    device = "gpu" if process.device.type == "cuda" else "cpu"
    on = machine(device, PACKAGES)
    micro_batch = config.micro_batch(process.world)
    passes = config.passes(process.world)
    print(
        f"{on['machine']}, {on['cores']} cores, {config.simclr.encoder.name} at {config.simclr.image_size} px, "
        f"global batch {config.train_batch_size} = {process.world} x {passes} x {micro_batch}, {given.rounds} rounds "
        f"of {given.steps} steps"
    )
    about = {name: getattr(given, name) for name in ("config", "set", "rounds", "steps", "warm_up")}
    result: dict[str, Any] = {**about, "processes": process.world, **on}
    whole: dict[str, list[float]] = {}
    for name, found in rounds.items():
        whole[name] = [statistics.mean(sum(step.values()) for step in steps) for steps in found]
        print(f"{name} input: {spread(whole[name], 1)} ms a step, {rate(config, whole[name])} images/s")
        result[name] = {"step": extremes(whole[name])}
        for phase in PHASES:
            times = [statistics.mean(step[phase] for step in steps) for steps in found]
            result[name][phase] = extremes(times)
            share = statistics.median(times) / statistics.median(whole[name])
            print(f"    {phase:10} {spread(times, 2):>32} ms {share:7.1%}")
    if "real" in whole:
        lost = [100 * (1 - best / real) for best, real in zip(whole["synthetic"], whole["real"], strict=True)]
        print(f"lost to input: {spread(lost, 1)} %")
        result["lost to input, %"] = extremes(lost)
    result["peak memory, MB"] = peak_memory(device) / 1e6
    result["first step, s"] = first_step
    autocast = deepspeed_config(config, process)["torch_autocast"]["enabled"]
    kept = bytes_per_image(config.architecture(), config.simclr.image_size, autocast=autocast) / 1e6
    result["kept of an image, MB"] = kept
    print(
        f"peak memory of a process: {result['peak memory, MB']:,.0f} MB; an image keeps {kept:.1f} MB for the backward "
        f"pass, uncompiled; first step after {first_step:.1f} s"
    )
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


def rate(config: Config, milliseconds: list[float]) -> str:
    return spread([1e3 * config.train_batch_size / taken for taken in milliseconds], 1)


def peak_memory(device: str) -> float:
    """Bytes: of torch's allocator on a GPU, of the whole process on a CPU."""
    if device == "gpu":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compare(given: argparse.Namespace, words: list[str]) -> None:
    """Measure each of ``given.compile`` by this script with ``words``, and compare them with the first."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--compile starts processes of its own; with a launcher, give what a row sets by --set")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for row in given.compile:
            print(f"{row}: {' '.join(ROWS[row])}", flush=True)
            out = Path(folder) / "row.json"
            settings = [word for value in ROWS[row] for word in ("--set", value)]
            done = subprocess.run([sys.executable, __file__, *words, *settings, "--json", out], check=False)
            if done.returncode:
                found[row] = {"failed": done.returncode}
            else:
                found[row] = json.loads(out.read_text())
            if given.json:  # after each, since the next may take long
                given.json.write_text(json.dumps({"rows": found}, indent=1) + "\n")
    measured = {row: result for row, result in found.items() if "failed" not in result}
    if not measured:
        raise UserError("no row could be measured; their errors are above")
    first = next(iter(measured))
    for row, result in found.items():
        if row not in measured:
            print(f"{row:14} failed, see above")
            continue
        step, base = (measured[name]["synthetic"]["step"]["median"] for name in (row, first))
        print(
            f"{row:14} {step:10,.1f} ms a step  {base / step:6.2f} x {first}  "
            f"{result['peak memory, MB']:9,.0f} MB  first step after {result['first step, s']:.0f} s  "
            f"({' '.join(ROWS[row])})"
        )
    if len(measured) < len(found):
        sys.exit(1)


def without_rows(words: list[str]) -> list[str]:
    """The words of a command line but for --compile, --json and what belongs to them."""
    kept, skipping = [], False
    for word in words:
        if word.startswith("--"):
            skipping = word.partition("=")[0] in ("--compile", "--json")
        if not skipping:
            kept.append(word)
    return kept


if __name__ == "__main__":
    if ARGUMENTS.compile:
        run_main(lambda: compare(ARGUMENTS, without_rows(sys.argv[1:])))
    else:
        run_main(lambda: main(ARGUMENTS), shares_work=True)
