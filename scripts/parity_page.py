"""The parity report as one HTML file, with pictures and histograms inside."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch

from simclr_dali.pipeline.draws import Draws

_SHOWN = 3  # views per stage: the best, the middle and the worst
_AMPLIFIED = 8  # of the difference, or nothing would be seen
_EDGES = [0, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 256]  # levels
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .25em .9em; text-align: right; border-bottom: 1px solid #ccc }
td:first-child, th:first-child { text-align: left } .bad { background: #fbb } pre { white-space: pre-wrap }
img { width: 168px; margin: 2px } .bar { fill: #47a } figure { display: inline-block; margin: .5em 1em 0 0 }
figcaption { color: #555; font-size: 13px }
"""


Pixels = npt.NDArray[np.float64]
Step = Callable[[torch.Tensor, Draws, int], torch.Tensor]


@dataclass(frozen=True)
class Stage:
    """One comparison."""

    name: str
    change: Callable[[Draws], Draws]
    """The draws with all but this stage neutral."""
    steps: Callable[[Draws, int], list[Step]]
    """Of the reference, in order."""
    limit: float | None
    """The largest mean difference that is accepted, None where it is only stated."""
    keep: Callable[[Pixels, Draws, int], bool] = lambda crop, draws, row: True
    """Which views count."""


@dataclass(frozen=True)
class Result:
    """Both sides of a comparison, float64 (views, size, size, 3) in levels, and how far they are apart."""

    stage: Stage
    mean: float
    worst: float
    ours: Pixels
    theirs: Pixels

    @property
    def within(self) -> bool:
        return self.stage.limit is None or self.mean <= self.stage.limit


def page(about: str, results: Sequence[Result]) -> str:
    """The whole report."""
    rows = "".join(_row(result) for result in results)
    sections = "".join(_section(result) for result in results)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Parity with torchvision</title>'
        f"<style>{_STYLE}</style><h1>Parity with torchvision</h1><pre>{html.escape(about.strip())}</pre>"
        f"<table><tr><th>stage<th>views<th>mean<th>99 %<th>worst<th>limit of the mean</tr>"
        f"{rows}</table>{sections}</html>"
    )


def _row(result: Result) -> str:
    limit = "stated only" if result.stage.limit is None else f"{result.stage.limit:g}"
    most = np.percentile(np.abs(result.ours - result.theirs), 99)
    return (
        f"<tr{'' if result.within else ' class=bad'}><td>{html.escape(result.stage.name)}<td>{len(result.ours)}"
        f"<td>{result.mean:.3f}<td>{most:.2f}<td>{result.worst:.1f}<td>{limit}</tr>"
    )


def _section(result: Result) -> str:
    difference = np.abs(result.ours - result.theirs)
    by_mean = difference.mean(axis=(1, 2, 3)).argsort()
    places = np.unique(np.linspace(0, len(by_mean) - 1, _SHOWN).astype(int))
    figures = "".join(
        f"<figure>{_image(result.ours[i])}{_image(result.theirs[i])}{_image(_AMPLIFIED * difference[i])}"
        f"<figcaption>ours, torchvision, difference x {_AMPLIFIED}; "
        f"mean {difference[i].mean():.2f}</figcaption></figure>"
        for i in by_mean[places]
    )
    return f"<h2>{html.escape(result.stage.name)}</h2>{_histogram(difference)}{figures}"


def _histogram(difference: npt.NDArray[Any]) -> str:
    """Share of the values by their difference, on steps that double."""
    shares = np.histogram(difference, _EDGES)[0] / difference.size
    bars = "".join(
        f'<text x="0" y="{16 * i + 12}" font-size="12">{low:g} .. {high:g}</text>'
        f'<rect class="bar" x="80" y="{16 * i + 2}" width="{400 * share:.1f}" height="12"/>'
        f'<text x="{86 + 400 * share:.1f}" y="{16 * i + 12}" font-size="12">{share:.2%}</text>'
        for i, (low, high, share) in enumerate(zip(_EDGES, _EDGES[1:], shares, strict=False))
    )
    return (
        f'<svg width="560" height="{16 * len(shares) + 4}" role="img"><title>difference in levels</title>{bars}</svg>'
    )


def _image(levels: npt.NDArray[np.float64]) -> str:
    buffer = io.BytesIO()
    PIL.Image.fromarray(levels.clip(0, 255).round().astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
