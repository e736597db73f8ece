"""How the benchmarks summarise what they measured over the rounds, and say on what."""

import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from simclr_dali.shards.errors import UserError


def extremes(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(values: list[float], digits: int) -> str:
    return in_words(extremes(values), digits)


def in_words(found: dict[str, float], digits: int, unit: str = "") -> str:
    """What :func:`extremes` gives: the median, with its unit, and the extremes."""
    middle, low, high = (f"{found[name]:,.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle}{f' {unit}' if unit else ''} ({low} .. {high})"


class Table:
    """Images/s by row, of rounds that are measured row by row, and what failed."""

    def __init__(self, rows: Iterable[str]) -> None:
        self._rounds: dict[str, list[float | None]] = {row: [] for row in rows}
        self._failed: dict[str, str] = {}

    def add(self, row: str, found: float | Exception) -> None:
        """A rate, or why there is none."""
        if isinstance(found, Exception):
            print(f"{row} failed: {found}", file=sys.stderr)
            self._failed[row] = str(found)[-500:]
        self._rounds[row].append(None if isinstance(found, Exception) else found)

    def _ratios(self, row: str) -> list[float]:
        """How many times as fast the row "ours" is, of the rounds that both have."""
        pairs = zip(self._rounds["ours"], self._rounds[row], strict=False)
        return [own / rate for own, rate in pairs if own and rate]

    def _rates(self) -> dict[str, list[float]]:
        found = {row: [rate for rate in rounds if rate] for row, rounds in self._rounds.items()}
        return {row: rates for row, rates in found.items() if rates}

    def result(self) -> dict[str, Any]:
        """For a file."""
        rates = self._rates()
        ratios = {row: self._ratios(row) for row in rates if row != "ours"}
        found: dict[str, Any] = {"ratios": {row: extremes(ratio) for row, ratio in ratios.items() if ratio}}
        found["images_per_s"] = {row: extremes(rate) for row, rate in rates.items()}
        return {**found, **({"failed": self._failed} if self._failed else {})}

    def print(self) -> None:
        """Raises UserError where a row failed, after the others were printed."""
        print(f"{'':28} {'images/s':>26} {'ours is faster by':>22}")
        for row, rates in self._rates().items():
            ratios = [] if row == "ours" else self._ratios(row)
            print(f"{row:28} {spread(rates, 1):>26} {spread(ratios, 2) if ratios else '':>22}", flush=True)
        if self._failed:
            raise UserError(f"{'; '.join(self._failed)} could not be measured, as said above")


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
