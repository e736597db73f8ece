"""k nearest neighbours: how good are the frozen features, without training anything on them?

    python eval/knn.py --ckpt runs/ds_lars                        # a run folder: its newest checkpoint
    python eval/knn.py --ckpt runs/ds_lars --k 20 200 --temperature 0.1
    python eval/knn.py --ckpt runs/ds_lars --untrained            # the same encoder before training
    deepspeed eval/knn.py --ckpt runs/ds_lars                     # on every GPU; torchrun does as well

Features of each image's central view; each image of val is given the class for which its k nearest images of train, by
cosine, vote most, each with exp(cosine / temperature) (Wu et al. 2018). The figures go to knn.json in the run folder.
"""

import argparse
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    # This script's own folder must not shadow installed modules, and its checkout must win over an installed copy.
    sys.path[0] = str(Path(__file__).resolve().parents[1] / ".package")

from simclr_dali.eval.arguments import DataChoice, EncoderChoice, add_arguments
from simclr_dali.shards.command_line import parser_of, positive_int
from simclr_dali.shards.errors import UserError, run_main


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument(
        "--k", type=positive_int, nargs="+", help="Let so many vote (default: 20 200, as far as there are so many)."
    )
    parser.add_argument(
        "--temperature", type=float, default=0.1, help="Weigh votes at this temperature (default: 0.1)."
    )
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds


from simclr_dali.eval.evaluation import open_evaluation
from simclr_dali.eval.logistic import among_five, in_words, interval_95
from simclr_dali.model.collectives import all_rows
from simclr_dali.model.neighbours import accuracies
from simclr_dali.model.process import leave, print_rank_0

_K = [20, 200]


def main(arguments: argparse.Namespace) -> None:
    if not arguments.temperature > 0:
        raise UserError(f"--temperature is {arguments.temperature}; it must be above 0")
    started = time.monotonic()
    job = open_evaluation(
        EncoderChoice.of(arguments), DataChoice.of(arguments), batch=arguments.batch, out=arguments.out,
        features=arguments.features,
    )  # fmt: skip
    images = len(job.train.shards)
    given = arguments.k or [k for k in _K if k <= images] or [images]
    if max(given) > images:
        raise UserError(f"--k {max(given)} is more than the {images} images of train; lower it")
    if not arguments.k and given != _K:
        print_rank_0(job.process, f"k {', '.join(map(str, given))} only: train has {images} images")
    out = job.out("knn")
    train, val = job.extract(job.train), job.extract(job.val)
    queries, truth = all_rows(val.features), all_rows(val.labels)
    found = accuracies(train.features, train.labels, queries, truth, len(job.classes), given, arguments.temperature)
    job.refuse_change()
    figures = {
        f"k{k}": {
            "top1": round(top1, 3),
            "top5": among_five(top5, len(job.classes)),
            "top1_interval_95": [round(bound, 3) for bound in interval_95(top1, len(truth))],
        }
        for k, (top1, top5) in found.items()
    }
    seconds = round(time.monotonic() - started, 1)
    result = {
        "protocol": "knn",
        "k": given,
        "temperature": arguments.temperature,
        **figures,
        **job.report(),
        "seconds": seconds,
    }
    job.write(out, result)
    for k, (top1, top5) in found.items():
        print_rank_0(
            job.process,
            f"kNN, k {k}{job.encoder_note()}: {in_words(top1, top5, len(job.classes))}",
        )
    print_rank_0(job.process, f"{len(truth):,} images against {images:,}, {seconds:.0f} s; {out}.json")
    leave(job.process)


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS), shares_work=True)
