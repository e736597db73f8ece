"""How the benchmarks summarise what they measured over the rounds, and say on what."""

import datetime
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def extremes(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(values: list[float], digits: int) -> str:
    return in_words(extremes(values), digits)


def in_words(found: dict[str, float], digits: int, unit: str = "") -> str:
    """What :func:`extremes` gives: the median, with its unit, and the extremes."""
    middle, low, high = (f"{found[name]:,.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle}{f' {unit}' if unit else ''} ({low} .. {high})"


def against_ours(measured: dict[str, list[float]]) -> dict[str, Any]:
    """Rates of each row that has some, and how many times as fast the row "ours" is, by the rounds that both have."""
    rated = {row: rates for row, rates in measured.items() if rates}
    ratios = {
        row: extremes([own / rate for own, rate in zip(measured["ours"], rates, strict=False)])
        for row, rates in rated.items()
        if row != "ours"
    }
    return {"ratios": ratios, "images_per_s": {row: extremes(rates) for row, rates in rated.items()}}


def print_against_ours(measured: dict[str, list[float]]) -> None:
    """The same as a table."""
    print(f"{'':28} {'images/s':>26} {'ours is faster by':>22}")
    for row, rates in measured.items():
        against = [own / rate for own, rate in zip(measured["ours"], rates, strict=True)]
        print(f"{row:28} {spread(rates, 1):>26} {'' if row == 'ours' else spread(against, 2):>22}", flush=True)


def machine(device: str, packages: Iterable[str]) -> dict[str, Any]:
    """Name of the processor or GPU, cores, versions of ``packages``, and the day; device: cpu or gpu."""
    import torch  # seconds, which whoever only wants words need not wait for

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": device,
        "machine": torch.cuda.get_device_name() if device == "gpu" else _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {package: _version(package) for package in packages},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
