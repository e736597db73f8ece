"""What a run keeps to go on with, and going on with it."""

import socket
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pydantic
import torch

from simclr_dali.model import checkpoint, migrations
from simclr_dali.model.checkpoint import CheckpointError
from simclr_dali.model.process import Process, from_all_ranks, on_rank_0, print_now
from simclr_dali.pipeline.remote import is_remote
from simclr_dali.shards.durable import refusals_named
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import ShardSet
from simclr_dali.shards.nested import flat
from simclr_dali.train.compilation import Backend, resolved
from simclr_dali.train.config import Config

_SEEN_BY_BATCHNORM = "the number of images that BatchNorm sees at a time"
# Fields of the config that may differ between the machines of a run.
PER_MACHINE = {f"simclr.{key}" for key in ("data", "run", "loader_threads", "cache", "cache_gb")}
# Fields of the config that may differ between the stopped run and the one that goes on. They change no number of it,
# but for the micro-batch, which BatchNorm sees where there are several (another machine may have less memory), and the
# rounding of how it is computed, of which a line is printed.
MAY_CHANGE_ON_RESUME = {
    "train_micro_batch_size_per_gpu",
    *PER_MACHINE,
    *(
        f"simclr.{key}"
        for key in (
            "compile",
            "deterministic",
            "graph.conditionals",
            "graph.region",
            "graph.prefetch",
            "keep_decoded",
            "track",
            "report",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "keep_every_epochs",
            "knn_every_epochs",
            "knn_images",
            "max_bad_fraction",
        )
    ),
}


def state_to_go_on_with(run: Path, config: Config, shards: ShardSet, process: Process) -> dict[str, Any] | None:
    """The newest sound checkpoint of ``run`` (:func:`state_of`); None where there is none.

    Rank 0 reads it and gives it to the others. Damaged ones that are newer are named and set aside.
    Raises UserError where the run was made with another data set or other settings, or another machine has a newer
    checkpoint than rank 0's, CheckpointError where all are damaged.
    """
    refuse_newer_elsewhere(run)
    return on_rank_0(process, lambda: _read(run, config, shards))


def refuse_newer_elsewhere(run: Path) -> None:
    """Where run folders are each machine's own, rank 0 may not be where it was, and would begin anew without a word.

    All ranks call it. Raises UserError where another machine has a newer checkpoint than rank 0's.
    """
    everywhere = from_all_ranks((socket.gethostname(), str(run.absolute()), checkpoint.newest_step(run)))
    host, folder, own = everywhere[0]
    for rank, (other, place, newest) in enumerate(everywhere):
        if newest is not None and (own is None or newest > own):
            has = "no checkpoint" if own is None else f"none after step {own}"
            raise UserError(
                f"rank {rank} on {other} has a checkpoint of step {newest} in {place}, and rank 0 on {host} has {has} "
                f"in {folder}; start {other} as the first machine, copy its run folder to {host}, or give another --run"
            )


def computed_by(
    config: Config, process: Process, backend: Backend | None = None, *, keeps_decoded: bool
) -> dict[str, str]:
    """What rounding depends on beside the numbers; ``backend`` knows whether compiling was possible.

    keeps_decoded: whether decoded pictures are kept, which are then whole.
    """
    on_gpu = process.device.type == "cuda"
    graph = config.simclr.graph.on(process.device.type, whole=config.simclr.deterministic)
    compiled = "no" if backend and backend.failed else resolved(config.simclr.compile, process.device)
    return {
        "device": process.device_name,
        "torch": str(torch.__version__),
        "simclr.compile": compiled,
        "simclr.deterministic": str(config.simclr.deterministic).lower(),
        "simclr.graph.conditionals": str(graph["conditionals"]).lower(),
        "simclr.graph.region": str(graph["region"] and not keeps_decoded).lower(),
        "decoded by": "JPEG engine in part" if on_gpu and config.simclr.engine_share else "one decoder",
        _SEEN_BY_BATCHNORM: str(
            config.micro_batch(process.world) * config.batchnorm_processes(process.world, process.local_world)
        ),
    }


def tell_other_rounding(state: dict[str, Any], computed: dict[str, str]) -> None:
    """Print a line for everything in which ``computed`` (computed_by) is not what it was in the run so far."""
    for key, before in state.get("computed_by", {}).items():
        if before != computed.get(key, before):
            follows = "what follows is the same up to rounding, not to the bit"
            if key == _SEEN_BY_BATCHNORM:
                follows = "what follows is normalised by other statistics"
            print_now(f"warning: {key} was {before} until step {state['step']} and is {computed[key]} now; {follows}")


def _read(run: Path, config: Config, shards: ShardSet) -> dict[str, Any] | None:
    found = checkpoint.newest(run)
    if found is None:
        return None
    state = found.state
    refuse_other_data(run, found, shards)
    refuse_other_settings(run, found, config)
    for folder, sentence in found.skipped:
        aside = folder.with_name(f"damaged-{folder.name}")
        while aside.exists():  # the same step was damaged before
            aside = aside.with_name(f"{aside.name}+")
        print_now(f"warning: {sentence}; it is now {aside.name}, and the run goes on from {found.path.parent.name}")
        with refusals_named(aside):
            folder.rename(aside)
    return state


def refuse_other_data(run: Path, found: checkpoint.Checkpoint, shards: ShardSet) -> None:
    """Raise UserError where the checkpoint was trained on another data set than ``shards``."""
    if found.state["manifest"] != shards.fingerprint:
        raise UserError(
            f"{run} was trained on another data set than {shards.folder} (the manifests differ); give another --run "
            f"or the same --data"
        )


def refuse_other_settings(run: Path, found: checkpoint.Checkpoint, config: Config) -> None:
    """Raise UserError where ``config`` is of another run than the one that wrote the checkpoint.

    Its config is read as this version would have written it: fields that it lacks have their defaults. Raises
    CheckpointError where it has some that this version does not know.
    """
    try:
        old = type(config).model_validate(migrations.config(found.state["config"]))
    except (pydantic.ValidationError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, pydantic.ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))} is {first['input']!r}"
        raise CheckpointError(
            f"{found.path} has a config that this version does not read ({reason}); go on with the version that wrote "
            "it, or give another --run"
        ) from error
    then, now = settings(old, MAY_CHANGE_ON_RESUME), settings(config, MAY_CHANGE_ON_RESUME)
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key):
            raise UserError(
                f"{run} was made with {key} = {then.get(key)!r}, this command gives {now.get(key)!r}; give another "
                f"--run"
            )


def settings(config: Config, but: Collection[str]) -> dict[str, Any]:
    """The fields of ``config`` by their path, but for some and for what it says of itself, which decides nothing."""
    fields = flat(config.model_dump(mode="json"))
    return {key: value for key, value in fields.items() if key not in but and not key.startswith("simclr.about.")}


def state_of(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    shards: ShardSet,
    step: int,
) -> dict[str, Any]:
    """Everything that a run needs to go on, and an evaluation to read it, in tensors and plain values."""
    return {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "architecture": config.architecture().plain(),
        "image_size": config.simclr.image_size,
        "seed": config.simclr.seed,
        "data": data_address(config),
        "config": config.model_dump(mode="json"),
        "manifest": shards.fingerprint,
        "versions": {"torch": str(torch.__version__), "deepspeed": sys.modules["deepspeed"].__version__},
    }


def data_address(config: Config) -> str:
    """Where the data is, from any working folder."""
    data = config.simclr.data
    return data if is_remote(data) else str(Path(data).resolve())
