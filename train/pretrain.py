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
from pipeline.order import Order  # noqa: E402
from pipeline.remote import open_split  # noqa: E402
from shards.errors import UserError, positive_int, run_main  # noqa: E402
from shards.manifest import ShardSet  # noqa: E402
from shards.verify import verify_split  # noqa: E402
from train.config import Config  # noqa: E402
from train.config_file import load_config  # noqa: E402
from train.engine import Process, build_engine, start  # noqa: E402
from train.metrics import Reporter  # noqa: E402
from train.parking import Parked  # noqa: E402
from train.resume import resume, state_of  # noqa: E402
from train.schedule import LR_FORMULAS, learning_rate  # noqa: E402
from train.step import train_step  # noqa: E402
from train.views import build_order, build_views  # noqa: E402


def main() -> None:
    arguments = parse_arguments()
    config = load_config(arguments.config, arguments.set, arguments.data, arguments.run)
    shards, files = open_split(config.simclr.data, "train", config.shard_cache())
    order = build_order(config, shards)
    process = start()
    refuse_damage(shards, process)
    config.micro_batch(process.world)  # refuses a number of processes that cannot share the batch

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


def refuse_damage(shards: ShardSet, process: Process) -> None:
    """The fast check of shards.verify, by rank 0; seconds, once per start. All ranks hear of it and leave together.

    Remote shards are checked whole when they arrive.
    """
    checks = process.rank == 0 and not shards.source
    found = [next(iter(verify_split(shards, full=False)), None) if checks else None]
    dist.broadcast_object_list(found, 0)
    if found[0]:
        raise UserError(f"{found[0]}; look with: python -m shards.verify --full {shards.folder.parent}")


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
        f"{config.simclr.image_size} px, {process.world} x {process.device.type}, compiled: {config.simclr.compile}",
    )
    params, rule = config.optimizer.params, config.simclr.lr_rule
    say(
        process,
        f"{config.optimizer.type}, peak lr {params.lr:g} ({LR_FORMULAS.get(rule, 'no rule')}), weight decay "
        f"{params.weight_decay:g}, warm-up {config.simclr.warmup_epochs:g} epochs",
    )
    say(
        process,
        f"global batch {batch} ({process.world} x {passes} x {micro_batch}), {order.steps_per_epoch} steps per epoch, "
        f"{config.simclr.epochs} epochs; each view meets {2 * batch - 2} negatives, a loss of ln({2 * batch - 1}) = "
        f"{math.log(2 * batch - 1):.3f} is chance",
    )
    if passes > 1:
        say(process, f"{passes} passes of {micro_batch} images: the loss sees the whole batch, BatchNorm only a pass")
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
    batches = build_views(config, shards, files, order, process, first_step)
    views = Parked(process.device, config.local_batch(process.world) // config.micro_batch(process.world))
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
        views.fill(batch.views for batch in batches)
        reporter.waited(time.perf_counter() - asked)
        lr = learning_rate(step, config.optimizer.params.lr, warmup_steps, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        reporter.add(step, lr, train_step(engine, views, simclr.temperature, ring=simclr.ring))

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


if __name__ == "__main__":
    run_main(main, CheckpointError)
