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

import os  # noqa: E402

import torch  # noqa: E402

from eval.features import extract  # noqa: E402
from eval.probe import accuracy, fit_linear, interval_95  # noqa: E402
from model.checkpoint import CheckpointError  # noqa: E402
from model.load import fingerprint, load_encoder  # noqa: E402
from pipeline.loader import Setting  # noqa: E402
from pipeline.remote import Cache, open_split  # noqa: E402
from shards.errors import UserError, positive_int, run_main  # noqa: E402

PROTOCOL = "fast"
WEIGHT_DECAY = 1e-3
# "Resize the short side to 256, take the central 224" of ImageNet evaluations.
CENTER_FRACTION = 0.875


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    encoder, found = load_encoder(arguments.ckpt, untrained=arguments.untrained)
    data = arguments.data or found.state["data"]
    cache = Cache(arguments.cache.expanduser(), int(arguments.cache_gb * 1e9))
    (train, train_files), (val, val_files) = (open_split(data, split, cache) for split in ("train", "val"))
    if train.classes != val.classes:
        raise UserError(f"train and val of {data} name different classes; pack them together")

    device = torch.device("cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu")
    encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    frozen = fingerprint(encoder)
    size = arguments.image_size or found.state["image_size"]
    setting = Setting(size=size, device=device, threads=len(os.sched_getaffinity(0)))
    train_set, val_set = (
        extract(encoder, shards, files, setting, batch=arguments.batch, center_fraction=CENTER_FRACTION)
        for shards, files in ((train, train_files), (val, val_files))
    )
    extracted = time.monotonic()
    layer = fit_linear(train_set.features, train_set.labels, len(train.classes), WEIGHT_DECAY)
    if fingerprint(encoder) != frozen:
        raise RuntimeError("the encoder changed while it was probed; the number would be worth nothing")
    top1, top5 = accuracy(layer, val_set.features, val_set.labels)

    result = {
        "protocol": PROTOCOL,
        "top1": round(top1, 3),
        "top5": round(top5, 3),
        "top1_interval_95": [round(bound, 3) for bound in interval_95(top1, len(val))],
        "top1_train": round(accuracy(layer, train_set.features, train_set.labels)[0], 3),
        "untrained": arguments.untrained,
        "train_images": len(train),
        "val_images": len(val),
        "classes": len(train.classes),
        "image_size": size,
        "center_fraction": CENTER_FRACTION,
        "weight_decay": WEIGHT_DECAY,
        "checkpoint": str(found.path),
        "checkpoint_sha256": found.sha256,
        "checkpoint_step": found.state["step"],
        "encoder_sha256": frozen,
        "train_manifest": train.fingerprint,
        "val_manifest": val.fingerprint,
        "seconds": round(time.monotonic() - started, 1),
    }
    out = arguments.out or default_out(found.path)
    name = "linear-untrained" if arguments.untrained else "linear"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    torch.save(
        {"weight": layer.weight.detach().cpu(), "bias": layer.bias.detach().cpu(), "classes": list(train.classes)},
        out / f"{name}.pt",
    )
    print(
        f"protocol {PROTOCOL}{' (untrained encoder)' if arguments.untrained else ''}: top-1 {top1:.2f} %, top-5 "
        f"{top5:.2f} % on {len(val):,} images "
        f"({extracted - started:.0f} s features, {time.monotonic() - extracted:.0f} s classifier); {out / name}.json"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Linear probe", epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ckpt", type=Path, required=True, metavar="RUN_OR_FILE", help="run folder, checkpoint folder or its state.pt"
    )
    parser.add_argument(
        "--data", help="folder or address of packed shards with train and val (default: what the run was trained on)"
    )
    parser.add_argument(
        "--untrained", action="store_true", help="probe the encoder with the weights its run began with"
    )
    parser.add_argument(
        "--image-size", type=positive_int, metavar="PX", help="side of the central view (default: as pre-trained)"
    )
    parser.add_argument("--batch", type=positive_int, default=256, help="images embedded at a time (default: 256)")
    parser.add_argument(
        "--cache", type=Path, default=Path("~/.cache/simclr-dali"), metavar="FOLDER", help="keeps remote shards"
    )
    parser.add_argument("--cache-gb", type=float, default=200.0, metavar="GB", help="how much of them (default: 200)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where linear.json and linear.pt go (default: the run folder)"
    )
    return parser.parse_args()


def default_out(state: Path) -> Path:
    """RUN for RUN/checkpoints/step-*/state.pt, else the file's own folder."""
    inside_run = state.parent.parent.name == "checkpoints"
    return state.parent.parent.parent if inside_run else state.parent


if __name__ == "__main__":
    run_main(main, CheckpointError)
