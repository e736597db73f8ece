"""Linear probe: how good are the frozen features of a pre-trained encoder?

    python eval/linear.py --ckpt runs/ds_lars                                    # a run folder: its newest checkpoint
    python eval/linear.py --ckpt runs/ds_lars --data /data/imagenet-shards
    python eval/linear.py --ckpt runs/ds_lars --untrained                        # the same encoder before training

Protocol "fast": features of each image's central view, extracted once; multinomial logistic regression on the whole of
train, at a fixed weight decay; the result is read on val once, after the fit. That the encoder was not touched is
checked by hashes. Numbers of other protocols (90 epochs of augmented SGD) are not comparable to the half point.
"""

import argparse
import json
import sys
import time
from pathlib import Path

# This script's own folder must not shadow installed modules, and its checkout must win over an installed copy.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402

from eval.frozen import add_arguments, freeze  # noqa: E402
from eval.probe import accuracy, fit_linear, interval_95  # noqa: E402
from model.checkpoint import CheckpointError  # noqa: E402
from shards.errors import run_main  # noqa: E402

PROTOCOL = "fast"
WEIGHT_DECAY = 1e-3


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    frozen = freeze(arguments)
    train, val = frozen.train, frozen.val
    extracted = time.monotonic()
    layer = fit_linear(train.features, train.labels, len(frozen.classes), WEIGHT_DECAY)
    frozen.refuse_change()
    top1, top5 = accuracy(layer, val.features, val.labels)
    result = {
        "protocol": PROTOCOL,
        "top1": round(top1, 3),
        "top5": round(top5, 3),
        "top1_interval_95": [round(bound, 3) for bound in interval_95(top1, len(val.labels))],
        "top1_train": round(accuracy(layer, train.features, train.labels)[0], 3),
        "weight_decay": WEIGHT_DECAY,
        **frozen.report(),
        "seconds": round(time.monotonic() - started, 1),
    }
    out = frozen.out(arguments.out, "linear")
    out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    torch.save(
        {"weight": layer.weight.detach().cpu(), "bias": layer.bias.detach().cpu(), "classes": list(frozen.classes)},
        out.with_suffix(".pt"),
    )
    print(
        f"protocol {PROTOCOL}{' (untrained encoder)' if arguments.untrained else ''}: top-1 {top1:.2f} %, top-5 "
        f"{top5:.2f} % on {len(val.labels):,} images "
        f"({frozen.seconds:.0f} s features, {time.monotonic() - extracted:.0f} s classifier); {out}.json"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Linear probe", epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main, CheckpointError)
