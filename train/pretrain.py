"""SimCLR pre-training.

    deepspeed train/pretrain.py --config ds_lars.json                          # ImageNet, the paper's settings
    deepspeed --num_gpus 2 train/pretrain.py --config my.json --data /data/my-shards --run runs/my
    deepspeed train/pretrain.py --config ds_lars.json --set simclr.epochs=100

The config is a file or the name of a preset in train/configs; the data folder is one made by scripts/make_shards.sh, or
its address (s3://, gs://, http://).
The run folder gets config.json (as resolved), metrics.jsonl, speed.jsonl and checkpoints; the same command again goes
on from the newest checkpoint. Without a GPU it runs on the CPU; --num_gpus is then the number of processes.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

# This script's own folder must not shadow installed modules, and its checkout must win over an installed copy.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from model import checkpoint  # noqa: E402
from model.batchnorm import synchronised  # noqa: E402
from model.checkpoint import CheckpointError  # noqa: E402
from model.encoder import build_model  # noqa: E402
from pipeline.files import Files  # noqa: E402
from pipeline.loader import Setting, two_views  # noqa: E402
from pipeline.order import Order  # noqa: E402
from pipeline.remote import is_remote, open_split  # noqa: E402
from shards.errors import UserError, positive_int, run_main  # noqa: E402
from shards.manifest import ShardSet  # noqa: E402
from shards.verify import verify_split  # noqa: E402
from train.config import Config, load_config  # noqa: E402
from train.engine import Process, build_engine, start  # noqa: E402
from train.metrics import Reporter  # noqa: E402
from train.schedule import learning_rate  # noqa: E402
from train.step import train_step  # noqa: E402

# Fields of the config that may differ between the stopped run and the one that goes on. They change no number of it,
# but for the micro-batch, which BatchNorm sees where there are several: another machine may have less memory.
_FREE = {
    "train_micro_batch_size_per_gpu",
    *(
        f"simclr.{key}"
        for key in (
            "about",
            "data",
            "run",
            "loader_threads",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "max_bad_fraction",
            "cache",
            "cache_gb",
        )
    ),
}


def main() -> None:
    arguments = parse_arguments()
    config = load_config(arguments.config, arguments.set, arguments.data, arguments.run)
    shards, files = open_split(config.simclr.data, "train", config.shard_cache())
    order = build_order(config, shards)
    process = start()
    refuse_damage(shards, process)
    config.local_batch(process.world)  # refuses a number of processes that cannot share the batch

    model = synchronised(build_model(config.architecture(), config.simclr.seed), process.device)
    engine, optimizer = build_engine(model, config, process)
    run = Path(config.simclr.run)
    total_steps = config.simclr.epochs * order.steps_per_epoch
    step = resume(run, config, shards, engine.module, optimizer)
    if step == total_steps:
        say(process, f"{run} is finished ({total_steps} steps); nothing to do")
        return
    if process.rank == 0:
        prepare_run_folder(run, config)
        announce(config, shards, order, process, step)
    dist.barrier()

    last_step = min(total_steps, step + (arguments.stop_after_steps or total_steps))
    train(engine, optimizer, config, shards, files, order, process, run, step, last_step)
    dist.barrier()
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="SimCLR pre-training", epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a JSON file, or a preset of train/configs")
    parser.add_argument("--data", help="folder of packed shards (default: the config's simclr.data)")
    parser.add_argument("--run", help="run folder (default: the config's simclr.run, or runs/CONFIG)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key, as in simclr.epochs=100"
    )
    parser.add_argument(
        "--stop-after-steps",
        type=positive_int,
        metavar="N",
        help="save and leave after N steps; the same command goes on",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser.parse_args()


def build_order(config: Config, shards: ShardSet) -> Order:
    return Order(
        shard_sizes=shards.shard_sizes(),
        global_batch=config.train_batch_size,
        lanes=config.simclr.lanes,
        window=config.simclr.shuffle_window,
        seed=config.simclr.seed,
    )


def refuse_damage(shards: ShardSet, process: Process) -> None:
    """The fast check of shards.verify, by rank 0; seconds, once per start. All ranks hear of it and leave together.

    Remote shards are checked whole when they arrive.
    """
    checks = process.rank == 0 and not shards.source
    found = [next(iter(verify_split(shards, full=False)), None) if checks else None]
    dist.broadcast_object_list(found, 0)
    if found[0]:
        raise UserError(f"{found[0]}; look with: python -m shards.verify --full {shards.folder.parent}")


def resume(
    run: Path, config: Config, shards: ShardSet, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Load the newest checkpoint of ``run``, if there is one; return the step to go on with.

    Raises UserError where the run was made with another data set or other settings.
    """
    found = checkpoint.newest(run)
    if found is None:
        return 0
    state = found.state
    if state["manifest"] != shards.fingerprint:
        raise UserError(
            f"{run} was trained on another data set than {shards.folder} (the manifests differ); give another --run "
            f"or the same --data"
        )
    before, now = flatten(state["config"]), flatten(config.model_dump(mode="json"))
    for key in sorted((before.keys() | now.keys()) - _FREE):
        if before.get(key) != now.get(key):
            raise UserError(
                f"{run} was made with {key} = {before.get(key)!r}, this command gives {now.get(key)!r}; give another "
                f"--run"
            )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    step: int = state["step"]
    return step


