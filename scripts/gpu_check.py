"""Prove on the GPU at hand that everything works, and measure it. Run by scripts/gpu_check.sh.

    scripts/gpu_check.sh OUT                                     # 8 minutes
    scripts/gpu_check.sh --minutes 15 --data /data/imagenette OUT
    scripts/gpu_check.sh --only tests loader OUT
    scripts/gpu_check.sh --device cpu --minutes 3 OUT            # at small sizes, to try it where there is no GPU

Stages, the most important first:

{stages}

Each stage gets its share of the time that is left, and writes OUT/STAGE.json as soon as it is over, also where it
failed or was cut, with the results that it has; OUT/STAGE.log has what it printed. A table follows each. The same
command again does what did not go well before. No network is needed; without --data pictures are drawn, of ImageNet's
sizes on a GPU. $GPU_CHECK_PYTHON names an interpreter that has all that is needed, where nothing can be installed. The
exit code is 0 where all stages went well.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from simclr_dali.shards.command_line import positive_number
from simclr_dali.shards.durable import write_durably
from simclr_dali.shards.errors import UserError, run_main

SECONDS_TO_END = 5  # for a command that is told to, before it is killed
# What each stage does, for --help and for the list of what ran on a GPU.
WORDS = {
    "smoke": "a training that is stopped and goes on, and a probe",
    "tests": "the tests for a GPU",
    "step": "the time of a step: compiled, not compiled, deterministic, with real input",
    "loader": "the input path, with the JPEG engine and with decoded pictures kept",
    "memory": "memory by images, over 300 steps, and of the loss up to 131,072 images",
    "quality": "linear probe and kNN after a training",
    "rivals": "whole training steps against others'",
}
IMAGENET_SIZE, SMALL_SIZE = (500, 375), (96, 96)


@dataclass(frozen=True)
class Setting:
    """Where a check runs, and on what."""

    out: Path
    on_gpu: bool
    given: Path | None
    """Pictures that were given."""

    @property
    def images(self) -> Path:
        return self.given or self.out / "pictures"

    @property
    def shards(self) -> Path:
        """As they are."""
        return self.out / "shards"

    @property
    def small(self) -> Path:
        """With a short side of at most 144 pixels."""
        return self.out / "shards-144"

    def raw(self, name: str) -> Path:
        """A result of one command."""
        return self.out / "raw" / f"{name}.json"

    @property
    def device(self) -> list[str]:
        return ["--device", "gpu" if self.on_gpu else "cpu"]


Commands = list[list[Any]]


class Stage(NamedTuple):
    """Commands in their order; those of them that write results name them by ``Setting.raw``."""

    name: str
    share: int
    """Of the time, against that of the others."""
    commands: Callable[[Setting, float], Commands]
    """For a setting and a number of seconds."""
    results: tuple[str, ...]
    words: Callable[[dict[str, Any]], str]
    """What the table says of the results that are there, by name."""


def sets(*words: str) -> list[str]:
    return [part for word in words for part in ("--set", word)]


def prepare(setting: Setting, _: float) -> Commands:
    commands: Commands = []
    if setting.given is None:
        size, train, val = (IMAGENET_SIZE, 40, 10) if setting.on_gpu else (SMALL_SIZE, 12, 6)
        drawn = f"draw_set(Path({str(setting.images)!r}), {train}, {val}, size={size})"
        commands.append(["-c", f"from pathlib import Path; from scripts.draw_pictures import draw_set; {drawn}"])
    pack = ["-m", "simclr_dali", "pack", setting.images]
    commands.append([*pack, setting.shards, "--samples-per-shard", 100])
    commands.append([*pack, setting.small, "--samples-per-shard", 100, "--resize", 144])
    return commands


def smoke(setting: Setting, _: float) -> Commands:
    run = setting.out / "smoke-run"
    small = sets("simclr.compile=no", "train_batch_size=32", "optimizer.params.lr=auto", "simclr.epochs=2")
    train = ["train/pretrain.py", "--config", "quickstart.json", "--data", setting.small, "--run", run, *small]
    stopped = [*train, "--stop-after-steps", 1]
    return [stopped, train, ["eval/linear.py", "--ckpt", run, "--out", setting.out / "raw"]]


def tests(setting: Setting, _: float) -> Commands:
    junit = setting.out / "raw/tests.xml"
    files = ["tests/test_gpu.py", *(["tests/test_kernels.py"] if setting.on_gpu else [])]
    parallel = ["-n", min(6, os.cpu_count() or 1) if setting.on_gpu else 0, "-p", "no:cacheprovider"]
    counted = "import sys, scripts.gpu_check as c; c.count_tests(*sys.argv[1:])"
    return [
        ["-m", "pytest", "-q", *files, *parallel, f"--junitxml={junit}"],
        ["-c", counted, junit, setting.raw("tests")],
    ]


def step(setting: Setting, _: float) -> Commands:
    if setting.on_gpu:
        bench = ["scripts/bench/step.py", "--config", "ds_sqrt_b256.json", "--steps", 10, "--rounds", 2]
        bench += sets("simclr.lanes=16", "simclr.epochs=1000")
    else:
        bench = ["scripts/bench/step.py", "--config", "quickstart.json", "--steps", 2, "--rounds", 1, "--warm-up", 1]
        bench += sets("train_batch_size=16", "optimizer.params.lr=auto", "simclr.image_size=32")
    real = [*bench, "--data", setting.shards, *sets(f"simclr.compile={'inductor' if setting.on_gpu else 'no'}")]
    rows = ["--compile", "eager", "deterministic"] if setting.on_gpu else ["--compile", "eager"]
    return [
        [*real, "--json", setting.raw("step-real")],
        [*bench, "--synthetic-only", *rows, "--json", setting.raw("step-rows")],
    ]


def loader(setting: Setting, _: float) -> Commands:
    bench = ["scripts/bench/loader.py", setting.images, *setting.device, "--rounds", 1, "--json", setting.raw("loader")]
    if setting.on_gpu:
        return [[*bench, "--batch", 256, "--seconds", 2, "--only", "ours", "solo-learn"]]
    return [[*bench, "--batch", 16, "--seconds", 0.5, "--only", "kept", "solo-learn"]]


def memory(setting: Setting, _: float) -> Commands:
    bench = ["scripts/bench/memory.py", *sets("simclr.compile=no")]
    loss = ["scripts/bench/loss.py", *setting.device, "--rounds", 1, "--seconds", 0, "--json", setting.raw("loss")]
    if setting.on_gpu:
        config = ["--config", "ds_sqrt_b256.json"]
        return [
            [*bench, *config, "--batches", 128, 256, "--steps", 20, "--json", setting.raw("memory")],
            [*loss, "--pairs", 16384, 131072],
            [*bench, *config, "--batches", 64, "--steps", 300, "--json", setting.raw("plateau")],
        ]
    config = ["--config", "quickstart.json", *sets("simclr.image_size=32")]
    return [
        [*bench, *config, "--batches", 8, "--steps", 10, "--json", setting.raw("plateau")],
        [*loss, "--pairs", 256],
    ]


def quality(setting: Setting, seconds: float) -> Commands:
    bench = ["scripts/bench/quality.py", setting.small, "--seconds", f"{0.9 * seconds:.0f}"]
    bench += ["--json", setting.raw("quality")]
    if setting.on_gpu:
        return [[*bench, *sets("simclr.image_size=128", "simclr.lanes=16")]]
    small = sets("train_batch_size=32", "optimizer.params.lr=auto", "simclr.image_size=32")
    return [[*bench, "--config", "quickstart.json", "--most-epochs", 2, *small]]


def against_rivals(setting: Setting, _: float) -> Commands:
    bench = [
        "scripts/bench/trainers.py",
        setting.images,
        *setting.device,
        "--rounds",
        1,
        "--json",
        setting.raw("rivals"),
    ]
    if setting.on_gpu:
        return [[*bench, "--image-size", 128, "--batch", 256, "--seconds", 4]]
    small = ["--width", 0.25, "--image-size", 32, "--batch", 8, "--seconds", 0.2]
    return [[*bench, *small, "--only", "solo-learn"]]


def count_tests(junit: str, out: str) -> None:
    """Passed, failed and skipped tests of a JUnit file, as JSON."""
    from xml.etree import ElementTree

    (suite,) = ElementTree.parse(junit).getroot().iter("testsuite")
    number = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = number["failures"] + number["errors"]
    passed = number["tests"] - failed - number["skipped"]
    Path(out).write_text(json.dumps({"passed": passed, "failed": failed, "skipped": number["skipped"]}) + "\n")


def of_step(found: dict[str, Any]) -> str:
    words = []
    if real := found.get("step-real"):
        kinds = ((name, real[name]["step"]["median"]) for name in ("synthetic", "real"))
        words += [f"{name} {milliseconds:,.1f} ms" for name, milliseconds in kinds]
        words.append(f"lost to input {real['lost to input, %']['median']:.1f} %")
    for row, result in found.get("step-rows", {}).get("rows", {}).items():
        measured = f"{result['synthetic']['step']['median']:,.1f} ms" if "synthetic" in result else "failed"
        words.append(f"{row} {measured}")
    return ", ".join(words)


def of_rates(name: str) -> Callable[[dict[str, Any]], str]:
    def words(found: dict[str, Any]) -> str:
        rates = found[name]["images_per_s"]
        return ", ".join(f"{row} {rate['median']:,.0f}/s" for row, rate in rates.items())

    return words


def of_memory(found: dict[str, Any]) -> str:
    batches, long = (found.get(name, {}).get("batches", {}) for name in ("memory", "plateau"))
    words = [f"batch {batch}: {row['peak'] / 1e9:.2f} GB" for batch, row in {**long, **batches}.items()]
    for row in long.values():
        words.append(f"over the steps {row['held'][0] / 1e9:.2f} to {row['held'][-1] / 1e9:.2f} GB")
    for pairs, rows in found.get("loss", {}).get("pairs", {}).items():
        words.append(f"loss of {int(pairs):,} images {rows['ours']['ms']['median']:,.0f} ms")
    return ", ".join(words)


def of_quality(found: dict[str, Any]) -> str:
    result = found["quality"]
    neighbours = ", ".join(f"kNN {k} {top1:.1f} %" for k, top1 in result["knn"].items())
    return f"{result['epochs']} epochs, linear {result['linear']:.1f} %, {neighbours}"


STAGES = (
    Stage("smoke", 60, smoke, ("linear",), lambda found: f"linear {found['linear']['top1']:.1f} %"),
    Stage("tests", 80, tests, ("tests",), lambda found: ", ".join(f"{n} {what}" for what, n in found["tests"].items())),
    Stage("step", 150, step, ("step-real", "step-rows"), of_step),
    Stage("loader", 90, loader, ("loader",), of_rates("loader")),
    Stage("memory", 60, memory, ("memory", "plateau", "loss"), of_memory),
    Stage("quality", 90, quality, ("quality",), of_quality),
    Stage("rivals", 90, against_rivals, ("rivals",), of_rates("rivals")),
)
PREPARE = Stage("prepare", 40, prepare, (), lambda _: "pictures and shards")


def parse_arguments() -> argparse.Namespace:
    stages = "\n".join(f"    {name:9} {words}" for name, words in WORDS.items())
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh",
        description=(__doc__ or "").format(stages=stages),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of results; what is there is not done again")
    parser.add_argument("--minutes", type=positive_number, default=8.0, metavar="M", help="for all of it (default: 8)")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help=f"of {', '.join(names)}")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="image folder with train and val (default: drawn)")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu", help="default: gpu")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    deadline = time.monotonic() + 60 * arguments.minutes
    setting = Setting(arguments.out.resolve(), arguments.device == "gpu", arguments.data and arguments.data.resolve())
    if setting.given and not (setting.given / "val").is_dir():
        raise UserError(
            f"{setting.given} has no folder 'val', which the probes need; give train/ and val/ in one folder"
        )
    sees_gpu = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if setting.on_gpu and subprocess.run([sys.executable, "-c", sees_gpu], check=False).returncode:
        raise UserError("torch sees no GPU here; --device cpu tries the check at small sizes")
    (setting.out / "raw").mkdir(parents=True, exist_ok=True)
    wanted = [PREPARE, *(stage for stage in STAGES if not arguments.only or stage.name in arguments.only)]
    for number, stage in enumerate(wanted):
        if went_well(setting, stage):
            continue
        left = deadline - time.monotonic() - 1
        seconds = left * stage.share / sum(one.share for one in wanted[number:] if not went_well(setting, one))
        do(stage, setting, max(0.0, seconds))
        if stage is PREPARE and not went_well(setting, stage):
            raise UserError(f"the pictures could not be made ready; see {setting.out / 'prepare.log'}")
        table(setting, wanted)
    sys.exit(0 if all(went_well(setting, stage) for stage in wanted) else 1)


def went_well(setting: Setting, stage: Stage) -> bool:
    path = setting.out / f"{stage.name}.json"
    return path.is_file() and json.loads(path.read_text())["outcome"] == "done"


def do(stage: Stage, setting: Setting, seconds: float) -> None:
    """Run a stage's commands for at most so many seconds, and write what became of it."""
    started = time.monotonic()
    print(f"== {stage.name}, at most {seconds:.0f} s", flush=True)
    for name in stage.results:
        setting.raw(name).unlink(missing_ok=True)
    outcome, commands = "done", stage.commands(setting, seconds)
    with (setting.out / f"{stage.name}.log").open("w") as log:
        for command in commands:
            status = run(command, setting, log, seconds - (time.monotonic() - started))
            if status is None:
                outcome = "cut"
                break
            if status:
                outcome = "failed"
    found = {name: json.loads(setting.raw(name).read_text()) for name in stage.results if setting.raw(name).is_file()}
    result = {
        "stage": stage.name,
        "outcome": outcome,
        "words": stage.words(found) if found or not stage.results else "nothing",
        "seconds": round(time.monotonic() - started, 1),
        "limit": round(seconds, 1),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commands": [" ".join(str(word) for word in command).replace(str(setting.out), "OUT") for command in commands],
        "results": found,
    }
    write_durably(setting.out / f"{stage.name}.json", (json.dumps(result, indent=1) + "\n").encode())


def run(command: list[Any], setting: Setting, log: Any, seconds: float) -> int | None:
    """The exit status of a command of Python, or None where it was cut after ``seconds``."""
    words = [sys.executable, *map(str, command)]
    log.write(f"$ {' '.join(words)}\n")
    log.flush()
    if seconds <= 0:
        return None
    path = os.pathsep.join([str(ROOT), str(ROOT / ".package"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    environment["DS_ACCELERATOR"] = "cuda" if setting.on_gpu else "cpu"
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also where this command was asked to end
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a command and what it started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            return
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            continue


def table(setting: Setting, wanted: list[Stage]) -> None:
    """What is known so far."""
    print(f"\n{'stage':9} {'outcome':8} {'seconds':>8}  result")
    for stage in wanted:
        path = setting.out / f"{stage.name}.json"
        if path.is_file():
            result = json.loads(path.read_text())
            print(f"{stage.name:9} {result['outcome']:8} {result['seconds']:8.0f}  {result['words']}")
        else:
            print(f"{stage.name:9} {'missing':8}")
    print(flush=True)


if __name__ == "__main__":
    run_main(main)
