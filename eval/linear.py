"""Linear probe: how good are the frozen features of a pre-trained encoder?

    python eval/linear.py --ckpt runs/ds_lars                                    # a run folder: its newest checkpoint
    python eval/linear.py --ckpt runs/ds_lars --protocol sweep
    deepspeed eval/linear.py --ckpt runs/ds_lars --protocol mmpretrain-lars-90e  # every GPU; torchrun does as well
    python eval/linear.py --ckpt resnet50.pth --data /data/imagenet-shards       # weights of another library
    python eval/linear.py --ckpt runs/ds_lars --untrained                        # the same encoder before training

Protocols, whose numbers are not comparable to the half point:

    fast                 {fast}
    sweep                {sweep}
    mmpretrain-lars-90e  {mmpretrain-lars-90e}
    google-sgd-90e       {google-sgd-90e}
    moco-sgd-90e         {moco-sgd-90e}

In all of them the encoder is proven unchanged by hashes, its BatchNorm is in eval mode, val is read once, after the
last epoch, and each of its images counts once on any number of processes. The 90-epoch protocols go on where they were
stopped when the same command is given again. Figures and what they must be read with go to linear.json in the run
folder, encoder and classifier to linear.pt (eval/predict.py); other protocols than fast have their name in both.
"""

import argparse
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This script's own folder must not shadow installed modules, and its checkout must win over an installed copy.
    sys.path[0] = str(Path(__file__).resolve().parents[1] / ".package")

from simclr_dali.eval.arguments import DataChoice, EncoderChoice, add_arguments, add_keep_decoded_argument
from simclr_dali.eval.protocols import ABOUT, FAST, NAMES, SCHEDULES, SWEEP, Schedule, protocol_name
from simclr_dali.shards.command_line import parser_of, positive_int, seed
from simclr_dali.shards.errors import UserError, run_main

WEIGHT_DECAY = 1e-3  # of the fast protocol
SAVE_EVERY = 100  # steps


def parse_arguments() -> argparse.Namespace:
    about = {name: textwrap.fill(said, 95, subsequent_indent=25 * " ") for name, said in ABOUT.items()}
    parser = parser_of((__doc__ or "").format(**about))
    add_arguments(parser)
    parser.add_argument(
        "--protocol", type=protocol_name, choices=NAMES, default=FAST, help="Follow this protocol (default: fast)."
    )
    parser.add_argument("--epochs", type=positive_int, help="Train for so many epochs, reported beside the protocol.")
    parser.add_argument(
        "--train-batch", type=positive_int, metavar="B", help="Train with batches of B; the learning rate follows."
    )
    add_keep_decoded_argument(parser)
    parser.add_argument(
        "--seed", type=seed, help="Seed order, crops, first weights and what is kept aside (default: 0)."
    )
    parser.add_argument(
        "--save-every", type=positive_int, metavar="STEPS", help="Save the state so often (default: every 100)."
    )
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import torch
from torch import Tensor

from simclr_dali.eval.evaluation import Evaluation, open_evaluation
from simclr_dali.eval.logistic import fit_linear, in_words, reported, score
from simclr_dali.eval.supervised import state_of, train
from simclr_dali.eval.sweep import GRID, HELD_OUT, sweep
from simclr_dali.model.process import leave, print_rank_0
from simclr_dali.pipeline.features import Features, share


def main(arguments: argparse.Namespace) -> None:
    refuse_contradictions(arguments)
    started = time.monotonic()
    job = open_evaluation(
        EncoderChoice.of(arguments), DataChoice.of(arguments), batch=arguments.batch, out=arguments.out,
        features=arguments.features,
    )  # fmt: skip
    name: str = arguments.protocol
    out = job.out("linear" if name == FAST else f"linear-{name}")
    interpolation = SCHEDULES[name].interpolation if name in SCHEDULES else "bilinear"
    if name in SCHEDULES:
        schedule, differs = SCHEDULES[name].changed(arguments.train_batch, arguments.epochs)
        head, details = by_schedule(job, schedule, out, arguments.seed or 0, arguments.save_every or SAVE_EVERY)
        details = {"differs": differs, **details}
    else:
        head, details = on_features(job, name, arguments.seed or 0)
    val = job.extract(job.val, interpolation)
    job.refuse_change()
    found = score(head, val.features, val.labels)
    result = {
        "protocol": name,
        "about": ABOUT[name],
        **reported(found, job.classes),
        **details,
        **job.report(),
        "seconds": round(time.monotonic() - started, 1),
    }
    job.write(out, result, job.classifier(job.encoder, head, interpolation, result))
    if job.process.rank == 0:
        state_of(out).unlink(missing_ok=True)  # only now: until here a stopped probe goes on from it
    changed = f", with {details['differs']} unlike it" if details.get("differs") else ""
    print_rank_0(
        job.process,
        f"protocol {name}{changed}{job.encoder_note()}: {in_words(found.top1, found.top5, len(job.classes))} "
        f"on {found.count:,} images ({result['seconds']:.0f} s); {out}.json",
    )
    if (out.parent / "report.html").is_file():
        print_rank_0(job.process, f"simclr-dali report {out.parent} shows it beside the run's curves")
    leave(job.process)


