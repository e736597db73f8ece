"""What files of older versions say, in the words of this one: the one place that knows of renamed and removed fields.

Fields that were added need nothing here: they have a default, and what reads a file fills it in. A file is changed only
in memory, and reads the same in this version and in those that wrote it.
"""

from copy import deepcopy
from typing import Any

# Removed in 0.2: keys of a config, by their path, and why a config that still has them is refused.
REMOVED = {
    "simclr.ring": "embeddings are always gathered: of a batch of 131,072 images they take 134 MB",
}


def block_of(config: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The block of ``config`` that holds the key at ``path`` (empty where there is none), and the key's own name."""
    *blocks, last = path.split(".")
    block: Any = config
    for name in blocks:
        block = block.get(name, {}) if isinstance(block, dict) else {}
    return (block if isinstance(block, dict) else {}), last


def config(old: dict[str, Any]) -> dict[str, Any]:
    """The config that a checkpoint holds."""
    new = deepcopy(old)
    for path in REMOVED:
        block, last = block_of(new, path)
        block.pop(last, None)
    simclr = new.get("simclr")
    if isinstance(simclr, dict) and simclr.get("compile") in ("eager", "aot_eager"):  # backends that compile nothing
        simclr["compile"] = "no"
    return new


def conventions(old: dict[str, Any]) -> dict[str, Any]:
    """A classifier's file, an export's metadata, or what a training that was stopped is told by."""
    new = dict(old)
    if "habits" in new:  # until 0.1
        new.setdefault("conventions", new.pop("habits"))
    return new


def checkpoint_description(old: dict[str, Any]) -> dict[str, Any]:
    """``checkpoint.json``."""
    new = dict(old)
    if "for_good" in new:  # until 0.1
        new.setdefault("keep_forever", new.pop("for_good"))
    return new
