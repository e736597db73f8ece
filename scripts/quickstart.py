"""The main job on small pictures: draw (or take), pack, pre-train, probe, report. Run by scripts/quickstart.sh.

Everything goes to runs/quickstart in the working folder, which is made anew; runs/quickstart/summary.json holds the
figures of the closing table.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from simclr_dali.shards.errors import UserError, run_main

FOLDER = Path("runs/quickstart")
TOOLS = Path(sys.executable).parent  # of the virtual environment
# Images that pre-training sees in all, whatever the set: 20 passes over the drawn one, 2 to 3 minutes on 2 cores.
IMAGES_SEEN = 48_000


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="quickstart.sh", description="Draw or take pictures, pre-train, probe, report."
    )
    parser.add_argument(
        "images", type=Path, nargs="?", metavar="IMAGE_FOLDER", help="train/<class>/* and val/<class>/*; default: drawn"
    )
    parser.add_argument("--images-seen", type=int, default=IMAGES_SEEN, metavar="N", help="length of pre-training")
    arguments = parser.parse_args()
    images = arguments.images
    started = time.monotonic()
    if images is not None:
        check_images(images)
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    FOLDER.mkdir(parents=True)
    pictures, packed, run = images or FOLDER / "pictures", FOLDER / "shards", FOLDER / "run"

    if images is None:
        stage("Drawing pictures of 12 classes", [sys.executable, ROOT / "scripts/draw_pictures.py", pictures])
    # Small shards, so that the shuffle of the data order has some to work with.
    stage("Packing shards", [ROOT / "scripts/make_shards.sh", pictures, packed, "--samples-per-shard", 300])
    images_in_train = json.loads((packed / "train" / "manifest.json").read_text())["samples"]
    epochs = max(1, round(arguments.images_seen / images_in_train))
    length = ["--set", f"simclr.epochs={epochs}", "--set", f"simclr.warmup_epochs={epochs / 20}"]
    launch = [TOOLS / "deepspeed", "--quiet", "--num_gpus", 1, *launcher_port()]
    command = [ROOT / "train/pretrain.py", "--config", ROOT / "train/configs/quickstart.json", "--data", packed]
    stage("Pre-training without labels", [*launch, *command, "--run", run, *length])
    if not (run / "finished.json").is_file():
        raise UserError(f"pre-training was stopped; {run} goes on with the command above, a new quickstart begins anew")
    probe = [sys.executable, ROOT / "eval/linear.py", "--ckpt", run]
    stage("Probing the encoder as it was before training", [*probe, "--untrained"])
    stage("Probing the trained encoder", probe)
    stage("Writing the report", [sys.executable, ROOT / "eval" / "report.py", run])
    stage("Drawing it in one picture", [sys.executable, ROOT / "scripts/overview.py", run, FOLDER / "overview.svg"])

    summary = report(run, pictures, packed, time.monotonic() - started)
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def check_images(images: Path) -> None:
    """Refuse a folder that could not be probed, or that lies where this run clears the last one's results."""
    from simclr_dali.shards.sources.find import find_sources  # here: --help is to work before anything is installed

    if FOLDER.resolve() in (images.resolve(), *images.resolve().parents):
        raise UserError(f"{images} lies inside {FOLDER}, which each quickstart makes anew; copy it elsewhere first")
    splits = {source.split for source in find_sources(images).sources}
    if "val" not in splits:
        raise UserError(f"{images} has no folder 'val'; the probe needs {images}/val/<class>/*")


def launcher_port() -> list[str]:
    """A free port, since the launcher's default may be another job's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return ["--master_port", str(probe.getsockname()[1])]


def stage(title: str, command: list[Any]) -> None:
    """Run one command as a user would; its failure ends the quickstart with its own message."""
    words = [str(word) for word in command]
    print(f"\n== {title}\n   {' '.join(words)}", flush=True)
    # The launcher starts the interpreter that it finds first.
    environment = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}"}
    status = subprocess.run(words, env=environment, check=False).returncode
    if status:
        sys.exit(status)


def report(run: Path, pictures: Path, packed: Path, seconds: float) -> dict[str, Any]:
    """Print the table; return what it shows."""
    trained, untrained = (json.loads((run / f"{name}.json").read_text()) for name in ("linear", "linear-untrained"))
    finished = json.loads((run / "finished.json").read_text())
    summary = {
        "chance": round(100 / trained["classes"], 3),
        "untrained": untrained["top1"],
        "trained": trained["top1"],
        "images_per_s": finished.get("images_per_s", 0.0),
        "seconds": round(seconds, 1),
        "protocol": trained["protocol"],
        "pictures": str(pictures),
        "shards": str(packed),
        "run": str(run),
        "report": str(run / "report.html"),
    }
    low, high = trained["top1_interval_95"]
    rows = [
        ("chance", f"{summary['chance']:6.2f} %"),
        ("untrained encoder", f"{summary['untrained']:6.2f} %  linear probe, protocol {summary['protocol']}"),
        (
            "trained encoder",
            f"{summary['trained']:6.2f} %  95 % interval {low:.1f} .. {high:.1f} on {trained['val_images']} images",
        ),
        ("pre-training", f"{summary['images_per_s']:,.0f} images/s, two views each"),
        ("whole time", f"{seconds:.0f} s"),
        ("pictures", f"{pictures}/"),
        ("shards", f"{packed}/"),
        ("run, checkpoints", f"{run}/"),
        ("these figures", f"{FOLDER / 'summary.json'}"),
        ("one picture", f"{FOLDER / 'overview.svg'}"),
        ("curves and more", f"{run / 'report.html'}"),
    ]
    print("\n" + "\n".join(f"  {name:18} {value}" for name, value in rows), flush=True)
    return summary


if __name__ == "__main__":
    run_main(main)
