"""The commands as functions: paths and a config in, numbers out.

    from simclr_dali import pack, pretrain, probe

    packed = pack("pictures")
    trained = pretrain("imagenette.json", data=packed.folder, run="runs/mine", settings={"simclr.epochs": 20})
    print(probe(trained.run).top1)

Each is its command in a process of its own, so that a training may end, hang or take all GPUs without this process.
They print nothing unless ``verbose``. What a command refuses is raised as UserError, with its sentence.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simclr_dali.shards.errors import UserError
from simclr_dali.shards.launch import alone
from simclr_dali.shards.manifest import MANIFEST, unseal

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Packed:
    """A packed data set."""

    folder: Path
    images: dict[str, int]
    """By split."""
    classes: tuple[str, ...]
    """Their names; none where there are no labels."""


@dataclass(frozen=True)
class Trained:
    """A run, as far as it came."""

    run: Path
    finished: bool
    steps: int
    """That are done."""
    metrics: dict[str, float]
    """Of the last step, by the names of metrics.jsonl."""
    images_per_s: float
    """Of the last steps; each image gives two views."""


@dataclass(frozen=True)
class Probed:
    """A result of a linear probe."""

    top1: float
    """Percent of the images of val."""
    top1_interval: tuple[float, float]
    """95 % interval, in percent."""
    top5: float | None
    """None where there are fewer than five classes."""
    protocol: str
    images: int
    per_class: dict[str, float]
    """Percent, by name."""
    result: dict[str, Any]
    """The whole linear*.json."""


def pack(source: PathLike, out: PathLike | None = None, *, verbose: bool = False, **options: Any) -> Packed:
    """Pack pictures into shards; ``simclr-dali pack --help`` names the options, as in ``resize=256``.

    out: the folder to create, by default ``source`` with "-shards" behind its name. A set that is there already is
    left as it is. Raises UserError for what packing refuses.
    """
    folder = Path(out) if out is not None else Path(f"{os.path.normpath(source)}-shards")
    _command(["pack", source, folder, *_options(options)], verbose)
    manifests = {path.parent.name: unseal(path.read_bytes()) for path in sorted(folder.glob(f"*/{MANIFEST}"))}
    names: list[str] = next((manifest["classes"] for manifest in manifests.values() if manifest["classes"]), [])
    return Packed(folder, {split: manifest["samples"] for split, manifest in manifests.items()}, tuple(names))


def pretrain(
    config: PathLike | Mapping[str, Any],
    *,
    data: PathLike | None = None,
    run: PathLike,
    settings: Mapping[str, Any] | None = None,
    stop_after_steps: int | None = None,
    verbose: bool = False,
) -> Trained:
    """Train, or go on, until the run is finished (or for so many steps), on every GPU of this machine or on the CPU.

    config: a file, the name of a preset, or its content (``base`` may name a preset). settings: what overrides it, by
    key, as in ``{"simclr.epochs": 20}``. Raises UserError for what a training refuses.
    """
    words = [*_options({"data": data, "run": run, "stop_after_steps": stop_after_steps})]
    for key, value in (settings or {}).items():
        words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    with _as_file(config) as path:
        _command(["pretrain", "--config", path, *words], verbose)
    folder = Path(run)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    speed = json.loads((folder / "speed.jsonl").read_text().splitlines()[-1])
    return Trained(
        folder,
        (folder / "finished.json").is_file(),
        int(last["step"]) + 1,
        {name: float(value) for name, value in last.items()},
        float(speed["images_per_s"]),
    )


def probe(
    run: PathLike,
    *,
    data: PathLike | None = None,
    protocol: str = "fast",
    untrained: bool = False,
    out: PathLike | None = None,
    verbose: bool = False,
    **options: Any,
) -> Probed:
    """Probe the encoder of a run, or of any file of weights, by ``simclr-dali linear``.

    data: shards with labels and a val split, by default those of the run. untrained: with the weights that the run
    began with. Result and classifier are written into the run folder (beside a file, and to runs/NAME for published
    weights), or into the folder ``out``. Raises UserError for what the probe refuses.
    """
    words = _options({"ckpt": run, "data": data, "protocol": protocol, "untrained": untrained, "out": out, **options})
    _command(["linear", *words], verbose)
    found = json.loads(_newest_result(Path(run), None if out is None else Path(out)).read_text())
    low, high = found["top1_interval_95"]
    return Probed(
        found["top1"], (low, high), found.get("top5"), found["protocol"], found["val_images"], found["per_class"], found
    )


def _newest_result(run: Path, out: Path | None) -> Path:
    """The result that a probe of ``run`` has just written, to ``out`` or where eval.evaluation.result_folder says."""
    folders = [out] if out else [run, *run.absolute().parents[:3], Path("runs") / run.name]
    return max(
        (path for folder in folders for path in folder.glob("linear*.json")), key=lambda path: path.stat().st_mtime_ns
    )


def _options(options: Mapping[str, Any]) -> list[str]:
    """Options of a command line, from those of a function."""
    words = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", os.fspath(value) if isinstance(value, os.PathLike) else str(value)]
    return words


@contextmanager
def _as_file(config: PathLike | Mapping[str, Any]) -> Iterator[str]:
    """The name of a config, which is written into a file where its content is given."""
    if not isinstance(config, Mapping):
        yield os.fspath(config)
        return
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.json"
        path.write_text(json.dumps(config))
        yield str(path)


def _command(words: list[Any], verbose: bool) -> None:
    """Run a command of simclr-dali. Raises UserError with its sentence where it refuses, else RuntimeError."""
    package = str(Path(__file__).resolve().parents[1])
    environment = {**alone(), "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(
        [sys.executable, "-m", "simclr_dali", *(os.fspath(word) for word in words)],
        env=environment,
        stdout=None if verbose else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if verbose and done.stderr:
        print(done.stderr, end="", file=sys.stderr)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        # Ours, or argparse's behind the name of the command.
        told = (line.partition("error: ") for line in reversed(lines) if re.match(r"(simclr-dali \w+: )?error: ", line))
        sentence = next((sentence for _, _, sentence in told), None)
        if sentence:
            raise UserError(sentence)
        raise RuntimeError(f"simclr-dali {words[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
