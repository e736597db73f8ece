"""What evaluations found, for a report: figures with their protocol and interval, and which classes are mixed up."""

from dataclasses import replace
from typing import Any, NamedTuple

from simclr_dali.eval.report_run import Run

_WORST = 3  # classes that are named
_MOST_IN_A_MATRIX = 20  # classes
_PAIRS = 12  # in a list


class Cell(NamedTuple):
    """Of a matrix of confusions."""

    text: str
    shade: float
    """0 to 1."""
    right: bool = False


class Confusion(NamedTuple):
    """Which classes a linear probe mixes up: all pairs where there are few classes, else the most frequent."""

    title: str
    classes: list[str]
    matrix: list[list[Cell]]
    """Rows are labels, columns what was found; empty where there are many classes."""
    pairs: list[tuple[str, str, int]]
    """Label, class that was found instead, images."""


def without_damage(run: Run) -> Run:
    """``run`` with the results that can be shown, and the others named among its trouble."""
    sound, trouble = [], list(run.trouble)
    for found in run.probes:
        alone = replace(run, probes=[found])
        try:
            probe_rows(alone)
            worst_classes(alone)
            confusion(alone)
            sound.append(found)
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError) as error:
            trouble.append(f"{found['file']} is damaged ({type(error).__name__}: {error}); probe again")
    return replace(run, probes=sound, trouble=trouble)


def probe_rows(run: Run) -> list[list[str]]:
    """Run, protocol, top-1 with its interval, top-5, images, weights, data and file of each result."""
    rows = []
    for found in run.probes:
        of_k = {key: value for key, value in found.items() if key[:1] == "k" and isinstance(value, dict)}
        for label, result in of_k.items() or [("", found)]:
            if "top1" not in result:
                continue
            low, high = result.get("top1_interval_95", (float("nan"),) * 2)
            step = found.get("checkpoint_step")
            weights = "untrained" if found.get("untrained") else f"step {step:,}" if isinstance(step, int) else "a file"
            rows.append(
                [
                    run.name,
                    found["protocol"] + (f", k {label[1:]}" if label else ""),
                    f"{result['top1']:.2f} ({low:.1f} .. {high:.1f})",
                    "" if result.get("top5") is None else f"{result['top5']:.2f}",
                    f"{found.get('val_images', 0):,}",
                    weights,
                    str(found.get("data", "")).rstrip("/").rpartition("/")[2],
                    found["file"],
                ]
            )
    return rows


def worst_classes(run: Run) -> list[str]:
    """The classes that each linear probe finds hardest and easiest."""
    said = []
    for found in _linear(run):
        classes = found.get("per_class")
        if isinstance(classes, dict) and len(classes) > 2 * _WORST:
            ordered = sorted(
                ((name, top1) for name, top1 in classes.items() if top1 is not None), key=lambda item: float(item[1])
            )
            hardest, easiest = (
                ", ".join(f"{name} {top1:.0f} %" for name, top1 in some)
                for some in (ordered[:_WORST], ordered[: -_WORST - 1 : -1])
            )
            said.append(f"{run.name}, {found['file']}: hardest are {hardest}; easiest are {easiest}.")
    return said


def _linear(run: Run) -> list[dict[str, Any]]:
    """Results of linear probes of what was trained, of the newest weights last."""
    found = [one for one in run.probes if one["file"].startswith("linear") and not one.get("untrained")]
    return sorted(found, key=lambda one: int(one.get("checkpoint_step") or 0))


def confusion(run: Run) -> Confusion | None:
    """Of the newest linear probe that recorded it."""
    having = [
        one for one in _linear(run) if isinstance(one.get("confused"), list) and isinstance(one.get("per_class"), dict)
    ]
    if not having:
        return None
    found = having[-1]
    title, classes = f"{run.name}, {found['file']}", list(found["per_class"])
    pairs = [(str(label), str(other), int(count)) for label, other, count in found["confused"]]
    if len(classes) > _MOST_IN_A_MATRIX:
        return Confusion(title, classes, [], pairs[:_PAIRS])
    return Confusion(title, classes, _matrix(classes, found["per_class"], pairs), pairs)


def _matrix(classes: list[str], right: dict[str, Any], pairs: list[tuple[str, str, int]]) -> list[list[Cell]]:
    counts = {(label, other): count for label, other, count in pairs}
    most = max([1, *counts.values()])

    def cell(label: str, other: str) -> Cell:
        if label == other:
            top1 = right[label]
            return Cell("" if top1 is None else f"{top1:.0f} %", 0.0, right=True)
        count = counts.get((label, other), 0)
        return Cell(f"{count:,}" if count else "", count / most)

    return [[cell(label, other) for other in classes] for label in classes]
