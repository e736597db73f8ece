"""A pytest plugin that writes how many tests passed, failed and were skipped after each of them.

A run that is cut has counted what it did. With --outcomes FILE; what FILE says already is added to.
"""

import json
from pathlib import Path
from typing import Any

from simclr_dali.shards.durable import write_durably

OUTCOMES = ("passed", "failed", "skipped")


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--outcomes", type=Path, help="where to count")


def pytest_configure(config: Any) -> None:
    if config.option.outcomes and not hasattr(config, "workerinput"):  # workers report to the process that counts
        config.pluginmanager.register(_Counter(config.option.outcomes))


class _Counter:
    def __init__(self, path: Path) -> None:
        self._path = path
        before = json.loads(path.read_text()) if path.exists() else {}
        self._counts = {name: before.get(name, 0) for name in OUTCOMES}

    def pytest_runtest_logreport(self, report: Any) -> None:
        # A test is over with its call, or before it where its setup fails or skips; a teardown can only fail.
        if report.when == "call" or report.outcome != "passed":
            self._counts[report.outcome] += 1
            write_durably(self._path, (json.dumps(self._counts) + "\n").encode())
