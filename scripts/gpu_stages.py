"""The stages of scripts/gpu_check.py: what each runs, and what a table says of its results."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# What each stage does, for --help and for the list of what ran on a GPU.
WORDS = {
    "smoke": "a training that is stopped and goes on, and a probe",
    "tests": "the tests for a GPU",
    "step": "the time of a step: compiled, not compiled, deterministic, with real input",
    "loader": "the input path, with the JPEG engine and with decoded pictures kept",
    "memory": "memory of uncompiled steps by images and over 300 of them, and of the loss up to 131,072 images",
    "quality": "linear probe and kNN after a training",
    "rivals": "whole training steps against others'",
}
IMAGENET_SIZE, SMALL_SIZE = (500, 375), (96, 96)
# What a GPU decides, each 5 to 10 s; scripts/bench/loader.py has more.
LOADER_ROWS = ("engine share 0", "engine share 0.65", "engine share 0.85", "kept", "decode whole", "solo-learn")


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
        drawn = f"draw({str(setting.images)!r}, {train}, {val}, {size})"
        commands.append(["-c", f"from scripts.gpu_stages import draw; {drawn}"])
    pack = ["-m", "simclr_dali", "pack", setting.images]
    commands.append([*pack, setting.shards, "--samples-per-shard", 100])
    commands.append([*pack, setting.small, "--samples-per-shard", 100, "--resize", 144])
    return commands


def draw(out: str, train: int, val: int, size: tuple[int, int]) -> None:
    """Pictures on all cores, in a folder that has its name when all are there; nothing where it is there already."""
    import numpy as np

    from scripts.draw_pictures import CLASSES, draw_class

    if Path(out).exists():
        return
    partial = Path(f"{out}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with ProcessPoolExecutor() as pool:
        drawn = [
            pool.submit(draw_class, partial / split / name, count, np.random.default_rng([seed, number]), size)
            for seed, (split, count) in enumerate((("train", train), ("val", val)))
            for number, name in enumerate(CLASSES)
        ]
        for one in drawn:
            one.result()
    partial.rename(out)


def smoke(setting: Setting, _: float) -> Commands:
    run = setting.out / "smoke-run"
    small = sets("simclr.compile=no", "train_batch_size=32", "optimizer.params.lr=auto", "simclr.epochs=2")
    train = ["train/pretrain.py", "--config", "quickstart.json", "--data", setting.small, "--run", run, *small]
    stopped = [*train, "--stop-after-steps", 1]
    new = ["-c", f"import shutil; shutil.rmtree({str(run)!r}, ignore_errors=True)"]
    return [new, stopped, train, ["eval/linear.py", "--ckpt", run, "--out", setting.out / "raw"]]


def tests(setting: Setting, _: float) -> Commands:
    files = ["tests/test_gpu.py", *(["tests/test_kernels.py"] if setting.on_gpu else [])]
    pytest: list[Any] = ["-m", "pytest", "-q", *files, "-p", "no:cacheprovider", "-p", "scripts.test_outcomes"]
    pytest += ["--outcomes", setting.raw("tests")]
    if not setting.on_gpu:
        return [[*pytest, "-n", 0]]
    # Those that start no training first: a cut stage then has most of them.
    quick, slow = (["-m", marked, "-n", min(6, os.cpu_count() or 1)] for marked in ("not launch", "launch"))
    return [[*pytest, *quick], [*pytest, *slow]]


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
        return [[*bench, "--batch", 256, "--seconds", 2, "--only", *LOADER_ROWS]]
    return [[*bench, "--batch", 16, "--seconds", 0.5, "--only", "kept", "solo-learn"]]


def memory(setting: Setting, _: float) -> Commands:
    bench = ["scripts/bench/memory.py", *sets("simclr.compile=no")]
    loss = ["scripts/bench/loss.py", *setting.device, "--rounds", 1, "--seconds", 0, "--json", setting.raw("loss")]
    if setting.on_gpu:
        config = ["--config", "ds_sqrt_b256.json"]
        return [
            [*bench, *config, "--batches", 64, "--steps", 300, "--json", setting.raw("plateau")],
            [*loss, "--pairs", 16384, 131072],
            [*bench, *config, "--batches", 128, 256, "--steps", 20, "--json", setting.raw("memory")],
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
        # Drawn pictures are few: batches of 64 make steps enough.
        few = sets("train_batch_size=64", "optimizer.params.lr=auto") if setting.given is None else []
        return [[*bench, "--config", "imagenette_128.json", *few]]
    small = sets("train_batch_size=32", "optimizer.params.lr=auto", "simclr.image_size=32")
    return [[*bench, "--config", "quickstart.json", "--most-epochs", 2, *small]]


def against_rivals(setting: Setting, _: float) -> Commands:
    bench = ["scripts/bench/trainers.py", setting.images, *setting.device, "--json", setting.raw("rivals")]
    if setting.on_gpu:
        return [[*bench, "--image-size", 128, "--batch", 256, "--seconds", 2, "--rounds", 2]]
    small = ["--width", 0.25, "--image-size", 32, "--batch", 8, "--seconds", 0.2]
    return [[*bench, *small, "--rounds", 1, "--only", "solo-learn"]]


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
        rates, ratios = found[name]["images_per_s"], found[name]["ratios"]
        against = {row: f" (ours {ratio['median']:.2f} x)" for row, ratio in ratios.items()}
        failed = [f"{row} failed" for row in found[name].get("failed", {})]
        measured = [f"{row} {rate['median']:,.0f}/s{against.get(row, '')}" for row, rate in rates.items()]
        return ", ".join(measured + failed)

    return words


def of_memory(found: dict[str, Any]) -> str:
    batches, long = (found.get(name, {}).get("batches", {}) for name in ("memory", "plateau"))
    words = [f"batch {batch}: {row['peak'] / 1e9:.2f} GB" for batch, row in {**long, **batches}.items()]
    for row in long.values():
        words.append(f"over the steps {row['held'][0] / 1e9:.2f} to {row['held'][-1] / 1e9:.2f} GB")
    for pairs, rows in found.get("loss", {}).get("pairs", {}).items():
        ours = rows["ours"]
        words.append(f"loss of {int(pairs):,} images {in_words_of(ours)}")
    return ", ".join(words)


def in_words_of(row: Any) -> str:
    """Milliseconds of a row of scripts/bench/loss.py, or why it has none."""
    return f"{row['ms']['median']:,.0f} ms" if isinstance(row, dict) else str(row)


def of_tests(found: dict[str, Any]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in found["tests"].items())


def of_quality(found: dict[str, Any]) -> str:
    result = found["quality"]
    neighbours = ", ".join(f"kNN {k} {top1:.1f} %" for k, top1 in result["knn"].items())
    return f"{result['epochs']} epochs, linear {result['linear']:.1f} %, {neighbours}"


STAGES = (
    Stage("smoke", 60, smoke, ("linear",), lambda found: f"linear {found['linear']['top1']:.1f} %"),
    Stage("tests", 120, tests, ("tests",), of_tests),
    Stage("step", 150, step, ("step-real", "step-rows"), of_step),
    Stage("loader", 90, loader, ("loader",), of_rates("loader")),
    Stage("memory", 60, memory, ("memory", "plateau", "loss"), of_memory),
    Stage("quality", 90, quality, ("quality",), of_quality),
    Stage("rivals", 90, against_rivals, ("rivals",), of_rates("rivals")),
)
PREPARE = Stage("prepare", 0, prepare, (), lambda _: "pictures and shards")
