"""The figures in the texts, from the results: README.md and rivals.md here, and blocks of the README of the project.

    python scripts/bench/render.py             # write them anew
    python scripts/bench/render.py --check     # exit with 1 where a text says something else than its results

A text is a Jinja template beside this script (``*.j2``); what it can name is in ``names`` below. In the README of the
project the block between ``<!-- figures -->`` and ``<!-- end of figures -->`` has a template of its own, and so has the
one between ``<!-- GPU -->`` and ``<!-- end of GPU -->``.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import jinja2

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from scripts.bench.figures import extremes, in_words
from scripts.gpu_stages import WORDS

RESULTS = FOLDER / "results"
BLOCKS = {"figures": "five_figures.md.j2", "GPU": "on_a_gpu.md.j2"}
Spread = dict[str, float]


def number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"


def spread(value: Spread, digits: int = 0, unit: str = "") -> str:
    return in_words(value, digits, unit)


def largest(step: dict[str, Any]) -> str:
    """Of a step on paper, the largest part that is not compute, with its share."""
    parts = {name: ms for name, ms in step["ms"].items() if name != "compute"}
    name = max(parts, key=lambda part: parts[part])
    return f"{name} {parts[name] / sum(step['ms'].values()):.0%}"


def seconds(milliseconds: Spread, digits: int, unit: str) -> str:
    return spread({name: value / 1e3 for name, value in milliseconds.items()}, digits, unit)


def inverse(value: Spread, digits: int = 2) -> str:
    """Of a ratio: the other one by this."""
    return spread({"median": 1 / value["median"], "min": 1 / value["max"], "max": 1 / value["min"]}, digits)


def of_list(values: list[float], digits: int = 2) -> str:
    return spread(extremes(values), digits)


def megabytes(rows: dict[str, Any], *names: str) -> str:
    return ", ".join(number(rows[name]["megabytes"]["median"]) for name in names) + " MB"


def times(rows: dict[str, Any], row: str) -> str:
    """How many times as fast as the first row."""
    base, own = (rows[name]["synthetic"]["step"]["median"] for name in (next(iter(rows)), row))
    return number(base / own, 2)


def of_variant(row: dict[str, float]) -> str:
    time = spread({"median": row["ms"], "min": row["min"], "max": row["max"]}, 1)
    return f"{time} | {number(row['pairs/s'])} | {number(row['peak GB'], 1)} GB"


def of_order(row: dict[str, float]) -> str:
    pairs = number(row["pairs"], 1 if row["pairs"] < 10 else 0)
    return f"{number(row['shards'])} | {pairs} | {number(row['classes'])} | {row['correlation']:.2f} |"


def of_machine(name: str, found: dict[str, Any]) -> str:
    """Processor or GPU, and how many cores, where the result says so."""
    machine = found.get("machine") or (found.get("device") if "h200" in name else None)
    return f"{machine}, {found['cores']} cores" if machine else "no figure of time"


def names() -> dict[str, Any]:
    """What templates can name."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    # What ran of the check: STAGE.json, copied from the folder of its results.
    checked = {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / "gpu-check").glob("*.json"))}
    if tried := [stage for stage, found in checked.items() if found["on"]["device"] != "gpu"]:
        raise ValueError(f"results/gpu-check/{tried[0]}.json was made on a CPU; only results of a GPU belong there")
    helpers = (largest, number, spread, seconds, inverse, of_list, megabytes, times, of_variant, of_order, of_machine)
    return {
        "r": results,
        "loader": results["loader-cpu"],
        "stored": results["loader-stored-cpu"],
        "loss": results["loss-cpu"]["pairs"],
        "compiled": results["step-compile-cpu"]["rows"],
        "h200": results["step-variants-h200"],
        "probe": results["probe-cpu"],
        "orders": results["shuffle"]["orders"],
        "on_paper": json.loads((RESULTS / "on-paper" / "scaling.json").read_text()),
        "stages": WORDS,
        "checked": checked,
        "middle": statistics.median,
        **{helper.__name__: helper for helper in helpers},
    }


def rendered() -> dict[Path, str]:
    """Each text as it is to be."""
    loader = jinja2.FileSystemLoader(FOLDER)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    known = names()
    texts = {FOLDER / name: environment.get_template(f"{name}.j2").render(known) for name in ("README.md", "rivals.md")}
    readme = (ROOT / "README.md").read_text()
    for mark, template in BLOCKS.items():
        before, begin, rest = readme.partition(f"<!-- {mark} -->\n")
        _, end, after = rest.partition(f"<!-- end of {mark} -->\n")
        if not (begin and end):
            raise ValueError(f"README.md has no block between <!-- {mark} --> and <!-- end of {mark} -->")
        readme = before + begin + environment.get_template(template).render(known) + end + after
    return {**texts, ROOT / "README.md": readme}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; tell which texts differ")
    check = parser.parse_args().check
    different = {path: text for path, text in rendered().items() if not path.exists() or path.read_text() != text}
    for path, text in different.items():
        if check:
            print(f"{path.relative_to(ROOT)} differs from its results; run: python scripts/bench/render.py")
        else:
            path.write_text(text)
            print(f"written: {path.relative_to(ROOT)}")
    sys.exit(1 if check and different else 0)


if __name__ == "__main__":
    main()
