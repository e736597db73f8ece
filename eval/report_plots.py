"""The curves of a report: Bokeh figures, each with a title, axes with units, and a sentence on what to look for."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from bokeh.models.annotations import Legend, Span
from bokeh.models.sources import ColumnDataSource
from bokeh.models.tools import HoverTool
from bokeh.plotting import figure

from simclr_dali.eval.report_run import Curve, Run

# On white and on black paper alike.
_INK = "#808080"
# Okabe and Ito's colors, which color-blind people tell apart, but for those that are too light on white paper.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


class Plot(NamedTuple):
    """A figure of a report."""

    title: str
    look_for: str
    figure: Any


def colors(runs: list[Run]) -> list[str]:
    """A color for each run."""
    return [_COLORS[number % len(_COLORS)] for number in range(len(runs))]


class _Curves(NamedTuple):
    """What a figure of curves over steps shows."""

    title: str
    look_for: str
    part: str
    """Field of Run."""
    names: tuple[str, ...]
    """Of the part; the second one is dashed."""
    axis: str
    scale: float = 1.0
    chance: Callable[[int], float] | None = None
    """Of the global batch; a dotted line."""
    log: bool = False
    points: bool = False
    """Whether each value has a dot."""


_CURVES = (
    _Curves(
        "Loss",
        "It falls fast at first and slowly for long. A loss that stays at chance (dotted) has learned nothing; one "
        "that jumps up and stays there asks for a lower learning rate.",
        "metrics",
        ("loss",),
        "NT-Xent, nats",
        chance=lambda batch: math.log(2 * batch - 1),
    ),
    _Curves(
        "Telling images apart",
        "How often the other view of an image is the most similar one of the batch. It rises towards 100 %; near "
        "chance (dotted) the views are not told apart.",
        "metrics",
        ("top1",),
        "contrastive top-1, %",
        scale=100.0,
        chance=lambda batch: 100 / (2 * batch - 1),
    ),
    _Curves(
        "Similarity",
        "Cosine of the two views of an image (solid) and of the most similar view of another image (dashed). The gap "
        "between them is what is learned; both at 1 is a collapse.",
        "metrics",
        ("positive", "hardest_negative"),
        "cosine",
    ),
    _Curves(
        "Nearest neighbours while training",
        "Share of images of train that their nearest neighbours classify rightly. It tells whether features become "
        "useful, for runs of the same data and settings.",
        "knn",
        ("top1",),
        "kNN top-1 on a part of train, %",
        points=True,
    ),
    _Curves("Learning rate", "A linear warm-up, then a cosine to 0.", "metrics", ("lr",), "learning rate"),
    _Curves(
        "Size of the gradient",
        "Of all parameters together. It is noisy; steep rises before the loss jumps tell of too high a rate.",
        "metrics",
        ("gradient_norm",),
        "norm",
        log=True,
    ),
    _Curves(
        "Speed",
        "Images a second, each of which gives two views. Dips are checkpoints, kNN checks or other work beside it.",
        "speed",
        ("images_per_s",),
        "images/s",
    ),
    _Curves(
        "Waiting for data",
        "Share of the time in which the training waited for its input. Above 5 % the input is too slow.",
        "speed",
        ("wait_share",),
        "share of time, %",
        scale=100.0,
    ),
)


def plots(runs: list[Run]) -> Iterator[Plot]:
    """The curves of all runs, laid over each other; those that no run has are left out."""
    for one in _CURVES:
        if (made := _lines(runs, one)) is not None:
            yield Plot(one.title, one.look_for, made)
    if (made := _times(runs)) is not None:
        yield Plot(
            "Where the time of a step goes",
            "Milliseconds by part, on rank 0, by the clock of the GPU where there is one. Input is time without views; "
            "other lies between steps, as reports and checkpoints do. With several passes, forward is the first, and "
            "backward holds the second.",
            made,
        )
    if (made := _paths(runs)) is not None:
        yield Plot(
            "Alignment against uniformity",
            "Each point is a part of the run, small at its begin and large at its end. Down and to the left is better: "
            "views of an image close together, images spread over the sphere.",
            made,
        )


def _chance(runs: list[Run], of: Callable[[int], float]) -> float | None:
    """What chance gives, where all runs have the same batch."""
    batches = {run.config.get("train_batch_size") for run in runs}
    batch = next(iter(batches))
    return of(batch) if len(batches) == 1 and isinstance(batch, int) else None


def _canvas(x_axis: str, y_axis: str, **options: Any) -> Any:
    made = figure(
        height=280, sizing_mode="stretch_width", x_axis_label=x_axis, y_axis_label=y_axis,
        tools="box_zoom,pan,reset,save", toolbar_location="above", output_backend="canvas", **options,
    )  # fmt: skip
    made.toolbar.logo = None
    made.toolbar.autohide = True
    made.background_fill_alpha = made.border_fill_alpha = 0
    made.outline_line_color = None
    for axis in (*made.xaxis, *made.yaxis):
        axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = _INK
        axis.axis_label_text_color = axis.major_label_text_color = _INK
        axis.axis_label_text_font_style = "normal"
    for grid in (*made.xgrid, *made.ygrid):
        grid.grid_line_color, grid.grid_line_alpha = _INK, 0.2
    made.min_border_right = 12
    return made


def _finish(made: Any, runs: list[Run], drawn: list[tuple[str, list[Any]]]) -> Any:
    if len(runs) > 1:
        legend = Legend(items=drawn, click_policy="hide")
        _style(legend)
        legend.ncols = 2
        made.add_layout(legend, "below")
    return made


def _style(legend: Any) -> None:
    legend.orientation, legend.label_text_color = "horizontal", _INK
    legend.background_fill_alpha, legend.border_line_color = 0, None
    legend.label_text_font_size, legend.spacing = "9pt", 8


def _lines(runs: list[Run], what: _Curves) -> Any | None:
    """Curves over steps of each run; None where no run has them."""
    having = [run for run in runs if getattr(run, what.part).keys() >= {"step", *what.names}]
    if not having:
        return None
    made = _canvas("steps done", what.axis, y_axis_type="log" if what.log else "linear")
    drawn: list[tuple[str, list[Any]]] = []
    for run, color in zip(runs, colors(runs), strict=True):
        if run not in having:
            continue
        found: Curve = getattr(run, what.part)
        glyphs = []
        for name, dash in zip(what.names, ("solid", "dashed"), strict=False):
            x, y = found["step"], what.scale * found[name]
            glyphs.append(made.line(x, y, color=color, line_dash=dash, line_width=1.8))
            if what.points:
                glyphs.append(made.scatter(x, y, color=color, size=6))
        drawn.append((run.name, glyphs))
        for start in run.starts[1:]:
            _mark(made, "height", start["step"], color)
    if what.chance and (level := _chance(runs, what.chance)):
        _mark(made, "width", level, _INK)
    if what.scale == 100:  # a share: one of nothing is to lie on the axis
        made.y_range.start = 0
    made.add_tools(HoverTool(tooltips=[("step", "$x{0,0}"), (what.axis, "$y{0,0.000}")], mode="mouse"))
    return _finish(made, runs, drawn)


def _mark(made: Any, dimension: Literal["width", "height"], location: float, color: str) -> None:
    """A dotted line through the whole figure."""
    made.add_layout(Span(dimension=dimension, location=location, line_color=color, line_dash="dotted", line_width=1.5))


def _times(runs: list[Run]) -> Any | None:
    """A bar for each run, of the parts that it names, in their order."""
    parts = list(dict.fromkeys(name.removeprefix("ms_") for run in runs for name in run.speed if name[:3] == "ms_"))
    having = [run for run in runs if any(f"ms_{part}" in run.speed for part in parts)]
    if not having:
        return None
    names = [run.name for run in having]
    made = _canvas("ms per step", "", y_range=names[::-1])
    columns = {
        part: [float(np.median(run.speed[f"ms_{part}"])) if f"ms_{part}" in run.speed else 0.0 for run in having]
        for part in parts
    }
    inks = [_INK if part == "other" else _COLORS[number % len(_COLORS)] for number, part in enumerate(parts)]
    made.hbar_stack(
        parts, y="name", height=0.6, source=ColumnDataSource({"name": names, **columns}), color=inks,
        legend_label=parts,
    )  # fmt: skip
    if len(names) == 1:
        made.yaxis.visible = False
    legend = made.legend[0]
    made.add_layout(legend, "below")
    _style(legend)
    legend.ncols = 3  # two lines, which a phone has room for
    made.add_tools(HoverTool(tooltips=[("part", "$name"), ("ms per step", "@$name{0,0.0}")]))
    return made


def _paths(runs: list[Run]) -> Any | None:
    having = [run for run in runs if run.metrics.keys() >= {"alignment", "uniformity"}]
    if not having:
        return None
    made = _canvas("uniformity (log of the mean potential)", "alignment (mean squared distance)")
    drawn: list[tuple[str, list[Any]]] = []
    for run, color in zip(runs, colors(runs), strict=True):
        if run not in having:
            continue
        parts = [np.array_split(run.metrics[name], 40) for name in ("uniformity", "alignment")]
        x, y = ([part.mean() for part in of_name if len(part)] for of_name in parts)
        sizes = np.linspace(3, 10, len(x))
        glyphs = [made.line(x, y, color=color, line_alpha=0.5), made.scatter(x, y, color=color, size=sizes)]
        drawn.append((run.name, glyphs))
    return _finish(made, runs, drawn)
