"""The console command ``simclr-dali``: one name for what the repository's scripts do."""

import argparse
import difflib
import os
import runpy
import sys
from pathlib import Path

import simclr_dali

# Command -> the module that does it, and what it does in a line.
COMMANDS = {
    "pack": ("shards.pack", "pack pictures into WebDataset shards"),
    "verify": ("shards.verify", "check packed shards against their own description"),
    "show": ("shards.show", "say what is in packed shards; a sheet of their pictures"),
    "views": ("pipeline.views", "show samples and their two augmented views"),
    "pretrain": ("train.pretrain", "pre-train an encoder, on every GPU of this machine or as many as --num_gpus says"),
    "doctor": ("train.doctor", "check a machine, or all of a cluster, before a training is started"),
    "linear": ("eval.linear", "linear probe of a frozen encoder"),
    "knn": ("eval.knn", "k nearest neighbours on frozen features"),
    "finetune": ("eval.finetune", "fine-tune on some or all of the labels"),
    "predict": ("eval.predict", "classify pictures with a trained classifier"),
    "extract": ("eval.extract", "write the features of pictures"),
    "nearest": ("eval.nearest", "find the most similar pictures of a packed set"),
    "report": ("eval.report", "write a page on a run, or on several: curves, probes, settings"),
    "export": ("eval.export", "write an encoder or classifier for other programs"),
}
_LAUNCHER = "deepspeed.launcher.runner"
_LAUNCHER_OPTIONS = (
    "--num_gpus", "--num_nodes", "--master_port", "--master_addr", "--hostfile", "--include", "--exclude",
)  # fmt: skip


def usage() -> str:
    lines = [f"  {name:9} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(["usage: simclr-dali COMMAND ... (each has --help)", "", *lines, "", "  --version"])


def main() -> None:
    """Run one of COMMANDS with the rest of the command line."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name == "--version":
        print(f"simclr-dali {simclr_dali.__version__}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        print(f"error: {name!r} is no command of simclr-dali; {hint}", file=sys.stderr)
        sys.exit(2)
    asks_for_help = any(word == "-h" or word.startswith("--help") for word in words)
    if name == "pretrain" and is_alone() and not asks_for_help:
        words = launch(words)
    simclr_dali.command = name
    sys.argv[1:] = words
    runpy.run_module(f"simclr_dali.{COMMANDS[name][0]}", run_name="__main__", alter_sys=True)


def is_alone() -> bool:
    """Whether no launcher started this process; what one said wrongly is told by the command itself."""
    from simclr_dali.shards.launch import LaunchError, read_launch  # here, so that --help is there at once

    try:
        return not read_launch().launcher
    except LaunchError:
        return False


def launch(words: list[str]) -> list[str]:
    """Become DeepSpeed's launcher of train/pretrain.py; its own options are taken out of ``words``.

    Where one process is enough it is this one, which starts in half the time; the words that are left are returned.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in _LAUNCHER_OPTIONS:
        parser.add_argument(option)
    ours, rest = parser.parse_known_args(words)
    if ours.num_gpus is not None and not (ours.num_gpus.isdecimal() and int(ours.num_gpus)):
        print(f"error: --num_gpus is {ours.num_gpus!r}; give the number of processes, at least 1", file=sys.stderr)
        sys.exit(2)
    given = {key: value for key, value in vars(ours).items() if value is not None}
    one = given.get("num_gpus", str(max(1, visible_gpus()))) == "1"
    if one and given.keys() <= {"num_gpus"} and not Path("/job/hostfile").exists():  # which the launcher would read
        return rest
    options = [word for key, value in given.items() for word in (f"--{key}", value)]
    script = Path(__file__).resolve().parents[1] / "simclr_dali/train/pretrain.py"
    return os.execv(sys.executable, [sys.executable, "-m", _LAUNCHER, "--quiet", *options, str(script), *rest])


def visible_gpus() -> int:
    """GPUs that a process of this machine may use, without asking torch, whose import takes a second."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([name for name in chosen.split(",") if name.strip()])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


if __name__ == "__main__":
    main()
