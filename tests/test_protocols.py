"""The linear protocols: the same on any number of processes, resumable to the bit, and what their sources say."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_dali.eval.inference import open_classifier
from simclr_dali.eval.logistic import Scale, fit_linear, score
from simclr_dali.eval.protocols import SCHEDULES
from simclr_dali.eval.supervised import build_optimizer, build_order, micro_batch, rate
from simclr_dali.eval.sweep import GRID, MOMENTUM, Point, held_out, sweep, train_heads
from simclr_dali.model.collectives import all_rows
from simclr_dali.model.lars import LARS
from simclr_dali.model.neighbours import accuracies
from simclr_dali.model.schedule import learning_rate
from simclr_dali.pipeline.features import share
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import ShardSet
from tests.conftest import ROOT, assert_sentence, run_python, run_ranks
from tests.runs import kill_between, launch_script, torchrun
from tests.test_linear import problem

CLASSES = 4


def by_autograd(features: Tensor, labels: Tensor, point: Point, epochs: int, batch: int) -> nn.Linear:
    """One classifier of a sweep, as anyone would write it."""
    layer = nn.Linear(features.shape[1], CLASSES)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    groups: list[dict[str, Any]] = [
        {"params": [layer.weight], "weight_decay": point.weight_decay},
        {"params": [layer.bias]},
    ]
    optimizer = torch.optim.SGD(groups, point.lr, momentum=MOMENTUM)
    generator = torch.Generator().manual_seed(0)
    steps = len(features) // batch
    for epoch in range(epochs):
        order = torch.randperm(len(features), generator=generator)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch * steps + step, point.lr, 0, epochs * steps)
            rows = order[step * batch : (step + 1) * batch]
            optimizer.zero_grad()
            F.cross_entropy(layer(features[rows]), labels[rows]).backward()
            optimizer.step()
    return layer


def test_every_classifier_of_a_sweep_is_trained_as_if_alone() -> None:
    features, labels = problem()
    scale = Scale.of(features)
    points = [Point(0.3, 0.0), Point(0.01, 0.1), Point(1.0, 1e-3)]
    everyone = torch.arange(len(features))
    weight, bias = train_heads(features, labels, everyone, scale, CLASSES, points, seed=0, epochs=3, batch=64)
    features = scale.apply(features)
    for own_weight, own_bias, point in zip(weight, bias, points, strict=True):
        alone = by_autograd(features, labels, point, 3, 64)
        assert torch.allclose(own_weight, alone.weight, atol=1e-5) and torch.allclose(own_bias, alone.bias, atol=1e-5)
    assert not torch.allclose(weight[0], weight[2], atol=1e-2)


def test_a_sweep_chooses_on_what_it_did_not_train_on() -> None:
    features, labels = problem(600)
    ids = np.arange(600)
    aside = torch.from_numpy(held_out(ids, 0))
    assert 30 < aside.sum() < 90
    points = [Point(1e-6, 0.0), Point(0.1, 0.0), Point(0.1, 0.01)]
    before = sweep(features, labels, ids, CLASSES, points, epochs=5, batch=64)
    # Labels that are wrong only on the part kept aside turn the accuracy on it over, and the choice with it.
    wrong = torch.where(aside, (labels + 1) % CLASSES, labels)
    after = sweep(features, wrong, ids, CLASSES, points, epochs=5, batch=64)
    assert before.chosen.lr == 0.1 and before.accuracies[before.chosen] > 60
    assert after.accuracies[before.chosen] < 30


def test_a_sweep_beats_or_equals_most_of_its_points() -> None:
    features, labels = problem(600)
    found = sweep(features, labels, np.arange(600), CLASSES)
    assert len(found.accuracies) == len(GRID) == 100
    assert found.accuracies[found.chosen] == max(found.accuracies.values())
    optimum = score(fit_linear(features, labels, CLASSES, 1e-3).layer, features, labels).top1
    assert score(found.layer, features, labels).top1 > optimum - 3


def test_what_is_kept_aside_does_not_depend_on_the_shares() -> None:
    whole = held_out(np.arange(101), 3)
    parts = [held_out(share(101, rank, 7), 3) for rank in range(7)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert not np.array_equal(whole, held_out(np.arange(101), 4))


def test_the_border_of_the_grid_is_told() -> None:
    features, labels = problem(600)
    inside = [Point(1e-6, 0.0), Point(0.1, 0.0), Point(1e-7, 0.0), Point(1e4, 0.0)]
    found = sweep(features, labels, np.arange(600), CLASSES, inside, epochs=5)
    assert found.chosen.lr == 0.1 and not found.at_the_border
    assert sweep(features, labels, np.arange(600), CLASSES, inside[:3], epochs=5).at_the_border
    with pytest.raises(UserError, match="3 images are too few"):
        sweep(features[:3], labels[:3], np.arange(3), CLASSES, inside)


def test_batches_have_no_tiny_passes() -> None:
    assert micro_batch(256, 512) == 256 and micro_batch(256, 300) == 150 and micro_batch(6, 16) == 4
    with pytest.raises(UserError, match="509 images of a process"):
        micro_batch(256, 509)


def on_a_rank(rank: int, world: int) -> dict[str, Any]:
    features, labels = problem(203)
    queries, truth = problem(57, classes=CLASSES)
    own = torch.from_numpy(share(203, rank, world))
    mine, of = features[own], labels[own]
    fit = fit_linear(mine, of, CLASSES, 1e-2)
    asked = torch.from_numpy(share(57, rank, world))
    points = [Point(1.0, 0.0), Point(1e-7, 0.0), Point(0.1, 1e-3)]
    swept = sweep(mine, of, own.numpy(), CLASSES, points, epochs=30, batch=24)
    return {
        "fit": fit.layer(features).detach(),
        "score": score(fit.layer, queries[asked], truth[asked]),
        "rows": all_rows(mine),
        "knn": accuracies(mine, of, queries, truth, CLASSES, [1, 20, 150], 0.1),
        "swept": swept.layer(features).detach(),
        "chosen": swept.chosen,
    }


def test_shares_of_ranks_give_what_one_process_finds(tmp_path: Path) -> None:
    alone = on_a_rank(0, 1)
    for world in (2, 3):
        results = run_ranks(on_a_rank, world, tmp_path, world)
        for found in results:
            assert torch.equal(found["rows"], alone["rows"])
            assert torch.allclose(found["fit"], alone["fit"], atol=2e-3)
            assert found["score"] == alone["score"] and found["score"].count == 57
            assert found["knn"] == alone["knn"]
            assert torch.equal(found["swept"], results[0]["swept"]) and found["chosen"].lr > 1e-7


def test_protocols_are_those_of_their_sources() -> None:
    mm, google, moco = (SCHEDULES[name] for name in ("mmpretrain-lars-90e", "google-sgd-90e", "moco-sgd-90e"))
    assert (mm.lr, mm.batch, mm.epochs, mm.weight_decay) == (1.6, 4096, 90, 0)
    assert (google.lr, google.batch, google.epochs, google.weight_decay) == (1.6, 4096, 90, 1e-6)
    assert (moco.lr, moco.batch, moco.epochs, moco.weight_decay) == (0.4, 1024, 90, 0)
    layer = nn.Linear(3, 2)
    lars = build_optimizer(layer, mm)
    assert isinstance(lars, LARS) and all(group["adapt"] for group in lars.param_groups)
    assert lars.param_groups[0]["trust_coefficient"] == 0.001
    sgd = build_optimizer(layer, google)
    assert isinstance(sgd, torch.optim.SGD)
    assert all(group["nesterov"] and group["weight_decay"] == 1e-6 for group in sgd.param_groups)
    assert not build_optimizer(layer, moco).param_groups[0]["nesterov"]
    # By epoch the rate is constant within one; by step it falls at each.
    assert len({rate(mm, step, 10) for step in range(20)}) == 2
    assert len({rate(google, step, 10) for step in range(20)}) == 20
    assert (mm.interpolation, google.interpolation, moco.interpolation) == ("bilinear", "bicubic", "bilinear")
    assert rate(moco, 0, 10) == 0.4 and rate(moco, 899, 10) == pytest.approx(0.4 * 0.5 * (1 + np.cos(np.pi * 89 / 90)))


def test_another_batch_is_reported_and_takes_the_rate_along() -> None:
    other, differs = SCHEDULES["google-sgd-90e"].changed(256, 5)
    assert differs == {"batch": 256, "epochs": 5} and other.lr == pytest.approx(0.1)
    assert SCHEDULES["google-sgd-90e"].changed(4096, None)[1] == {}


def test_batches_that_cannot_be_are_refused(train_split: ShardSet) -> None:
    with pytest.raises(UserError, match="4096 does not fit the 240 images"):
        build_order(train_split, None, 4096, 1, 0)
    with pytest.raises(UserError, match="3 processes cannot share a batch of 16"):
        build_order(train_split, None, 16, 3, 0)
    assert build_order(train_split, None, 48, 2, 0).lanes == build_order(train_split, None, 48, 1, 0).lanes


WORDS = ["--protocol", "moco-sgd-90e", "--epochs", 3, "--train-batch", 16, "--batch", 6, "--save-every", 5]


@pytest.mark.launch
def test_a_killed_probe_ends_as_if_undisturbed(run: Path, tmp_path: Path) -> None:
    command = [ROOT / "eval/linear.py", "--ckpt", run, *WORDS]
    quiet = run_python(*command, "--out", tmp_path / "quiet")
    assert quiet.returncode == 0, quiet.stderr
    killed = tmp_path / "killed"
    state = killed / "linear-moco-sgd-90e.state.pt"
    kill_between(state, killed / "linear-moco-sgd-90e.json", [sys.executable, *command, "--out", killed])
    other = run_python(*command, "--out", killed, "--seed", 1)
    assert_sentence(other, "seed", "remove the file")
    again = run_python(*command, "--out", killed)
    assert again.returncode == 0 and "going on from step" in again.stdout, again.stderr
    # A stop after the last step, before the results are written, costs nothing: they come without training again.
    assert not state.exists()
    (killed / "linear-moco-sgd-90e.json").unlink()
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "linear-moco-sgd-90e.json").mkdir()  # where the result cannot be written
    assert run_python(*command, "--out", stopped).returncode == 2
    (stopped / "linear-moco-sgd-90e.json").rmdir()
    late = run_python(*command, "--out", stopped)
    assert late.returncode == 0 and "going on from step 45" in late.stdout, late.stdout + late.stderr
    (stopped / "linear-moco-sgd-90e.json").rename(killed / "linear-moco-sgd-90e.json")
    expected, found = (open_classifier(folder / "linear-moco-sgd-90e.pt") for folder in (tmp_path / "quiet", killed))
    assert torch.equal(expected.head.weight, found.head.weight) and torch.equal(expected.head.bias, found.head.bias)
    result = json.loads((killed / "linear-moco-sgd-90e.json").read_text())
    assert result["differs"] == {"batch": 16, "epochs": 3} and result["lr"] == pytest.approx(0.1 * 16 / 256)
    assert result["checkpoint_sha256"] and len(result["per_class"]) == 12


@pytest.mark.launch
@pytest.mark.parametrize(
    "words", [WORDS, ["--protocol", "fast"], ["--protocol", "sweep"]], ids=["90e", "fast", "sweep"]
)
def test_two_processes_find_what_one_does(words: list[Any], run: Path, tmp_path: Path) -> None:
    script = ROOT / "eval/linear.py"
    one = run_python(script, "--ckpt", run, *words, "--out", tmp_path / "1")
    launcher = torchrun if "sweep" in words else launch_script
    two = launcher(2, script, "--ckpt", run, *words, "--out", tmp_path / "2")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    results = [json.loads(next((tmp_path / n).glob("linear*.json")).read_text()) for n in "12"]
    assert results[1]["processes"] == 2 and results[0]["encoder_sha256"] == results[1]["encoder_sha256"]
    assert results[0]["val_images"] == results[1]["val_images"] == 48
    models = [open_classifier(next((tmp_path / n).glob("linear*.pt"))) for n in "12"]
    if "sweep" not in words:  # whose batches are made up of the shares, and which may choose another point
        # Rounding may tip a picture or two.
        assert abs(results[0]["top1"] - results[1]["top1"]) < 100 * 2.5 / 48
        one_weight, two_weight = (model.head.weight for model in models)
        assert (one_weight - two_weight).norm() < 2e-3 * one_weight.norm()


@pytest.mark.launch
def test_kept_features_are_used_again(run: Path, tmp_path: Path) -> None:
    words = ["--ckpt", run, "--features", tmp_path / "features", "--out", tmp_path]
    first = run_python(ROOT / "eval/linear.py", *words)
    assert first.returncode == 0, first.stderr
    before = json.loads((tmp_path / "linear.json").read_text())
    kept = sorted((tmp_path / "features").iterdir())
    assert len(kept) == 2
    again = run_python(ROOT / "eval/linear.py", *words)
    after = json.loads((tmp_path / "linear.json").read_text())
    assert again.returncode == 0 and after["top1"] == before["top1"]
    assert before["seconds_extraction"] > 0 and after["seconds_extraction"] == 0
    # A torn file is extracted anew, and what a killed process was writing long ago goes.
    left, fresh = (kept[0].with_name(f"{kept[0].name}.{number}.tmp") for number in (77, 78))
    left.write_bytes(b"x")
    os.utime(left, (0, 0))
    fresh.write_bytes(b"x")
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    torn = run_python(ROOT / "eval/linear.py", *words)
    assert torn.returncode == 0 and "cannot be read" in torn.stderr
    assert fresh.exists() and not left.exists()
    fresh.unlink()
    assert json.loads((tmp_path / "linear.json").read_text())["top1"] == before["top1"]
    # Another size is other features.
    assert run_python(ROOT / "eval/linear.py", *words, "--image-size", 40).returncode == 0
    assert len(list((tmp_path / "features").iterdir())) == 4


def test_mistakes_are_one_sentence(run: Path, tmp_path: Path) -> None:
    script = ROOT / "eval/linear.py"
    assert_sentence(run_python(script, "--ckpt", run, "--epochs", 3, "--seed", 1), "--epochs, --seed", "fast")
    wrong = run_python(script, "--ckpt", run, "--protocol", "sweep", "--seed", -1)
    assert wrong.returncode == 2 and "-1 is not in 0" in wrong.stderr and "Traceback" not in wrong.stderr
    assert_sentence(run_python(script, "--ckpt", run, "--protocol", "moco-sgd-90e"), "1024", "--train-batch")
