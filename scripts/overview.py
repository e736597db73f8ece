"""Draw a run in one picture: two views of some images, its loss, and what it finds alike. The quickstart makes one.

python scripts/overview.py runs/quickstart/run overview.svg
"""

import argparse
import base64
import io
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / ".package")]

from simclr_dali.shards.errors import run_main

_SIDE, _GAP, _TOP = 84, 6, 58  # pixels: of a picture, between two, above the first
_ROWS, _NEIGHBOURS = 3, 4
_CURVE = 250  # pixels, its width


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a run in one picture.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("out", type=Path, metavar="SVG", help="picture to write")
    given = parser.parse_args()

    from simclr_dali.shards.durable import write_durably  # here: --help is to work before anything is installed

    write_durably(given.out, overview(given.run).encode())
    print(f"picture: {given.out}")


def overview(folder: Path) -> str:
    """The picture of a run folder, as SVG that holds all it shows. Raises UserError as a report does."""
    import jinja2

    from simclr_dali.eval.report_pictures import pictures
    from simclr_dali.eval.report_probes import without_damage
    from simclr_dali.eval.report_run import read_run

    run = without_damage(read_run(folder, folder.name))
    found = pictures(run, with_map=False)
    views, curve, neighbours = 20, 3 * (_SIDE + _GAP) + 20 + 70, 3 * (_SIDE + _GAP) + _CURVE + 20 + 106
    images = [
        *_grid(found.views[:_ROWS], views, 3),
        *_grid(found.neighbours[:_ROWS], neighbours, 1 + _NEIGHBOURS),
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )  # fmt: skip
    return environment.get_template("overview.svg.j2").render(
        title="Two views of each image, the loss of the training, and nearest neighbours by what was learned",
        width=neighbours + (1 + _NEIGHBOURS) * (_SIDE + _GAP) + 14,
        height=_TOP + _ROWS * (_SIDE + _GAP) + 14,
        side=_SIDE,
        panels=[
            {"x": views, "title": "Two views of each picture", "words": "boxes on the original, then what DALI made"},
            {"x": curve - 30, "title": "The loss falls", "words": f"NT-Xent, {run.steps:,} steps without labels"},
            {
                "x": neighbours,
                "title": "What it finds alike",
                "words": "nearest embeddings; green: the same class, orange: another",
            },
        ],
        images=images,
        curve=_curve(run.metrics, run.config["train_batch_size"], curve),
        probes=_probes(run.probes, str(Path(run.config["simclr"]["data"]).resolve())),
    )


def _grid(rows: list[list[Any]], left: int, columns: int) -> list[dict[str, Any]]:
    return [
        {
            "x": left + column * (_SIDE + _GAP),
            "y": _TOP + line * (_SIDE + _GAP),
            "picture": _small(shown.picture),
            "color": shown.color,
        }
        for line, row in enumerate(rows)
        for column, shown in enumerate(row[:columns])
    ]


def _small(address: str) -> str:
    """A picture's address with a picture of the size that is shown, on twice as many pixels."""
    import PIL.Image

    from simclr_dali.eval.report_pictures import address as address_of

    with PIL.Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as picture:
        picture.thumbnail((2 * _SIDE, 2 * _SIDE))
        return address_of(picture, 70)


def _curve(metrics: Any, batch: int, left: int) -> dict[str, Any]:
    """The loss, in means of some steps each, with what chance gives."""
    import numpy as np

    parts = np.array_split(metrics["loss"], min(120, len(metrics["loss"])))
    losses = [float(part.mean()) for part in parts]
    chance = math.log(2 * batch - 1)
    top, bottom, right = _TOP + 4, _TOP + 2 * (_SIDE + _GAP) - 26, left + _CURVE
    high, low = math.ceil(2 * max(chance, *losses)) / 2, math.floor(2 * min(losses) - 1e-9) / 2

    def height(loss: float) -> float:
        return round(bottom - (bottom - top) * (loss - low) / (high - low), 1)

    across = np.linspace(left, right, len(losses)).round(1).tolist()
    return {
        "left": left,
        "right": right,
        "bottom": bottom,
        "levels": [(height(level), f"{level:g}") for level in _ticks(low, high)],
        "chance": height(chance),
        "chance_words": f"{chance:.2f}",
        "points": " ".join(f"{x},{height(loss)}" for x, loss in zip(across, losses, strict=True)),
        "last": f"step {int(metrics['step'][-1]):,}",
    }


def _ticks(low: float, high: float) -> list[float]:
    """At most six round numbers in a range."""
    step = next((step for step in (0.5, 1, 2, 5, 10, 50) if (high - low) / step <= 5), (high - low) / 5)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _probes(probes: list[dict[str, Any]], data: str) -> list[str]:
    """What the newest probes of the fast protocol on the run's own data say, of the trained encoder first."""
    own = {one["file"]: one for one in probes if str(one.get("data", "")).rstrip("/") == data.rstrip("/")}
    lines, classes = [], 0
    for file, what in (("linear.json", "linear probe on val"), ("linear-untrained.json", "untrained encoder")):
        if file in own:
            low, high = own[file]["top1_interval_95"]
            lines.append(f"{what}: {own[file]['top1']:.1f} % ({low:.1f} .. {high:.1f})")
            classes = own[file]["classes"]
    return [*lines, *([f"chance: {100 / classes:.1f} %"] if classes else [])]


if __name__ == "__main__":
    run_main(main)
