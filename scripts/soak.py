"""Train the quickstart while it is killed, stopped and its files are damaged, and count what gets lost.

    scripts/soak.sh [MINUTES] [--seed N]

Two thirds of the time: a run of one or two processes is started, does some steps, and is ended in one of ENDINGS;
between runs, samples in the shards and now and then the newest checkpoint get a flipped bit. After every end all its
processes must be gone, the newest checkpoint must be sound and no older than one interval, and the metrics must have
each step once. The rest of the time one run is left alone and the memory of its process is watched. The last line is

    survived N kills, M damages, 0 lost
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from simclr_dali.shards.command_line import positive_int
from simclr_dali.shards.errors import UserError, run_main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="soak.sh", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("minutes", type=positive_int, nargs="?", default=30, help="default: 30")
    parser.add_argument("--seed", type=int, default=0, help="of what is done when (default: 0)")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import psutil

from scripts.quickstart import TOOLS, launcher_port, stage
from simclr_dali.model import checkpoint
from simclr_dali.shards.manifest import ShardSet, load_split
from simclr_dali.shards.verify import verify_split

FOLDER = ROOT / "runs" / "soak"
EVERY = 5  # steps between checkpoints
MAX_BAD = 0.05  # of the samples; damage stops well below
SECONDS_TO_BEGIN = 120.0
SECONDS_TO_END = 60.0
ENDINGS = ("kill -9 of the group", "kill -9 of a rank", "SIGTERM to the launcher", "SIGTERM to a rank", "SIGINT to all")


class Soak:
    """A run, and what has been done to it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.run, self.shards = FOLDER / "run", FOLDER / "shards"
        self.kills = self.lost = 0
        self.damaged_samples: set[int] = set()
        self.damaged_checkpoints = 0

    def command(self, processes: int) -> list[Any]:
        settings = {
            "simclr.epochs": 100_000,
            "simclr.log_every": 1,
            "simclr.checkpoint_every": EVERY,
            "simclr.max_bad_fraction": MAX_BAD,
        }
        launcher = [TOOLS / "deepspeed", "--quiet", "--num_gpus", processes, *launcher_port()]
        words = ["--config", ROOT / "train/configs/quickstart.json", "--data", self.shards, "--run", self.run]
        for key, value in settings.items():
            words += ["--set", f"{key}={value}"]
        return [*launcher, ROOT / "train/pretrain.py", *words]

    def begin(self, processes: int) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
        with (FOLDER / "output.txt").open("ab") as log:
            command = [str(word) for word in self.command(processes)]
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def cycle(self) -> None:
        """Start, let it work, end it, look at what is left."""
        before, processes = self.kept(), self.random.choice((1, 1, 2))
        launcher = self.begin(processes)
        if not self.works(launcher, self.reported()[1] + 1):
            self.lose(f"the run did not go on from step {before} within {SECONDS_TO_BEGIN:.0f} s")
        time.sleep(self.random.uniform(0, 6))
        ending = self.random.choice(ENDINGS)
        family = end(launcher, ending, self.random)
        self.kills += 1
        _, alive = psutil.wait_procs(family, timeout=SECONDS_TO_END)
        for process in alive:
            self.lose(f"process {process.pid} outlived {ending!r}")
            process.kill()
        launcher.wait()
        self.look(before, ending)

    def works(self, launcher: subprocess.Popen[bytes], step: int) -> bool:
        limit = time.monotonic() + SECONDS_TO_BEGIN
        while time.monotonic() < limit and launcher.poll() is None:
            if self.reported()[1] >= step:
                return True
            time.sleep(0.1)
        return False

    def look(self, before: int, ending: str) -> None:
        kept, (steps, last) = self.kept(), self.reported()
        print(f"{ending:25} steps reported {last + 1:6}, kept {kept:6}, lost so far {self.lost}", flush=True)
        most = EVERY + 1 if ending.startswith("kill") else 0  # steps that may have to be done again
        if kept < before or last + 1 - kept > most:
            self.lose(f"step {kept} is kept of {last + 1}, before it was {before}")
        if steps != list(range(last + 1)):
            self.lose("a step is missing from the metrics, or doubled")

    def kept(self) -> int:
        """Step of the newest checkpoint, which must be sound."""
        try:
            found = checkpoint.newest(self.run)
        except UserError as error:
            self.lose(str(error))
            return 0
        return int(found.state["step"]) if found else 0

    def reported(self) -> tuple[list[int], int]:
        """Steps of the whole lines of the metrics, and the last of them (-1: none)."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        steps = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
        return steps, steps[-1] if steps else -1

    def lose(self, what: str) -> None:
        self.lost += 1
        print(f"LOST: {what}", flush=True)

    def damage_sample(self, shards: ShardSet) -> None:
        sample = self.random.choice([one for one in range(len(shards)) if one not in self.damaged_samples])
        row = shards.samples[sample]
        flip(shards.folder / shards.shards[row["shard"]].name, int(row["offset"]), int(row["length"]), self.random)
        self.damaged_samples.add(sample)

    def damage_checkpoint(self) -> None:
        """Flip a bit of the newest checkpoint, where an older one is left."""
        folders = sorted((self.run / "checkpoints").glob("step-*"))
        if len(folders) > 1:
            state = folders[-1] / "state.pt"
            flip(state, 0, state.stat().st_size, self.random)
            self.damaged_checkpoints += 1


def flip(path: Path, offset: int, length: int, chance: random.Random) -> None:
    at = offset + chance.randrange(length)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))


def end(launcher: subprocess.Popen[bytes], ending: str, chance: random.Random) -> list[psutil.Process]:
    """End a run in that way; return all its processes."""
    try:
        family = psutil.Process(launcher.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    ranks = [child for child in family if "deepspeed.launcher.launch" not in child.cmdline()]
    target = chance.choice(ranks) if ranks else psutil.Process(launcher.pid)
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        if ending == "kill -9 of the group":
            os.killpg(launcher.pid, signal.SIGKILL)
        elif ending == "kill -9 of a rank":
            target.kill()
        elif ending == "SIGTERM to the launcher":
            launcher.terminate()
        elif ending == "SIGTERM to a rank":
            target.terminate()
        else:
            os.killpg(launcher.pid, signal.SIGINT)
    return family


def watch_memory(soak: Soak, seconds: float) -> list[float]:
    """Megabytes of the training process every few seconds of one undisturbed run, from its tenth step on."""
    launcher = soak.begin(1)
    if not soak.works(launcher, soak.reported()[1] + 10):
        soak.lose("the last run did not begin")
        return [0.0]
    family = psutil.Process(launcher.pid).children(recursive=True)
    (rank,) = [child for child in family if "deepspeed.launcher.launch" not in child.cmdline()]
    megabytes: list[float] = []
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and rank.is_running():
        megabytes.append(rank.memory_info().rss / 1e6)
        time.sleep(2)
    rank.terminate()
    _, alive = psutil.wait_procs(family, timeout=SECONDS_TO_END)
    if alive or launcher.wait() != 0:
        soak.lose("the last run did not leave with 0 when asked to")
    soak.look(0, "SIGTERM to a rank")
    return megabytes


def main(given: argparse.Namespace) -> None:
    started = time.monotonic()
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    FOLDER.mkdir(parents=True)
    pictures = FOLDER / "pictures"
    stage("Drawing pictures of 12 classes", [sys.executable, ROOT / "scripts/draw_pictures.py", pictures])
    soak = Soak(given.seed)
    stage("Packing shards", [ROOT / "scripts/make_shards.sh", pictures, soak.shards, "--samples-per-shard", 300])
    shards = load_split(soak.shards, "train")

    seconds = 60.0 * given.minutes
    while time.monotonic() - started < seconds * 2 / 3:
        soak.cycle()
        if len(soak.damaged_samples) < MAX_BAD / 2 * len(shards):
            soak.damage_sample(shards)
        if soak.random.random() < 0.15:
            soak.damage_checkpoint()
    megabytes = watch_memory(soak, max(30.0, seconds - (time.monotonic() - started)))

    named = list(verify_split(shards, full=True))
    if len(named) < len(soak.damaged_samples):
        soak.lose(f"{len(soak.damaged_samples)} samples are damaged, the verification names {len(named)} places")
    quarter = max(1, len(megabytes) // 4)
    first, last = statistics.median(megabytes[:quarter]), statistics.median(megabytes[-quarter:])
    print(
        f"memory of the training process: {first:,.0f} MB in the first quarter of its last run, {last:,.0f} MB in the "
        f"last, at most {max(megabytes):,.0f} MB"
    )
    damages = len(soak.damaged_samples) + soak.damaged_checkpoints
    print(f"survived {soak.kills} kills, {damages} damages, {soak.lost} lost")
    if soak.lost:
        sys.exit(1)


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
