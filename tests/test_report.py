"""The report: one page that says what run folders say, needs no network, and fits a laptop and a phone."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simclr_dali.eval import report_pictures
from simclr_dali.eval.report import write_report
from simclr_dali.eval.report_pictures import pictures
from simclr_dali.eval.report_run import POINTS, curve, names_of, read_run
from simclr_dali.pipeline.files import Split
from simclr_dali.shards.manifest import load_split
from simclr_dali.train.config_file import load_config
from simclr_dali.train.job import build_order
from tests.conftest import assert_sentence, run_command
from tests.runs import launch, metrics, pretrain, tiny_config

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KNN = ["--set", "simclr.knn_every_epochs=1", "--set", "simclr.knn_images=100"]


@pytest.fixture(scope="module")
def runs(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One that was stopped, went on and was probed, and one of another seed that is still at its begin."""
    folder = tmp_path_factory.mktemp("reported")
    config, one, two = tiny_config(folder), folder / "one <b>", folder / "two"
    for more in (["--stop-after-steps", 17], []):
        done = pretrain(config, packed, one, *KNN, "--set", "simclr.report=true", *more)
        assert done.returncode == 0 and (f"report: {one / 'report.html'}" in done.stdout) == (not more), done.stderr
    for command in ("linear", "knn"):
        assert run_command(command, "--ckpt", one).returncode == 0
    words = ["--set", "simclr.seed=5", "--stop-after-steps", 12]
    assert pretrain(config, packed, two, *words).returncode == 0
    return [one, two]