def on_features(job: Evaluation, name: str, seed: int) -> tuple[torch.nn.Linear, dict[str, Any]]:
    """The classifier of the fast or the sweep protocol, and what is reported of it."""
    fitted = job.extract(job.train)
    began = time.monotonic()
    classes = len(job.classes)
    if name == SWEEP:
        ids = share(len(job.train.shards), job.process.rank, job.process.world)
        swept = sweep(fitted.features, fitted.labels, ids, classes, seed=seed)
        head = swept.layer
        details: dict[str, Any] = {
            "lr": swept.chosen.lr,
            "weight_decay": swept.chosen.weight_decay,
            "epochs": swept.epochs,
            "batch": swept.batch,
            "seed": seed,
            "held_out": HELD_OUT,
            "held_out_top1": round(swept.accuracies[swept.chosen], 3),
            "points": [[point.lr, point.weight_decay, round(top1, 3)] for point, top1 in swept.accuracies.items()],
        }
        if swept.at_the_border:
            print_rank_0(
                job.process, f"warning: the chosen learning rate {swept.chosen.lr:g} is at the border of the grid"
            )
        print_rank_0(
            job.process,
            f"of {len(GRID)} points: learning rate {swept.chosen.lr:g}, weight decay {swept.chosen.weight_decay:g}, "
            f"{swept.accuracies[swept.chosen]:.2f} % on the part of train kept aside",
        )
    else:
        assert name == FAST
        fit = fit_linear(fitted.features, fitted.labels, classes, WEIGHT_DECAY)
        head = fit.layer
        details = {
            "weight_decay": WEIGHT_DECAY,
            "iterations": fit.iterations,
            "gradient": fit.gradient,
            "converged": fit.converged,
        }
        if not fit.converged:
            print_rank_0(job.process, f"warning: the fit stopped after {fit.iterations} iterations, before its optimum")
    details["top1_train"] = round(score(head, fitted.features, fitted.labels).top1, 3)
    details |= seconds_of(fitted, time.monotonic() - began)
    return head, details


def seconds_of(extracted: Features, seconds: float) -> dict[str, Any]:
    """Where the time went on this rank, in seconds; nothing of extraction where its result was there already."""
    shares = {"waiting_for_input": round(extracted.waited / extracted.seconds, 4)} if extracted.seconds else {}
    return {"seconds_extraction": round(extracted.seconds, 1), **shares, "seconds_classifier": round(seconds, 1)}


def by_schedule(
    job: Evaluation, schedule: Schedule, out: Path, seed: int, save_every: int
) -> tuple[torch.nn.Linear, dict[str, Any]]:
    """The classifier of a 90-epoch protocol, and what is reported of it."""
    head = torch.nn.Linear(job.encoder.width, len(job.classes))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        head.weight.copy_(schedule.init_std * torch.randn(head.weight.shape, generator=generator))
        head.bias.zero_()
    head.to(job.process.device)

    def scores(views: Tensor) -> Tensor:
        with torch.no_grad():
            features = job.encoder(views).float()
        found: Tensor = head(features)
        return found

    train(job, head, scores, None, schedule, state_of(out), seed=seed, save_every=save_every)
    details = {
        "optimizer": schedule.optimizer,
        "batch": schedule.batch,
        "lr": schedule.lr,
        "weight_decay": schedule.weight_decay,
        "epochs": schedule.epochs,
        "seed": seed,
    }
    return head.requires_grad_(False), details


def refuse_contradictions(arguments: argparse.Namespace) -> None:
    given = {
        "--epochs": arguments.epochs,
        "--train-batch": arguments.train_batch,
        "--save-every": arguments.save_every,
        "--keep-decoded": arguments.keep_decoded,
    }
    if arguments.protocol == FAST:
        given["--seed"] = arguments.seed
    unused = [name for name, value in given.items() if value is not None]
    if arguments.protocol not in SCHEDULES and unused:
        raise UserError(f"{', '.join(unused)} mean nothing to the protocol {arguments.protocol}; leave them out")


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS), shares_work=True)
