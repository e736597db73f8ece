"""Few labels: which, and that the whole network is trained on them and on nothing else."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from simclr_dali import load
from simclr_dali.eval.inference import open_classifier
from simclr_dali.model.pretrained import fingerprint
from simclr_dali.pipeline.draws import PROBE
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.loader import central_views
from simclr_dali.pipeline.subset import Subset, class_balanced, ids_of_names, keys
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import ShardSet, load_split
from tests.conftest import ROOT, assert_sentence, run_python
from tests.loaders import local, two_views
from tests.runs import kill_between, launch_script


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.floats(0.01, 1.0), st.integers(0, 2**63 - 1))
@example([1, 4], 1.0, 0)
def test_a_fraction_has_as_many_of_each_class_or_one_more(sizes: list[int], fraction: float, seed: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))
    total = round(fraction * len(labels))
    if total < len(sizes):
        with pytest.raises(UserError, match="less than one"):
            class_balanced(labels, len(sizes), fraction, seed)
        return
    ids = class_balanced(labels, len(sizes), fraction, seed)
    assert np.array_equal(ids, class_balanced(labels, len(sizes), fraction, seed))
    assert np.array_equal(ids, np.unique(ids))
    if fraction == 1:
        assert len(ids) == len(labels)  # a class may have more than its share
        return
    counts = np.bincount(labels[ids], minlength=len(sizes))
    each = total // len(sizes)
    assert all(count in (min(each, size), min(each + 1, size)) for count, size in zip(counts, sizes, strict=True))
    if min(sizes) > each:
        assert len(ids) == total


def test_another_seed_takes_other_images() -> None:
    labels = np.repeat(np.arange(10, dtype=np.int32), 100)
    first, second = (set(class_balanced(labels, 10, 0.1, seed)) for seed in (0, 1))
    assert len(first & second) < 30
    assert len(class_balanced(labels, 10, 1.0, 0)) == 1000


def test_names_of_a_list_are_found(train_split: ShardSet, tmp_path: Path) -> None:
    split = local(train_split)
    wanted = [3, 50, 51, 200]
    names = [key.partition("_")[2] for key in keys(split, np.array(wanted))]
    folders = [train_split.classes[train_split.samples["label"][sample]] for sample in wanted]
    lines = [f"{folder}/{name}.JPEG" for folder, name in zip(folders, names, strict=True)]
    assert ids_of_names([*lines, "", lines[0]], split, "list.txt").tolist() == wanted
    with pytest.raises(UserError, match=r"1 of 2 names of list\.txt.*nobody\.JPEG"):
        ids_of_names([lines[0], "nobody.JPEG"], split, "list.txt")
    with pytest.raises(UserError, match="no pictures"):
        ids_of_names(["", " "], split, "list.txt")
    # The drawn pictures are called alike in every class: without the folder a name means several.
    with pytest.raises(UserError, match="write it as class/name"):
        ids_of_names([f"{names[0]}.JPEG"], split, "list.txt")


@pytest.mark.parametrize("count", [24, 200])
def test_a_training_on_a_subset_sees_it_and_nothing_else(count: int, train_split: ShardSet) -> None:
    ids = np.sort(np.random.default_rng(1).choice(len(train_split), count, replace=False))
    order = Subset(train_split, ids, 8, 4, 8, seed=3)
    setting = LoaderConfig(32, torch.device("cpu"))
    seen: dict[int, list[int]] = {}
    for world in (1, 2):
        per_rank = [
            [batch.ids.tolist() for batch in two_views(
                train_split, order, (PROBE,), setting, epochs=1, rank=rank, world=world
            )]
            for rank in range(world)
        ]  # fmt: skip
        seen[world] = [sample for step in zip(*per_rank, strict=True) for part in step for sample in part]
    assert seen[1] == seen[2] and len(set(seen[1])) == len(seen[1]) == order.steps_per_epoch * 8
    assert set(seen[1]) <= set(ids.tolist()) and len(ids) - len(seen[1]) < 8 + 4
    now, after = order.windows(0, 0)
    sparse = count < 0.25 * len(train_split)
    assert (now == [] and after == []) if sparse else set(train_split.samples["shard"][order.batch(0, 0)]) <= set(now)


def test_central_views_of_chosen_images(train_split: ShardSet) -> None:
    setting = LoaderConfig(32, torch.device("cpu"))
    whole = torch.cat(
        [batch.views.clone() for batch in central_views(local(train_split), setting, batch=50, center_fraction=0.9)]
    )
    ids = np.array([2, 40, 41, 239])
    parts = [
        (batch.views.clone(), batch.ids)
        for batch in central_views(local(train_split), setting, batch=3, center_fraction=0.9, ids=ids)
    ]
    assert torch.cat([found for _, found in parts]).tolist() == ids.tolist()
    assert torch.equal(torch.cat([views for views, _ in parts]), whole[ids])
    assert list(central_views(local(train_split), setting, batch=3, center_fraction=0.9, ids=ids[:0])) == []


WORDS: list[Any] = ["--fraction", 0.2, "--epochs", 4, "--train-batch", 16, "--save-every", 3]


@pytest.mark.launch
def test_a_killed_fine_tuning_ends_as_if_undisturbed(run: Path, packed: Path, tmp_path: Path) -> None:
    command = [ROOT / "eval/finetune.py", "--ckpt", run, *WORDS]
    quiet = run_python(*command, "--out", tmp_path / "quiet")
    assert quiet.returncode == 0, quiet.stderr
    killed = tmp_path / "killed"
    state, result = killed / "finetune-0.2.state.pt", killed / "finetune-0.2.json"
    kill_between(state, result, [sys.executable, *command, "--out", killed])
    again = run_python(*command, "--out", killed)
    assert again.returncode == 0 and "going on from step" in again.stdout, again.stderr
    models = [open_classifier(folder / "finetune-0.2.pt") for folder in (tmp_path / "quiet", killed)]
    assert fingerprint(models[0].encoder) == fingerprint(models[1].encoder)
    assert torch.equal(models[0].head.weight, models[1].head.weight)
    # Unlike a probe it changes the encoder, statistics included, and says on how many images of which.
    before = load(run)
    assert not torch.equal(before.conv1.weight, models[0].encoder.conv1.weight)
    assert not torch.equal(before.bn1.running_mean, models[0].encoder.bn1.running_mean)
    result = json.loads((killed / "finetune-0.2.json").read_text())
    assert result["images"] == 48 and result["fraction"] == 0.2 and result["encoder_sha256"] == fingerprint(before)
    assert result["differs"] == {"batch": 16, "epochs": 4} and result["lr"] == pytest.approx(0.05 * 16 / 256)
    val = load_split(packed, "val")
    views = torch.cat([
        batch.views.clone()
        for batch in central_views(
            local(val), LoaderConfig(32, torch.device("cpu"), interpolation="bicubic"), batch=48
        )
    ])  # fmt: skip
    with torch.no_grad():
        right = models[1].scores(views).argmax(1) == torch.from_numpy(val.samples["label"].astype(np.int64))
    assert result["top1"] == pytest.approx(100 * right.double().mean().item(), abs=100 / 48)


@pytest.mark.launch
def test_two_processes_tune_as_one(run: Path, tmp_path: Path) -> None:
    script = ROOT / "eval/finetune.py"
    one = run_python(script, "--ckpt", run, *WORDS, "--out", tmp_path / "1")
    two = launch_script(2, script, "--ckpt", run, *WORDS, "--out", tmp_path / "2")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    models = [open_classifier(tmp_path / n / "finetune-0.2.pt") for n in "12"]
    results = [json.loads((tmp_path / n / "finetune-0.2.json").read_text()) for n in "12"]
    assert results[0]["images_sha256"] == results[1]["images_sha256"] and results[1]["processes"] == 2
    before = load(run).layer4[-1].conv2.weight
    moved = [(model.encoder.layer4[-1].conv2.weight - before).norm() for model in models]
    apart = (models[0].encoder.layer4[-1].conv2.weight - models[1].encoder.layer4[-1].conv2.weight).norm()
    assert apart < 1e-2 * min(moved), (apart, moved)


def test_mistakes_are_one_sentence(run: Path, tmp_path: Path) -> None:
    script = ROOT / "eval/finetune.py"
    assert_sentence(run_python(script, "--ckpt", run, "--fraction", 1.5), "--fraction is 1.5")
    assert_sentence(run_python(script, "--ckpt", run, "--fraction", 0.1), "4096", "24 images", "--train-batch")
    assert_sentence(run_python(script, "--ckpt", run, "--list", tmp_path / "no.txt"), "no.txt", "text file")