def test_the_end_of_a_run_writes_it(runs: list[Path]) -> None:
    page = (runs[0] / "report.html").read_text()
    assert "finished: 30 steps" in page and "None yet" in page  # it was probed only later
    starts = [json.loads(line) for line in (runs[0] / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 17] and starts[0]["versions"]["torch"]


def test_the_first_of_several_processes_writes_it_too(packed: Path, tmp_path: Path) -> None:
    done = launch(2, tiny_config(tmp_path), packed, tmp_path / "run", "--set", "simclr.report=true")
    assert done.returncode == 0 and done.stdout.count(f"report: {tmp_path / 'run/report.html'}") == 1, done.stderr
    assert "What the model of run saw" in (tmp_path / "run/report.html").read_text()


def test_a_page_says_what_the_run_folder_says(runs: list[Path], tmp_path: Path) -> None:
    done = run_command("report", runs[0], "--out", tmp_path / "page.html")
    assert done.returncode == 0 and done.stdout == f"report: {tmp_path / 'page.html'}\n"
    page = (tmp_path / "page.html").read_text()
    for title in (
        "Loss", "Telling images apart", "Similarity", "Nearest neighbours while training", "Learning rate",
        "Size of the gradient", "Speed", "Waiting for data", "Where the time of a step goes",
        "Alignment against uniformity",
    ):  # fmt: skip
        assert f"<h3>{title}</h3>" in page
    found = json.loads((runs[0] / "linear.json").read_text())
    assert f'<td>fast</td><td class="number">{found["top1"]:.2f} (' in page and "<td>knn, k 20</td>" in page
    assert "the run was stopped there and went on" in page and f"{metrics(runs[0])[-1]['loss']:.3f}" in page
    assert "one &lt;b&gt;" in page and "one <b>" not in page
    # Each mistake of the probe is in the matrix, and the diagonal has what is right.
    shown = page.partition('<table class="matrix">')[2].partition("</table>")[0]
    classes = list(found["per_class"])
    assert re.findall(r"<tr><th>([^<]+)</th>", shown) == classes
    wrong = [int(count) for count in re.findall(r'class="wrong">(\d+)<', shown)]
    assert sorted(wrong) == sorted(count for _, _, count in found["confused"]) and sum(wrong) > 0
    right = re.findall(r'class="right">(\d+) %<', shown)
    assert [int(share) for share in right] == [round(share) for share in found["per_class"].values()]
    assert len(page) < 5e6
    # Nothing is fetched: no address but in Bokeh's own code, which holds some as text.
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "http" not in outside and not re.search(r"<script[^>]*\bsrc=", page) and "<link" not in outside


def test_pictures_are_those_that_the_training_saw(runs: list[Path], packed: Path, tmp_path: Path) -> None:
    """Of its last step, whose samples the order knows; neighbours and the map are of val."""
    run = read_run(runs[0], "one")
    found = pictures(run)
    config = load_config(str(runs[0] / "config.json"), [])
    order = build_order(config, load_split(packed, "train"))
    samples = [int(row[0].words[1].split()[1]) for row in found.views]
    assert samples == order.batch(1, 14)[:4].tolist() and found.views_of.startswith("step 30")
    assert all(len(row) == 3 and re.search(r"\d+% of the picture", row[1].words[0]) for row in found.views)
    assert found.neighbours_of == "48 images of val" and len(found.dots) == 48
    for row in found.neighbours:
        cosines = [float(shown.words[1].split()[1]) for shown in row[1:]]
        assert len(cosines) == 6 and cosines == sorted(cosines, reverse=True) and cosines[0] <= 1
        assert {shown.color for shown in row[1:]} <= {"#009e73", "#d55e00"}
        assert all((shown.color == "#009e73") == (shown.words[0] == row[0].words[1]) for shown in row[1:])
    assert all(0 <= dot.left <= 100 and 0 <= dot.top <= 100 for dot in found.dots)


def test_pictures_whose_embeddings_are_close_lie_together_on_the_map(packed: Path) -> None:
    split = Split.local(packed, "train")
    ids = np.arange(0, len(split.shards), 2)
    labels = torch.from_numpy(split.shards.samples["label"][ids].astype(np.int64))
    noise = torch.randn(len(ids), 12, generator=torch.Generator().manual_seed(0))
    features = torch.nn.functional.one_hot(labels, 12) + 0.1 * noise
    small = dict.fromkeys(ids.tolist(), PIL.Image.new("RGB", (40, 40)))
    dots = report_pictures.map_of(split, ids, features, small)
    places = np.array([(dot.left, dot.top) for dot in dots])
    assert places.min() >= 0 and places.max() <= 100 and dots == report_pictures.map_of(split, ids, features, small)
    distances = np.linalg.norm(places[:, None] - places[None], axis=2) + 1e9 * np.eye(len(dots))
    assert (labels.numpy()[distances.argmin(axis=1)] == labels.numpy()).mean() > 0.95
    assert report_pictures.map_of(split, ids[:5], features[:5], small) == []


def test_a_run_whose_data_is_gone_has_a_page_without_pictures(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[1], run)
    shutil.rmtree(run / "checkpoints")
    page = write_report([run]).read_text()
    assert "No pictures of run:" in page and "<h3>Loss</h3>" in page


def test_runs_are_laid_over_each_other_with_what_they_differ_in(runs: list[Path], tmp_path: Path) -> None:
    page = write_report(runs, tmp_path / "page.html", with_pictures=False).read_text()
    assert "2 runs compared" in page and "<tr><td>simclr.seed</td><td>0</td><td>5</td></tr>" in page
    assert "not finished: 12 steps are done" in page and "simclr.knn_every_epochs" in page
    assert "<tr><td>simclr.data" not in page.partition("all settings of")[0]


def test_of_many_classes_the_most_frequent_confusions_are_listed(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    found = json.loads((run / "linear.json").read_text())
    found["per_class"] = {f"class {number}": 50.0 for number in range(30)} | {"empty": None}
    found["confused"] = [[f"class {number}", "class 0", 100 - number] for number in range(1, 30)]
    (run / "linear.json").write_text(json.dumps(found))
    page = write_report([run], with_pictures=False).read_text()
    assert page.count('<td>class 0</td><td class="number">') == 12 and 'class="matrix"' not in page
    assert '<td>class 1</td><td>class 0</td><td class="number">99</td>' in page


def test_of_few_classes_and_of_fine_tuning_there_is_a_page_too(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    found = json.loads((run / "linear.json").read_text())
    few = {**found, "top5": None, "per_class": {"a": 50.0, "b": 100.0}, "confused": [["a", "b", 3]]}
    (run / "linear.json").write_text(json.dumps(few))
    (run / "finetune-0.1.json").write_text(
        json.dumps({**few, "protocol": "finetune-0.1", "confused": [["b", "a", 77]]})
    )
    page = write_report([run], with_pictures=False).read_text()
    assert 'class="wrong">3<' in page and ">77<" not in page and "Confusion (run, linear.json)" in page
    (run / "linear.json").write_text(json.dumps({**few, "untrained": True}))
    assert "Confusion" not in write_report([run], with_pictures=False).read_text()


@pytest.mark.parametrize(
    "damage",
    [
        {"top1": None}, {"top1": "high"}, {"top1_interval_95": None}, {"top5": "x"}, {"confused": [None]},
        {"confused": [["a", "b"]]}, {"confused": [["a", "b", "many"]]}, {"per_class": {"a": "x", "b": 1}},
        {"checkpoint_step": "x", "confused": [["a", "b", 1]]}, {"val_images": None}, {"protocol": None},
    ],
)  # fmt: skip
def test_a_damaged_result_is_named_and_the_page_is_there(
    damage: dict[str, Any], runs: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    found = json.loads((run / "linear.json").read_text())
    (run / "linear-sweep.json").write_text(json.dumps({**found, **damage}))
    page = write_report([run], with_pictures=False).read_text()
    assert f"({found['top1_interval_95'][0]:.1f} .." in page  # of the sound one
    assert "linear-sweep.json is damaged" in page or f"{found['top1']:.2f}" in page.partition("linear-sweep.json")[0]


def test_other_damage_costs_only_its_own_line(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    (run / "finished.json").write_text('{"steps": "many"}')
    (run / "starts.jsonl").write_text('{"step": 0, "versions": null}\n{"step": true}\n')
    (run / "bad-step-00000003-rank-0.json").write_text('{"about": null}')
    page = write_report([run], with_pictures=False).read_text()
    assert "not finished: 30 steps" in page and "step None" in page
    (run / "config.json").write_text('{"simc')
    assert_sentence(run_command("report", run), "config.json is damaged")


def test_a_collapsed_encoder_has_no_map(packed: Path) -> None:
    split = Split.local(packed, "train")
    ids = np.arange(40)
    small = dict.fromkeys(ids.tolist(), PIL.Image.new("RGB", (40, 40)))
    for features in (torch.ones(40, 8), torch.zeros(40, 8), torch.full((40, 8), float("nan"))):
        assert report_pictures.map_of(split, ids, features, small) == []


def test_damaged_and_missing_files_cost_only_what_they_hold(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    for name in ("speed.jsonl", "starts.jsonl"):
        (run / name).unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "los')
    (run / "linear.json").write_text("{")
    (run / "bad-step-00000003-rank-0.json").write_text('{"about": {"step": 3, "rank": 0, "reason": "loss is nan"}}')
    page = write_report([run], with_pictures=False).read_text()
    assert "step 3: loss is nan, on rank 0" in page and "<h3>Speed</h3>" not in page and "<h3>Loss</h3>" in page
    assert "<td>fast</td>" not in page and "Not recorded" in page


def test_mistakes_are_sentences(runs: list[Path], tmp_path: Path) -> None:
    assert_sentence(run_command("report", tmp_path), "is no run folder")
    assert_sentence(run_command("report", runs[0], runs[0]), "is given twice")
    shutil.copy(runs[0] / "config.json", tmp_path / "config.json")
    assert_sentence(run_command("report", tmp_path), "has no steps yet")


@given(st.integers(1, 3 * POINTS))
def test_long_curves_are_means_of_all_steps(count: int) -> None:
    random = np.random.default_rng(count)
    losses = random.normal(size=count).tolist()
    lines: list[dict[str, Any]] = [{"step": step, "loss": loss, "word": "x"} for step, loss in enumerate(losses)]
    found = curve(lines)
    assert set(found) == {"step", "loss"} and len(found["loss"]) == min(count, POINTS)
    assert (np.diff(found["step"]) > 0).all() and 1 <= found["step"][0] <= found["step"][-1] <= count
    if count <= POINTS:
        assert found["loss"].tolist() == losses
    assert found["loss"].min() >= min(losses)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/runs/a"], ["a"]),
        (["/runs/a", "/runs/b"], ["a", "b"]),
        (["/runs/a/run", "/runs/b/run"], ["a", "b"]),
        (["/runs/a", "/runs/a/b"], ["a", "a/b"]),
        (["/one/x/run", "/two/y/run", "/two/z/run"], ["one/x", "two/y", "two/z"]),
    ],
)
def test_runs_are_named_by_what_tells_them_apart(paths: list[str], names: list[str]) -> None:
    assert names_of([Path(path) for path in paths]) == names


def test_curves_have_the_numbers_of_the_run(runs: list[Path]) -> None:
    run, lines = read_run(runs[0], "one"), metrics(runs[0])
    assert run.steps == 30 and run.metrics["step"].tolist() == list(range(1, 31))
    for name in ("loss", "lr", "top1", "uniformity"):
        assert run.metrics[name].tolist() == [line[name] for line in lines]
    assert len(run.knn["top1"]) == 2 and {probe["protocol"] for probe in run.probes} == {"fast", "knn"}


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page in")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_whole(width: int, runs: list[Path], tmp_path: Path) -> None:
    """Nothing in the console, every curve drawn, no picture missing, and nothing to scroll sideways."""
    write_report(runs, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    asked = """<script>
    function drawn(root) {  // Bokeh draws inside of shadow roots
      let found = [...root.querySelectorAll('canvas')].filter(one => one.width > 0).length;
      for (const one of root.querySelectorAll('*')) if (one.shadowRoot) found += drawn(one.shadowRoot);
      return found;
    }
    setTimeout(() => { document.title = JSON.stringify({
      sideways: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      missing: [...document.images].filter(one => !one.naturalWidth).length, drawn: drawn(document) }); }, 2000);
    </script></body>"""
    (tmp_path / "asked.html").write_text(page.replace("</body>", asked))
    words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", "--enable-logging=stderr"]
    words += ["--virtual-time-budget=8000", "--dump-dom", (tmp_path / "asked.html").as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    found = json.loads(title[1].replace("&quot;", '"'))
    assert found["sideways"] == 0 and found["missing"] == 0 and found["drawn"] >= 9, found
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "setting log level" not in line]
    assert not console
