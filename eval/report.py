"""Write a page on a run, or on several laid over each other: curves, pictures, probes, settings, environment.

    simclr-dali report runs/ds_lars                          # writes runs/ds_lars/report.html
    simclr-dali report runs/a runs/b --out compared.html

The page is one file that needs no network. It may be written while a run trains. Its pictures are of the newest
checkpoint: views of the last step, nearest neighbours and a map of some hundred images (of val where there is one).
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import sys

    # This script's own folder must not shadow installed modules, and its checkout must win over an installed copy.
    sys.path[0] = str(Path(__file__).resolve().parents[1] / ".package")

from simclr_dali.shards.command_line import file_to_write, parser_of
from simclr_dali.shards.errors import UserError, run_main


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="They are run folders.")
    parser.add_argument(
        "--out", type=file_to_write, metavar="HTML", help="Write the page here (default: report.html in the first RUN)."
    )
    parser.add_argument(
        "--no-pictures", action="store_true", help="Leave out views, neighbours and map, for which the data is read."
    )
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before anything else is imported

import jinja2
from bokeh.embed import components
from bokeh.resources import Resources
from markupsafe import Markup

import simclr_dali
from simclr_dali.eval.report_pictures import Pictures, pictures
from simclr_dali.eval.report_plots import colors, plots
from simclr_dali.eval.report_probes import confusion, probe_rows, without_damage, worst_classes
from simclr_dali.eval.report_run import Run, read_runs
from simclr_dali.shards.durable import write_durably
from simclr_dali.shards.nested import flat


def main(given: argparse.Namespace) -> None:
    out = write_report(given.runs, given.out, with_pictures=not given.no_pictures)
    print(f"report: {out}")


def write_report(runs: list[Path], out: Path | None = None, *, with_pictures: bool = True) -> Path:
    """Write the page of these run folders to ``out`` (report.html in the first one); returns where it is.

    with_pictures: see :func:`page`.
    Raises UserError where one is no run folder, or the page cannot be written.
    """
    out = out or runs[0] / "report.html"
    write_durably(out, page(read_runs(runs), with_pictures=with_pictures).encode())
    return out


def page(runs: list[Run], *, with_pictures: bool = True) -> str:
    """The page as HTML. with_pictures: the newest checkpoint is read, and some images of its data are embedded."""
    runs = [without_damage(run) for run in runs]
    drawn = list(plots(runs))
    shown, missing = pictures_of(runs) if with_pictures else ({}, {})
    script, divs = components([plot.figure for plot in drawn])
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template("report.html.j2").render(
        title=f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs compared",
        heads=[head(run, color) for run, color in zip(runs, colors(runs), strict=True)],
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=simclr_dali.__version__,
        marked=any(len(run.starts) > 1 for run in runs),
        scripts=Markup(Resources(mode="inline", components=["bokeh"], log_level="error").render_js()),
        plots=[
            {"title": plot.title, "look_for": plot.look_for, "div": Markup(div)}
            for plot, div in zip(drawn, divs, strict=True)
        ],
        plot_script=Markup(script),
        pictures=shown,
        no_pictures=missing,
        probes=[row for run in runs for row in probe_rows(run)],
        worst=[words for run in runs for words in worst_classes(run)],
        confusions=[found for run in runs if (found := confusion(run))],
        first_run=runs[0].path,
        differences=differences(runs),
        settings=settings_of(runs[0]),
        starts=[row for run in runs for row in start_rows(run)],
        trouble=[f"{run.name}: {words}" if len(runs) > 1 else words for run in runs for words in run.trouble],
    )


def pictures_of(runs: list[Run]) -> tuple[dict[str, Pictures], dict[str, str]]:
    """The pictures of each run that has some, and why the others have none, by name."""
    shown, missing = {}, {}
    for run in runs:
        try:
            shown[run.name] = pictures(run, len(runs))
        except UserError as error:
            missing[run.name] = str(error)
    return shown, missing


def head(run: Run, color: str) -> dict[str, str]:
    """What a run is, and how far it has come."""
    simclr, total = run.config["simclr"], run.finished.get("steps")
    encoder = simclr["encoder"]
    what = (
        f"{encoder['name']}, {simclr['image_size']} px, batch {run.config['train_batch_size']:,}, {simclr['epochs']} "
        f"epochs of {simclr['data']}"
    )
    seconds, images_per_s = run.finished.get("seconds"), run.finished.get("images_per_s")
    if isinstance(total, int) and isinstance(seconds, int | float) and isinstance(images_per_s, int | float):
        taken = datetime.timedelta(seconds=round(seconds))
        state = f"finished: {total:,} steps in {taken}, {images_per_s:,.0f} images/s"
    else:
        state = f"not finished: {run.steps:,} steps are done"
    loss = f"; the last loss is {run.metrics['loss'][-1]:.3f}" if "loss" in run.metrics else ""
    return {"name": run.name, "color": color, "what": what, "state": state + loss}


def _dict(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def start_rows(run: Run) -> list[list[str]]:
    """Run, first step, time, processes, device and versions of each start."""
    return [
        [
            run.name,
            f"{start['step']:,}",
            str(start.get("time", "")).replace("T", " "),
            str(start.get("processes", "")),
            str(start.get("device", "")),
            ", ".join(f"{name} {version}" for name, version in _dict(start.get("versions")).items()),
        ]
        for start in run.starts
    ]


def differences(runs: list[Run]) -> dict[str, list[str]]:
    """Settings in which runs differ, but for where they are and what they say of themselves."""
    settings = [settings_of(run) for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one)
    found = {key: [one.get(key, "not set") for one in settings] for key in keys}
    return {
        key: values
        for key, values in found.items()
        if len(set(values)) > 1 and key != "simclr.run" and not key.startswith("simclr.about.")
    }


def settings_of(run: Run) -> dict[str, str]:
    """Settings by their path, as JSON."""
    return {key: json.dumps(value) for key, value in flat(run.config).items()}


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
