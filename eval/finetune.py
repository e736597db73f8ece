"""Fine-tuning and semi-supervised learning: how far does a pre-trained encoder get with few labels?

    python eval/finetune.py --ckpt runs/ds_lars --fraction 0.01             # 1 % of the labels
    deepspeed eval/finetune.py --ckpt runs/ds_lars --fraction 0.1           # 10 %, every GPU; torchrun does as well
    python eval/finetune.py --ckpt runs/ds_lars --list 1percent.txt         # the images that a file names
    python eval/finetune.py --ckpt runs/ds_lars --fraction 1                # all labels
    python eval/finetune.py --ckpt runs/ds_lars --fraction 0.1 --untrained  # the same, from random weights

The protocol is SimCLR's (Chen et al. 2020, appendix B.5): encoder and a new classifier on top of it are trained
together, with nesterov momentum 0.9, batch 4096, learning rate 0.05 B/256 without warm-up and with a cosine to 0, no
weight decay, random crops and flips, 60 epochs for 1 % and 30 for 10 %; the appendix has no run on all labels, which
gets 30 here. Labels are taken class by class, as many of each (or one more), by --seed; --list takes a file such as the
paper's own, one name per line. BatchNorm covers the batches of all processes; where a process needs several passes
(--batch) it covers a pass, and the result says of how many images ("normalised_together").

The number is read on val once, after the last epoch. It goes to finetune-FRACTION.json in the run folder with what it
must be read with, the model to finetune-FRACTION.pt (eval/predict.py). The same command goes on after a stop.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    # This script's own folder must not shadow installed modules, and its checkout must win over an installed copy.
    sys.path[0] = str(Path(__file__).resolve().parents[1] / ".package")

from simclr_dali.eval.arguments import DataChoice, EncoderChoice, add_arguments, add_keep_decoded_argument
from simclr_dali.shards.command_line import parser_of, positive_int, seed
from simclr_dali.shards.errors import UserError, run_main


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_arguments(parser, features=False)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--fraction", type=float, metavar="F", help="Use this share of the labels: 0.01, 0.1, 1.")
    which.add_argument("--list", type=Path, metavar="FILE", help="Use the labels of the images that FILE names.")
    parser.add_argument("--epochs", type=positive_int, help="Train for so many epochs, reported beside the protocol.")
    parser.add_argument(
        "--train-batch", type=positive_int, metavar="B", help="Train with batches of B; the learning rate follows."
    )
    add_keep_decoded_argument(parser)
    parser.add_argument("--seed", type=seed, default=0, help="Seed the choice of labels, order and crops (default: 0).")
    parser.add_argument(
        "--save-every",
        type=positive_int,
        default=100,
        metavar="STEPS",
        help="Save the state so often (default: every 100).",
    )
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import torch
from torch import Tensor, nn

from simclr_dali.eval.evaluation import Evaluation, open_evaluation
from simclr_dali.eval.logistic import in_words, reported, score
from simclr_dali.eval.protocols import FINETUNE
from simclr_dali.eval.supervised import micro_batch, state_of, train
from simclr_dali.model.batchnorm import MIN_BATCHNORM_IMAGES, NOISY_BATCHNORM_IMAGES, synchronised
from simclr_dali.model.encoder import Encoder
from simclr_dali.model.process import leave, on_rank_0, print_rank_0
from simclr_dali.pipeline.order import Ids
from simclr_dali.pipeline.subset import class_balanced, ids_of_names

EPOCHS_ONE_PERCENT, EPOCHS = 60, 30
FEW = 0.03  # half way, in proportion, between the paper's 1 % and 10 %: a smaller share gets the epochs of 1 %


class Tuned(nn.Module):
    """An encoder and a classifier that starts at zero: images -> scores [n, classes]."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.encoder(images))
        return scores


def main(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    job = open_evaluation(
        EncoderChoice.of(arguments), DataChoice.of(arguments), batch=arguments.batch, out=arguments.out
    )
    process = job.process
    name, ids = chosen_images(arguments, job)
    fraction = len(ids) / len(job.train.shards)
    epochs = EPOCHS_ONE_PERCENT if fraction < FEW else EPOCHS
    schedule, differs = FINETUNE.changed(arguments.train_batch, arguments.epochs, epochs)
    # Of how many images BatchNorm takes its statistics; the paper's took those of the whole batch.
    together = micro_batch(job.batch, schedule.batch // process.world) * process.world
    if together < MIN_BATCHNORM_IMAGES:
        raise UserError(
            f"--batch {job.batch} and a training batch of {schedule.batch} let BatchNorm see one image at a time, "
            f"which leaves nothing of a small map; give 2 or more for both --batch and --train-batch"
        )
    if together < NOISY_BATCHNORM_IMAGES:
        print_rank_0(process, f"warning: BatchNorm sees {together} images at a time, whose statistics are noise")
    out = job.out(f"finetune-{name}")
    print_rank_0(process, f"{len(ids):,} of {len(job.train.shards):,} images of train, {schedule.epochs} epochs")
    model = Tuned(job.encoder.requires_grad_(True), len(job.classes))
    synchronised(model, process.device)
    model.to(process.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    train(job, model, model, ids, schedule, state_of(out), seed=arguments.seed, save_every=arguments.save_every)
    model.eval().requires_grad_(False)
    tuned, head = model.encoder, model.head
    val = job.extract(job.val, schedule.interpolation)
    found = score(head, val.features, val.labels)
    result = {
        "protocol": f"finetune-{name}",
        "about": schedule.source,
        **reported(found, job.classes),
        "images": len(ids),
        "fraction": round(fraction, 6),
        "images_sha256": hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
        "list": str(arguments.list) if arguments.list else None,
        "differs": differs,
        "batch": schedule.batch,
        "normalised_together": together,
        "lr": schedule.lr,
        "epochs": schedule.epochs,
        "seed": arguments.seed,
        **job.report(),
        "seconds": round(time.monotonic() - started, 1),
    }
    job.write(out, result, job.classifier(tuned, head, schedule.interpolation, result))
    if process.rank == 0:
        state_of(out).unlink(missing_ok=True)  # only now: until here a stopped run goes on from it
    changed = f", with {differs} unlike the paper" if differs else ""
    print_rank_0(
        process,
        f"fine-tuned on {len(ids):,} images ({fraction:.2%}){changed}"
        f"{' from random weights' if job.untrained else ''}: {in_words(found.top1, found.top5, len(job.classes))} "
        f"on {found.count:,} images ({result['seconds']:.0f} s); "
        f"{out}.json",
    )
    leave(job.process)


def chosen_images(arguments: argparse.Namespace, job: Evaluation) -> tuple[str, Ids]:
    """A name for the choice, and the ids of the images of train whose labels are used, in storage order."""
    shards = job.train.shards
    if arguments.list is None:
        if not 0 < arguments.fraction <= 1:
            raise UserError(f"--fraction is {arguments.fraction}; it must be above 0 and at most 1")
        ids = class_balanced(shards.samples["label"], len(shards.classes), arguments.fraction, arguments.seed)
        return f"{arguments.fraction:g}", ids

    def read() -> Ids:
        try:
            names = arguments.list.read_text("utf-8", "surrogateescape").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--list {arguments.list} cannot be read ({error}); give a text file of names") from error
        return ids_of_names(names, job.train, str(arguments.list))

    return arguments.list.stem, on_rank_0(job.process, read)


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS), shares_work=True)
