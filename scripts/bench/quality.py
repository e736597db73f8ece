"""How good an encoder becomes in a given time: pre-training, then the fast linear probe and kNN.

    python scripts/bench/quality.py SHARDS --config imagenette.json --set simclr.image_size=128 --seconds 300

A first run of two epochs tells how long an epoch takes; the second one is as long as the rest of the time allows (and
--most-epochs), with its whole schedule, and is probed. With --epochs there is only that second run, of so many epochs.
SHARDS needs labels and a val split.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from scripts.bench.figures import machine
from scripts.bench.in_turn import output_of
from simclr_dali.shards.command_line import file_to_write, positive_int, positive_number
from simclr_dali.shards.errors import run_main

PACKAGES = ("torch", "nvidia-dali-cuda120", "deepspeed")
PROBES = 0.2  # share of the time that is left to them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="SHARDS", help="folder made by scripts/make_shards.sh")
    parser.add_argument("--config", default="imagenette.json", help="default: imagenette.json")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")
    parser.add_argument("--seconds", type=positive_number, default=300.0, metavar="S", help="for all of it (300)")
    parser.add_argument("--most-epochs", type=positive_int, default=10**6, metavar="N", help="of the second run")
    parser.add_argument("--epochs", type=positive_int, metavar="N", help="so many, in whatever time they take")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="where its runs stay (default: removed at the end)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(given, given.runs or Path(scratch), time.monotonic())
    low, high = figures["linear_interval_95"]
    print(
        f"{figures['epochs']} epochs in {figures['seconds']:.0f} s, {figures['images_per_s']:,.0f} images/s: linear "
        f"{figures['linear']:.2f} % ({low:.1f} .. {high:.1f}), "
        + ", ".join(f"kNN with k {k} {top1:.2f} %" for k, top1 in figures["knn"].items())
    )
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(given: argparse.Namespace, runs: Path, started: float) -> dict[str, Any]:
    import torch  # seconds, for which --help does not wait

    run = runs / "run"
    images = json.loads((given.data / "train" / "manifest.json").read_text())["samples"]
    pretrain = [ROOT / "train/pretrain.py", "--config", given.config, "--data", given.data]
    pretrain += [word for one in given.set for word in ("--set", one)]

    def length(epochs: int) -> list[Any]:
        return ["--set", f"simclr.epochs={epochs}", "--set", f"simclr.warmup_epochs={epochs / 20:g}"]

    if (epochs := given.epochs) is None:
        call([*pretrain, "--run", runs / "pilot", *length(2), "--set", "simclr.log_every=1"])
        lines = (runs / "pilot" / "speed.jsonl").read_text().splitlines()
        # The first steps compile, and wait for the first batches.
        rate = statistics.median(json.loads(line)["images_per_s"] for line in lines[len(lines) // 2 :])
        left = (1 - PROBES) * (given.seconds - (time.monotonic() - started))
        epochs = min(given.most_epochs, max(2, int(left * rate / images)))
    call([*pretrain, "--run", run, *length(epochs)])
    finished = json.loads((run / "finished.json").read_text())
    call([ROOT / "eval/linear.py", "--ckpt", run])
    call([ROOT / "eval/knn.py", "--ckpt", run])
    linear, knn = (json.loads((run / f"{name}.json").read_text()) for name in ("linear", "knn"))
    return {
        "config": given.config,
        "set": given.set,
        "epochs": epochs,
        "images": images,
        "seconds": finished["seconds"],
        "images_per_s": finished["images_per_s"],
        "linear": linear["top1"],
        "linear_interval_95": linear["top1_interval_95"],
        "protocol": linear["protocol"],
        "knn": {str(k): knn[f"k{k}"]["top1"] for k in knn["k"]},
        "val_images": linear["val_images"],
        **machine("gpu" if torch.cuda.is_available() else "cpu", PACKAGES),
    }


def call(words: list[Any]) -> None:
    """Run a script of ours as a user does. Raises UserError where it fails."""
    output_of([sys.executable, *words], " ".join(map(str, words)))


if __name__ == "__main__":
    run_main(main)
