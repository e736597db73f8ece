"""Accuracy and time of the probes on one set of features, against scikit-learn's and lightly's.

    pip install -c scripts/constraints.txt -e '.[bench]'     # the rivals; without them their rows are left out
    python scripts/bench/probe.py --ckpt RUN --json FILE
    DS_ACCELERATOR=cpu python scripts/bench/probe.py --ckpt RUN --data SHARDS --rounds 3

The features of train and val are extracted once, as eval/linear.py does. Each round then fits every contender to those
of train and scores it on those of val, one after the other in this process. Figures are medians over the rounds with
the extremes; ratios rival/ours are taken within a round.

    fast           eval/linear.py --protocol fast
    scikit-learn   LogisticRegression on features of variance 1: the same objective, by its own L-BFGS
    sweep          eval/linear.py --protocol sweep: 100 classifiers side by side, and the chosen one again
    knn            eval/knn.py, k 20 and 200
    lightly knn    lightly's knn_predict, k 20 and 200, in batches of 1,024
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from simclr_dali.eval.arguments import DataChoice, EncoderChoice, add_arguments
from simclr_dali.shards.command_line import file_to_write, positive_int
from simclr_dali.shards.errors import UserError, run_main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rounds", type=positive_int, default=5, help="default: 5")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there too")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import torch
import torch.nn.functional as F

from scripts.bench.figures import extremes, machine, spread
from simclr_dali.eval.evaluation import Evaluation, open_evaluation
from simclr_dali.eval.linear import WEIGHT_DECAY
from simclr_dali.eval.logistic import Scale, fit_linear, score
from simclr_dali.eval.sweep import GRID, sweep
from simclr_dali.model.neighbours import accuracies
from simclr_dali.pipeline.features import Features, share
from simclr_dali.pipeline.loader import central_views

PACKAGES = ("torch", "scikit-learn", "lightly")
KS, TEMPERATURE = (20, 200), 0.1

# train, val, classes -> top-1 in percent of each figure that it gives.
Contender = Callable[[Features, Features, int], dict[str, float]]


def fast(train: Features, val: Features, classes: int) -> dict[str, float]:
    fit = fit_linear(train.features, train.labels, classes, WEIGHT_DECAY)
    return {"linear": score(fit.layer, val.features, val.labels).top1}


def scikit_learn(train: Features, val: Features, classes: int) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression

    scale = Scale.of(train.features)
    x, y = (scale.apply(part.features).cpu().numpy() for part in (train, val))
    # It divides the decay by C and sums over the images where we take the mean.
    model = LogisticRegression(C=1 / (WEIGHT_DECAY * len(x)), max_iter=1000, tol=1e-5).fit(
        x, train.labels.cpu().numpy()
    )
    return {"linear": 100 * float(model.score(y, val.labels.cpu().numpy()))}


def swept(train: Features, val: Features, classes: int) -> dict[str, float]:
    found = sweep(train.features, train.labels, share(len(train.labels), 0, 1), classes)
    return {"linear": score(found.layer, val.features, val.labels).top1}


def knn(train: Features, val: Features, classes: int) -> dict[str, float]:
    found = accuracies(train.features, train.labels, val.features, val.labels, classes, KS, TEMPERATURE)
    return {f"k {k}": top1 for k, (top1, _) in found.items()}


def lightly_knn(train: Features, val: Features, classes: int) -> dict[str, float]:
    from lightly.utils.benchmarking.knn import knn_predict

    bank = F.normalize(train.features, dim=1).T.contiguous()
    found = {}
    for k in KS:
        right = 0
        for x, y in zip(F.normalize(val.features, dim=1).split(1024), val.labels.split(1024), strict=True):
            best = knn_predict(x, bank, train.labels, classes, knn_k=k, knn_t=TEMPERATURE)
            right += int((best[:, 0] == y).sum())
        found[f"k {k}"] = 100 * right / len(val.labels)
    return found


CONTENDERS: dict[str, tuple[Contender, str, str]] = {  # what runs, the module it needs, compared with
    "fast": (fast, "torch", "fast"),
    "scikit-learn": (scikit_learn, "sklearn", "fast"),
    "sweep": (swept, "torch", "fast"),
    "knn": (knn, "torch", "knn"),
    "lightly knn": (lightly_knn, "lightly", "knn"),
}


def main(given: argparse.Namespace) -> None:
    job = open_evaluation(
        EncoderChoice.of(given), DataChoice.of(given), batch=given.batch, out=given.out, features=given.features
    )
    if job.process.world > 1:
        raise UserError(
            f"{job.process.world} processes were started; this benchmark is one process: start it by python"
        )
    train, val = job.extract(job.train), job.extract(job.val)
    extraction = train.seconds + val.seconds
    waiting = (train.waited + val.waited) / extraction if extraction else 0.0
    alone = encoder_alone(job) * (len(train.labels) + len(val.labels))
    names = [name for name, (_, module, _) in CONTENDERS.items() if importlib.util.find_spec(module)]
    for name in CONTENDERS.keys() - set(names):
        print(f"{name} is not installed, so its row is left out: pip install -e '.[bench]'", file=sys.stderr)
    on = machine("gpu" if job.process.device.type == "cuda" else "cpu", PACKAGES)
    images = len(train.labels) + len(val.labels)
    print(
        f"{on['machine']}, {on['cores']} cores; {len(train.labels):,} + {len(val.labels):,} images of "
        f"{len(job.classes)} classes, {job.source.architecture.encoder.label()}, {job.image_size} px, "
        f"{given.rounds} rounds"
    )
    if extraction:
        print(
            f"extraction {extraction:.1f} s, {images / extraction:,.0f} images/s, {waiting:.1%} waiting for input; the "
            f"encoder alone takes {alone:.1f} s for as many, so {1 - alone / extraction:.1%} is lost to input"
        )
    seconds: dict[str, list[float]] = {name: [] for name in names}
    top1: dict[str, dict[str, float]] = {}
    for _ in range(given.rounds):
        for name in names:
            began = time.monotonic()
            top1[name] = CONTENDERS[name][0](train, val, len(job.classes))
            seconds[name].append(time.monotonic() - began)
    figures: dict[str, Any] = {}
    print(f"{'':14} {'seconds':>24} {'x ours':>24}  top-1 on val, %")
    for name in names:
        ratios = [a / b for a, b in zip(seconds[name], seconds[CONTENDERS[name][2]], strict=True)]
        figures[name] = {"seconds": extremes(seconds[name]), "x ours": extremes(ratios), "top1": top1[name]}
        shown = ", ".join(f"{what} {value:.2f}" for what, value in top1[name].items())
        print(f"{name:14} {spread(seconds[name], 2):>24} {spread(ratios, 2):>24}  {shown}")
    if extraction:
        print(
            f"the sweep of {len(GRID)} points took {statistics.median(seconds['sweep']) / extraction:.2f} of extraction"
        )
    if given.json:
        result = {
            **on,
            "rounds": given.rounds,
            "train_images": len(train.labels),
            "val_images": len(val.labels),
            "encoder": job.source.architecture.encoder.name,
            "image_size": job.image_size,
            "extraction_seconds": round(extraction, 2),
            "waiting_for_input": round(waiting, 4),
            "encoder_alone_seconds": round(alone, 2),
            "contenders": figures,
        }
        given.json.write_text(json.dumps(result, indent=1) + "\n")


@torch.inference_mode()
def encoder_alone(job: Evaluation) -> float:
    """Seconds per image of the encoder on images that are there already: median of 9 batches."""
    made = central_views(job.val, job.loader_config(), batch=job.batch)
    images = next(made).views.clone()
    made.close()
    times = []
    for _ in range(10):
        began = time.monotonic()
        job.encoder(images).sum().item()  # waits for the device
        times.append(time.monotonic() - began)
    return statistics.median(times[1:]) / len(images)


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
