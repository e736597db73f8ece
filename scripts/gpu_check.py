"""Prove on the GPU at hand that everything works, and measure it. Run by scripts/gpu_check.sh.

    scripts/gpu_check.sh OUT                                     # 8 minutes
    scripts/gpu_check.sh --minutes 15 --data /data/imagenette OUT
    scripts/gpu_check.sh --only tests loader OUT                 # of the stages, these
    scripts/gpu_check.sh --device cpu --minutes 3 OUT            # at small sizes, to try it where there is no GPU

Stages, the most important first:

{stages}

Each stage gets its share of the time that is left, and writes OUT/STAGE.json as soon as it is over, also where it
failed or was cut, with the results that it has; OUT/STAGE.log has what it printed. A table follows each. The same
command again does what did not go well before. No network is needed; without --data pictures are drawn, of ImageNet's
sizes on a GPU; FOLDER has train and val, and is packed twice (Imagenette's 13,000 pictures in seconds).
$GPU_CHECK_PYTHON names an interpreter that has all that is needed, where nothing can be installed. The exit code is 0
where all stages went well.
"""

import argparse
import ctypes
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from scripts.gpu_stages import PREPARE, STAGES, WORDS, Setting, Stage
from simclr_dali.shards.command_line import positive_number
from simclr_dali.shards.durable import read_object, refusals_named, write_durably
from simclr_dali.shards.errors import UserError, run_main

PR_SET_PDEATHSIG = 1  # of prctl(2)
SECONDS_TO_END = 5  # for a command that is told to, before it is killed


def parse_arguments() -> argparse.Namespace:
    stages = "\n".join(f"    {name:9} {words}" for name, words in WORDS.items())
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh",
        description=(__doc__ or "").format(stages=stages),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "out", type=Path, nargs="?", metavar="OUT", help="folder of results; goes on with what is there"
    )
    parser.add_argument("--minutes", type=positive_number, default=8.0, metavar="M", help="for all of it (default: 8)")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help=f"of {', '.join(names)}")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="image folder with train and val (default: drawn)")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu", help="default: gpu")
    given = parser.parse_args()
    if given.out is None and given.only and given.only[-1] not in names:  # argparse took OUT for one more stage
        given.out = Path(given.only.pop())
    if given.out is None:
        parser.error("OUT is missing, the folder of results")
    if unknown := [name for name in given.only if name not in names]:
        parser.error(f"--only {unknown[0]}: there is no such stage; give some of {', '.join(names)}")
    return given


def main() -> None:
    arguments = parse_arguments()
    # A stage is then written as cut, and its processes end with this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    deadline = time.monotonic() + 60 * arguments.minutes
    setting = Setting(arguments.out.resolve(), arguments.device == "gpu", arguments.data and arguments.data.resolve())
    if setting.given and not (setting.given / "val").is_dir():
        raise UserError(
            f"{setting.given} has no folder 'val', which the probes need; give train/ and val/ in one folder"
        )
    about = described(setting)
    wanted = [PREPARE, *(stage for stage in STAGES if not arguments.only or stage.name in arguments.only)]
    for number, stage in enumerate(wanted):
        if went_well(setting, stage):
            continue
        left = max(0.0, deadline - time.monotonic() - 1)
        shares = sum(one.share for one in wanted[number:] if not went_well(setting, one))
        do(stage, setting, left * stage.share / shares if stage.share else left, about)
        if stage is PREPARE and not went_well(setting, stage):
            raise UserError(f"the pictures could not be made ready; see {setting.out / 'prepare.log'}")
        if stage is not wanted[-1]:
            table(setting, wanted)
    table(setting, wanted)
    sys.exit(0 if all(went_well(setting, stage) for stage in wanted) else 1)


