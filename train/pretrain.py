"""Pre-train an encoder with SimCLR.

    deepspeed train/pretrain.py --config ds_lars.json                          # ImageNet, the paper's settings
    deepspeed --num_gpus 2 train/pretrain.py --config my.json --data /data/my-shards --run runs/my
    deepspeed train/pretrain.py --config ds_lars.json --set simclr.epochs=100
    deepspeed train/pretrain.py --config ds_lars.json --plan                   # what it will take, in under a minute

The config is a file or the name of a preset in train/configs; the data folder is one made by scripts/make_shards.sh, or
its address (s3://, gs://, http://).
The run folder gets config.json (as resolved), metrics.jsonl, speed.jsonl, knn.jsonl (where it is asked for) and
checkpoints, and finished.json at the end; the same command again goes on from the newest checkpoint. SIGTERM, SIGINT
(Ctrl-C) and SIGUSR1 save within two steps and leave with exit code 0. Without a GPU it runs on the CPU; --num_gpus is
then the number of processes.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This script's own folder must not shadow installed modules, and its checkout must win over an installed copy.
    sys.path[0] = str(Path(__file__).resolve().parents[1] / ".package")

from simclr_dali.shards.command_line import parser_of, positive_int
from simclr_dali.shards.errors import UserError, run_main


class HelpConfig(argparse.Action):
    """Answers --help-config, also where nothing else is given."""

    def __call__(self, parser: argparse.ArgumentParser, _: argparse.Namespace, key: Any, __: Any = None) -> None:
        from simclr_dali.train.help_config import help_config  # here: --help is to be quick

        try:
            print(help_config(str(key)))
        except UserError as error:
            parser.error(str(error))
        parser.exit()


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--help-config",
        nargs="?",
        const="",
        metavar="KEY",
        action=HelpConfig,
        help="Say what the keys of a config mean: all of them, one, or those of a block such as simclr.views.",
    )
    parser.add_argument("--config", required=True, help="Take this JSON file, or preset of train/configs.")
    parser.add_argument("--data", help="Train on this folder of shards (default: the config's simclr.data).")
    # torchrun takes --run for one of its own options; --out is what it leaves alone.
    parser.add_argument(
        "--run", "--out", help="Keep the run in this folder (default: the config's simclr.run, or runs/CONFIG)."
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="Override one key, as in simclr.epochs=100."
    )
    parser.add_argument(
        "--stop-after-steps",
        type=positive_int,
        metavar="N",
        help="Save and leave after N steps; the same command goes on.",
    )
    parser.add_argument(
        "--hang-timeout",
        type=positive_int,
        default=1800,
        metavar="SECONDS",
        help="End the run, naming who holds it up, where a step takes longer (default: 1800).",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="Check everything, time a few steps, say what the run will take and need, and write nothing.",
    )
    parser.add_argument(
        "--gpus",
        type=positive_int,
        metavar="N",
        help="With --plan, estimate the run on N GPUs, which need not be here.",
    )
    given = parser.parse_args()
    if given.gpus and not given.plan:
        parser.error("--gpus is for --plan; the launcher says on how many GPUs a run is started")
    return given


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import torch.distributed as dist

from simclr_dali.model.process import Process, from_all_ranks, leave, on_rank_0, print_rank_0
from simclr_dali.model.simclr import build_model
from simclr_dali.pipeline.remote import open_split
from simclr_dali.shards.durable import write_durably
from simclr_dali.shards.manifest import ShardSet
from simclr_dali.shards.verify import damage_at_start
from simclr_dali.train.announce import announce, record_start
from simclr_dali.train.config import Config
from simclr_dali.train.config_file import load_config
from simclr_dali.train.determinism import compute_deterministically
from simclr_dali.train.elastic import let_go_who_stands_by, stand_by_where_left_over
from simclr_dali.train.engine import build_engine, start
from simclr_dali.train.initial_weights import take_weights
from simclr_dali.train.job import Job, begin_tracking, build_order, keep_decoded
from simclr_dali.train.knn_monitor import KnnMonitor
from simclr_dali.train.lock import lock_run
from simclr_dali.train.loop import train, write_finished
from simclr_dali.train.plan import make_plan
from simclr_dali.train.resume import PER_MACHINE, computed_by, settings, state_to_go_on_with, tell_other_rounding
from simclr_dali.train.stopping import StopRequest
from simclr_dali.train.watchdog import Watchdog


def main(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.set, arguments.data, arguments.run)
    split = open_split(config.simclr.data, "train", config.shard_cache())
    shards = split.shards
    order = build_order(config, shards)
    stand_by_where_left_over(config)
    stop = StopRequest()
    if config.simclr.deterministic:
        compute_deterministically()
    # Longer than the watchdog's patience: it names who holds the run up, the end of a collective does not.
    process = start(timedelta(seconds=arguments.hang_timeout) + timedelta(minutes=10))
    watchdog = Watchdog(process, arguments.hang_timeout)
    refuse_differences(config, shards, process)
    refuse_damage(shards, process)
    config.micro_batch(process.world)  # refuses a number of processes that cannot share the batch
    job = Job(config, split, order, process, Path(config.simclr.run))
    if arguments.plan:
        make_plan(job, watchdog, arguments.gpus)
    else:
        carry_out(job, arguments.stop_after_steps, stop, watchdog)
    watchdog.at("the end, waiting for the other ranks")
    dist.barrier()  # with the watchdog: rank 0 may be closing trackers
    watchdog.stop()
    let_go_who_stands_by(process)
    leave(process)


def carry_out(job: Job, stop_after_steps: int | None, stop: StopRequest, watchdog: Watchdog) -> None:
    """Begin the run, or go on with it, to its end or for so many steps."""
    config, process, shards = job.config, job.process, job.split.shards
    with ExitStack() as locked:
        locked.enter_context(run_locked(job.run, process))
        state = state_to_go_on_with(job.run, config, shards, process)
        step = state["step"] if state else 0
        about_kept = ""
        if step < job.total_steps:
            epochs_left = (job.total_steps - step) / job.order.steps_per_epoch
            kept, about_kept = keep_decoded(config, shards, process, epochs_left)
            job = replace(job, kept=kept, trackers=locked.enter_context(begin_tracking(job, step)))
        batches = locked.enter_context(closing(job.views(step)))
        if step < job.total_steps:
            batches.start()  # read, decoded and drawn while the network is built
        if state and process.rank == 0:
            tell_other_rounding(state, computed_by(config, process, keeps_decoded=job.kept is not None))
        network = build_model(config.architecture(), config.simclr.seed)
        if state:
            job = replace(job, begun_with=state.get("begun_with"))
        elif config.simclr.init_from:
            told, begun_with = on_rank_0(process, lambda: take_weights(network, config.simclr.init_from))
            print_rank_0(process, told)
            job = replace(job, begun_with=begun_with)
        engine, optimizer = build_engine(network, config, process)
        if state:
            engine.module.load_state_dict(state.pop("model"))
            optimizer.load_state_dict(state.pop("optimizer"))
        finished = job.run / "finished.json"
        if step < job.total_steps:
            if process.rank == 0:
                finished.unlink(missing_ok=True)  # of a run whose last checkpoint was damaged
                write_durably(job.run / "config.json", (json.dumps(config.model_dump(mode="json"), indent=2)).encode())
                record_start(job, step)
                announce(job, step, about_kept)
            last_step = min(job.total_steps, step + (stop_after_steps or job.total_steps))
            train(job, engine, optimizer, batches, stop, watchdog, step, last_step)
        else:
            KnnMonitor(job, watchdog).run_missed_check(engine.module, step)
            if process.rank == 0 and not finished.exists():  # killed between the last checkpoint and this
                write_finished(job)
            print_rank_0(process, f"{job.run} is finished ({step} steps); nothing to do")


@contextmanager
def run_locked(run: Path, process: Process) -> Iterator[None]:
    """Keep other runs out of the run folder; rank 0 asks for it, all ranks hear the answer."""
    with ExitStack() as stack:

        def lock_it() -> None:
            stack.enter_context(lock_run(run))

        on_rank_0(process, lock_it)
        yield


def refuse_differences(config: Config, shards: ShardSet, process: Process) -> None:
    """All ranks must have read the same settings and the same data set, each from its own machine's files."""
    everywhere = from_all_ranks({**settings(config, PER_MACHINE), "the manifest of the data": shards.fingerprint})
    for rank, there in enumerate(everywhere):
        for key, value in everywhere[0].items():
            if there.get(key) != value:
                raise UserError(
                    f"rank {rank} has {key} = {there.get(key)!r}, rank 0 has {value!r}; give all machines the same "
                    f"config and the same data"
                )


def refuse_damage(shards: ShardSet, process: Process) -> None:
    """A look at each tar, by one rank of each machine, once per start. All ranks hear of damage and leave together.

    Remote shards are checked whole when they arrive.
    """
    looks = not shards.source and (process.peers is None or process.peers.is_first_here)
    if damages := list(filter(None, from_all_ranks(damage_at_start(shards) if looks else None))):
        raise UserError(f"{damages[0]}; look with: simclr-dali verify --full {shards.folder.parent}")


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS), shares_work=True)
