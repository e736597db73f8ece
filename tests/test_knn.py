"""kNN against its definition, image by image; in blocks of any size; as a user runs it."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_dali import load
from simclr_dali.model import neighbours
from simclr_dali.model.neighbours import accuracies, nearest
from simclr_dali.pipeline.features import extract
from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.graph import LoaderConfig
from tests.conftest import ROOT, assert_sentence, run_python


def problem(count: int = 90, queries: int = 31, width: int = 6, classes: int = 7) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(classes, width, generator=generator)
    labels, truth = (torch.randint(classes, (number,), generator=generator) for number in (count, queries))
    noisy = [3 * (means[some] + torch.randn(len(some), width, generator=generator)) for some in (labels, truth)]
    return noisy[0], labels, noisy[1], truth


def by_definition(bank: Tensor, labels: Tensor, query: Tensor, classes: int, k: int, temperature: float) -> list[int]:
    """Classes with votes, most first."""
    cosines = [float(F.cosine_similarity(query, row, dim=0)) for row in bank]
    order = sorted(range(len(bank)), key=lambda place: -cosines[place])[:k]
    votes = [0.0] * classes
    for place in order:
        votes[int(labels[place])] += math.exp(cosines[place] / temperature)
    return sorted((label for label in range(classes) if votes[label]), key=lambda label: -votes[label])


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (9, 0.1), (20, 0.07), (90, 1.0)])
def test_votes_are_those_of_the_definition(k: int, temperature: float) -> None:
    bank, labels, queries, truth = problem()
    ranked = [by_definition(bank, labels, query, 7, k, temperature) for query in queries]
    first = sum(ranks[0] == true for ranks, true in zip(ranked, truth.tolist(), strict=True))
    top1, top5 = accuracies(bank, labels, queries, truth, 7, [k], temperature)[k]
    assert top1 == pytest.approx(100 * first / 31)
    assert top1 <= top5 <= 100
    five = sum(true in ranks[:5] for ranks, true in zip(ranked, truth.tolist(), strict=True))
    assert top5 == pytest.approx(100 * five / 31)


def test_a_small_temperature_leaves_the_nearest_alone() -> None:
    bank, labels, queries, truth = problem()
    nearest_one = accuracies(bank, labels, queries, truth, 7, [1], 0.1)[1][0]
    for temperature in (1e-2, 1e-3, 1e-4):  # exp(1 / temperature) is infinite from 0.0113 on
        assert accuracies(bank, labels, queries, truth, 7, [50], temperature)[50][0] == pytest.approx(
            nearest_one, abs=100 / 31 if temperature == 1e-2 else 1e-6
        )


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 13), (31, 90), (1000, 50)])
def test_blocks_do_not_change_the_neighbours(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, labels, queries, truth = problem()
    expected = nearest(bank, queries, 20)
    figures = accuracies(bank, labels, queries, truth, 7, [3, 20], 0.1)
    monkeypatch.setattr(neighbours, "QUERIES", rows)
    monkeypatch.setattr(neighbours, "BANK", columns)
    cosines, places = nearest(bank, queries, 20)
    assert torch.equal(places, expected[1]) and torch.allclose(cosines, expected[0], atol=1e-6)
    assert accuracies(bank, labels, queries, truth, 7, [3, 20], 0.1) == figures


def test_more_neighbours_than_images_are_refused() -> None:
    bank, _, queries, _ = problem()
    for k in (0, 91):
        with pytest.raises(ValueError, match=f"k is {k}"):
            nearest(bank, queries, k)


@pytest.mark.launch
def test_the_command_reports_what_a_second_count_finds(run: Path, packed: Path) -> None:
    done = run_python(ROOT / "eval/knn.py", "--ckpt", run, "--k", 5, 40)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "knn.json").read_text())
    assert result["val_images"] == 48 and result["checkpoint_step"] == 8 and result["temperature"] == 0.1

    encoder = load(run)
    setting = LoaderConfig(size=32, device=torch.device("cpu"))
    train, val = (extract(encoder, Split.local(packed, split), setting, batch=9) for split in ("train", "val"))
    for k in (5, 40):
        ranked = [by_definition(train.features, train.labels, query, 12, k, 0.1)[0] for query in val.features]
        right = sum(label == true for label, true in zip(ranked, val.labels.tolist(), strict=True))
        assert result[f"k{k}"]["top1"] == pytest.approx(100 * right / 48, abs=100 / 48)
        low, high = result[f"k{k}"]["top1_interval_95"]
        assert low <= result[f"k{k}"]["top1"] <= high
    assert_sentence(run_python(ROOT / "eval/knn.py", "--ckpt", run, "--k", 241), "241", "240 images")
    assert_sentence(run_python(ROOT / "eval/knn.py", "--ckpt", run, "--temperature", 0), "--temperature is 0")