def described(setting: Setting) -> dict[str, Any]:
    """On what this check runs, kept in OUT/check.json. Raises UserError where there is no GPU, or where OUT holds what
    was found on something else."""
    code = (
        "import json, sys, torch; from scripts.bench.figures import machine; from simclr_dali import __version__; "
        "gpu = sys.argv[1] == 'gpu'; found = not gpu or torch.cuda.is_available(); "
        "print(json.dumps(machine(sys.argv[1], sys.argv[2:]) | {'version': __version__} if found else None))"
    )
    packages = ("torch", "nvidia-dali-cuda120", "deepspeed", "lightly")
    words = [sys.executable, "-c", code, setting.device[1], *packages]
    done = subprocess.run(words, env=environment(setting), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{sys.executable} lacks what is needed: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found is None:
        raise UserError("torch sees no GPU here; --device cpu tries the check at small sizes")
    about = {**found, "data": str(setting.given or "drawn")}
    path = setting.out / "check.json"
    with refusals_named(path):
        (setting.out / "raw").mkdir(parents=True, exist_ok=True)
    before = read_object(path)
    for key in ("device", "machine", "version", "versions", "data"):
        if before and before.get(key) != about[key]:
            raise UserError(
                f"{setting.out} holds results of {key} {before.get(key)}, and this is {about[key]}; give another OUT"
            )
    write_durably(path, (json.dumps(about, indent=1) + "\n").encode())
    return about


def went_well(setting: Setting, stage: Stage) -> bool:
    return read_object(setting.out / f"{stage.name}.json").get("outcome") == "done"


def do(stage: Stage, setting: Setting, seconds: float, about: dict[str, Any]) -> None:
    """Run a stage's commands for at most so many seconds, and write what became of it, also where this is ended."""
    started = time.monotonic()
    print(f"== {stage.name}, at most {seconds:.0f} s", flush=True)
    for name in stage.results:
        setting.raw(name).unlink(missing_ok=True)
    outcome, commands = "cut", stage.commands(setting, seconds)
    try:
        with (setting.out / f"{stage.name}.log").open("w") as log:
            statuses = [run(command, setting, log, seconds - (time.monotonic() - started)) for command in commands]
        outcome = "cut" if None in statuses else "failed" if any(statuses) else "done"
    finally:
        found = {name: result for name in stage.results if (result := read_object(setting.raw(name)))}
        words = [said(stage, found)] if found or not stage.results else []
        if outcome == "failed":
            words.append(f"{last_error(setting.out / f'{stage.name}.log')} ({stage.name}.log)")
        result = {
            "stage": stage.name,
            "outcome": outcome,
            "words": "; ".join(words) or "nothing",
            "seconds": round(time.monotonic() - started, 1),
            "limit": round(seconds, 1),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "on": about,
            "commands": [" ".join(map(str, command)).replace(str(setting.out), "OUT") for command in commands],
            "results": found,
        }
        write_durably(setting.out / f"{stage.name}.json", (json.dumps(result, indent=1) + "\n").encode())


def said(stage: Stage, found: dict[str, Any]) -> str:
    """What the table says of results, of which some may be missing or odd where a stage was cut."""
    try:
        return stage.words(found)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        return f"results that cannot be read ({type(error).__name__}: {error})"


def last_error(log: Path) -> str:
    """The last line of a log that tells of an error, or just the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line.partition(":")[0] and not line.startswith("$")]
    return (errors or lines or ["nothing was printed"])[-1][:200]


def run(command: list[Any], setting: Setting, log: Any, seconds: float) -> int | None:
    """The exit status of a command of Python, or None where it was cut after ``seconds``."""
    words = [sys.executable, *map(str, command)]
    log.write(f"$ {' '.join(words)}\n")
    log.flush()
    if seconds <= 0:
        return None
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment(setting),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM),  # also where this is killed
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also where this command was asked to end
        end(process)


def environment(setting: Setting) -> dict[str, str]:
    """Of the commands: this checkout's code, on the device that is asked for."""
    path = os.pathsep.join([str(ROOT), str(ROOT / ".package"), *filter(None, [os.environ.get("PYTHONPATH")])])
    device = "cuda" if setting.on_gpu else "cpu"
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "DS_ACCELERATOR": device}


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
        if result := read_object(setting.out / f"{stage.name}.json"):
            print(f"{stage.name:9} {result['outcome']:8} {result['seconds']:8.0f}  {result['words']}")
        else:
            print(f"{stage.name:9} {'missing':8}")
    print(flush=True)


if __name__ == "__main__":
    run_main(main)