def flatten(block: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in block.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def prepare_run_folder(run: Path, config: Config) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")


def announce(config: Config, shards: ShardSet, order: Order, process: Process, step: int) -> None:
    batch, micro_batch = config.train_batch_size, config.micro_batch(process.world)
    passes = config.local_batch(process.world) // micro_batch
    encoder = config.architecture()
    say(
        process,
        f"{len(shards):,} images of {len(shards.classes)} classes in {shards.source or shards.folder}, "
        f"run folder {config.simclr.run}",
    )
    say(
        process,
        f"{encoder.name} x{encoder.width:g}, {encoder.stem} stem, projector {'-'.join(map(str, encoder.projector))}, "
        f"{config.simclr.image_size} px, "
        f"{process.world} x {process.device.type}",
    )
    say(
        process,
        f"global batch {batch} ({process.world} x {passes} x {micro_batch}), peak lr {config.optimizer.params.lr:g}, "
        f"{order.steps_per_epoch} steps "
        f"per epoch, {config.simclr.epochs} epochs; each view meets {2 * batch - 2} negatives, a loss of "
        f"ln({2 * batch - 1}) = "
        f"{math.log(2 * batch - 1):.3f} is chance",
    )
    if step:
        say(process, f"going on from step {step}")


def say(process: Process, text: str) -> None:
    if process.rank == 0:
        print(text, flush=True)


def train(
    engine: Any,
    optimizer: torch.optim.Optimizer,
    config: Config,
    shards: ShardSet,
    files: Callable[[], Files],
    order: Order,
    process: Process,
    run: Path,
    first_step: int,
    last_step: int,
) -> None:
    """Run steps first_step .. last_step - 1, with checkpoints."""
    simclr, steps_per_epoch = config.simclr, order.steps_per_epoch
    total_steps = simclr.epochs * steps_per_epoch
    warmup_steps = round(simclr.warmup_epochs * steps_per_epoch)
    micro_batch = config.micro_batch(process.world)
    batches = two_views(
        shards,
        order,
        simclr.views.recipes(),
        Setting(
            size=simclr.image_size,
            device=process.device,
            threads=simclr.loader_threads or process.cores,
            dtype=torch.float16 if process.device.type == "cuda" and config.torch_autocast.enabled else torch.float32,
            interpolation=simclr.views.interpolation,
        ),
        epochs=simclr.epochs,
        start=divmod(first_step, steps_per_epoch),
        rank=process.rank,
        world=process.world,
        micro_batch=micro_batch,
        max_bad_fraction=simclr.max_bad_fraction,
        files=files,
    )
    micro_batches_per_step = config.local_batch(process.world) // micro_batch
    reporter = Reporter(
        run,
        process,
        batch=config.train_batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        first_step=first_step,
    )
    last_checkpoint = "none yet" if not first_step else f"step {first_step}"
    engine.train()
    started = time.monotonic()
    for step in range(first_step, last_step):
        asked = time.perf_counter()
        views = [batch.views for batch in islice(batches, micro_batches_per_step)]
        reporter.waited(time.perf_counter() - asked)
        lr = learning_rate(step, config.optimizer.params.lr, warmup_steps, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        reporter.add(step, lr, train_step(engine, views, simclr.temperature))

        done = step + 1
        save_now = done == last_step or done % simclr.checkpoint_every == 0
        if save_now or done % simclr.log_every == 0:
            reporter.drain(last_checkpoint)
        if save_now:
            if process.rank == 0:
                checkpoint.save(run, state_of(engine.module, optimizer, config, shards, done), simclr.keep_checkpoints)
            last_checkpoint = f"step {done}"
    if damaged := batches.damaged():
        print(f"rank {process.rank} replaced {len(damaged)} damaged samples, named above", file=sys.stderr, flush=True)
    batches.close()
    if sys.stdout.isatty():
        say(process, "")
    seconds = time.monotonic() - started
    if process.rank == 0 and last_step == total_steps:
        finished = {
            "steps": total_steps,
            "images_per_s": round(reporter.images_per_s(), 2),
            "seconds": round(seconds, 1),
        }
        (run / "finished.json").write_text(json.dumps(finished) + "\n")
    say(
        process,
        f"{last_step - first_step} steps in {seconds:.1f} s, {reporter.images_per_s():,.0f} images/s; {run} is at "
        f"step {last_step} of {total_steps}",
    )


def state_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: Config, shards: ShardSet, step: int
) -> dict[str, Any]:
    """Everything that a run needs to go on, and an evaluation to read it, in tensors and plain values."""
    return {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "architecture": checkpoint.describe(config.architecture()),
        "image_size": config.simclr.image_size,
        "seed": config.simclr.seed,
        "data": config.simclr.data if is_remote(config.simclr.data) else str(Path(config.simclr.data).resolve()),
        "config": config.model_dump(mode="json"),
        "manifest": shards.fingerprint,
        "versions": {"torch": str(torch.__version__), "deepspeed": sys.modules["deepspeed"].__version__},
    }


if __name__ == "__main__":
    run_main(main, CheckpointError)
