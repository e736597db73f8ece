"""Input path, loss, step and trainer on a GPU; skipped where there is none."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from simclr_dali.eval.logistic import fit_linear, score
from simclr_dali.eval.sweep import Point, sweep
from simclr_dali.model.lars import LARS, parameter_groups
from simclr_dali.model.neighbours import accuracies
from simclr_dali.model.ntxent import NTXent, nt_xent
from simclr_dali.model.resnet import ResNet
from simclr_dali.model.simclr import Architecture, build_model
from simclr_dali.pipeline.draws import Recipe
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.kept_memory import set_aside
from simclr_dali.pipeline.order import Order
from simclr_dali.pipeline.stream import Batch
from simclr_dali.shards.manifest import ShardSet
from simclr_dali.train.micro_batches import MicroBatches
from simclr_dali.train.simclr_block import Graph
from simclr_dali.train.step import train_step
from tests.conftest import ROOT, run_python
from tests.loaders import two_views
from tests.runs import metrics, tiny_config
from tests.test_linear import problem
from tests.test_ntxent import embeddings
from tests.test_step import PlainEngine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ON_GPU = {"DS_ACCELERATOR": "cuda"}
GPU = LoaderConfig(size=32, device=torch.device("cuda", 0))


def views_of(shards: ShardSet, setting: LoaderConfig, **options: object) -> list[Batch]:
    order = Order(shards.shard_sizes(), 24, 4, 2, 9)
    return list(two_views(shards, order, Recipe(), setting, epochs=2, **options))  # type: ignore[arg-type]


def test_views_of_the_gpu_are_those_of_the_cpu_but_for_rounding(train_split: ShardSet) -> None:
    on_gpu, on_cpu = (views_of(train_split, replace(GPU, device=torch.device(name))) for name in ("cuda", "cpu"))
    for ours, expected in zip(on_gpu, on_cpu, strict=True):
        assert ours.views.is_cuda and torch.equal(ours.ids, expected.ids)
        # In units of the standard deviation, about 57 levels: two levels in the mean.
        assert (ours.views.cpu() - expected.views).abs().mean() < 2 / 57


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_pixels_on_the_gpu_do_not_depend_on_how_the_batch_is_split(share: float, train_split: ShardSet) -> None:
    """Also of those that the JPEG engine decodes."""
    setting = replace(GPU, engine_share=share, **Graph().on("cuda"))
    whole = views_of(train_split, setting)
    micro = views_of(train_split, setting, micro_batch=6)
    for number, batch in enumerate(whole):
        parts = micro[4 * number : 4 * number + 4]
        for view in range(2):
            together = torch.cat([part.views.chunk(2)[view] for part in parts])
            assert torch.equal(batch.views.chunk(2)[view], together)


@pytest.mark.parametrize("place", ["gpu", "host"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_views_of_decoded_pictures_that_are_kept_are_the_same(
    place: Literal["gpu", "host"], share: float, train_split: ShardSet
) -> None:
    """Without regions, since what is kept is whole. In the last epochs everything is there."""
    setting = replace(GPU, engine_share=share, **{**Graph().on("cuda"), "region": False})
    kept, words = set_aside(train_split, place, GPU.device)
    assert kept and f"kept in {'GPU' if place == 'gpu' else 'host'} memory" in words
    order = Order(train_split.shard_sizes(), 24, 4, 2, 9)
    keeping = two_views(train_split, order, Recipe(), setting, epochs=4, kept=kept)
    for ours, wanted in zip(keeping, two_views(train_split, order, Recipe(), setting, epochs=4), strict=True):
        torch.cuda._sleep(2_000_000)
        assert torch.equal(ours.views, wanted.views) and torch.equal(ours.ids, wanted.ids)
    assert kept.has(np.arange(len(train_split))).mean() > 0.9


def test_pictures_are_kept_on_the_gpu_only_beside_what_the_training_takes(train_split: ShardSet) -> None:
    _, whole = torch.cuda.mem_get_info()  # what is free changes with what runs beside this
    asked: list[tuple[Callable[[], int] | None, str]] = [(lambda: 0, "GPU"), (lambda: whole, "host"), (None, "host")]
    for beside, where in asked:
        kept, words = set_aside(train_split, "auto", GPU.device, beside=beside)
        assert kept and f"kept in {where} memory" in words and kept.device.type == ("cuda" if where == "GPU" else "cpu")


def test_batches_on_the_gpu_that_are_kept_stay_as_they_were(train_split: ShardSet) -> None:
    batches = views_of(train_split, GPU)
    again = views_of(train_split, GPU)
    assert all(torch.equal(a.views, b.views) for a, b in zip(batches, again, strict=True))


def test_half_precision_on_the_gpu_is_the_rounded_view(train_split: ShardSet) -> None:
    full, half = (views_of(train_split, replace(GPU, dtype=dtype))[0] for dtype in (torch.float32, torch.float16))
    assert torch.allclose(half.views.float(), full.views, atol=0.02)


def test_the_loss_on_the_gpu_is_that_of_the_cpu() -> None:
    z = embeddings(1000, 128).detach().float()
    results = []
    for device in ("cpu", "cuda"):
        leaf = z.to(device).requires_grad_()
        contrast = nt_xent(leaf, 0.1, tile=256)
        (gradient,) = torch.autograd.grad(contrast.loss, leaf)
        results.append((contrast, gradient.cpu()))
    (on_cpu, expected), (on_gpu, gradient) = results
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
    for name, value in vars(on_cpu).items():
        assert getattr(on_gpu, name).item() == pytest.approx(value.item(), rel=1e-4), name


@pytest.mark.parametrize("passes", [1, 3])
def test_a_step_on_the_gpu_never_waits(passes: int) -> None:
    model = build_model(Architecture(ResNet("resnet18", 0.25, "7x7"), (16, 8)), 0).cuda()
    engine = PlainEngine(model, passes)
    engine.optimizer = LARS(parameter_groups(model, 1e-6), lr=0.1)
    device = torch.device("cuda", 0)
    micro_batches = MicroBatches(device, passes)
    parts = [torch.randn(16, 3, 64, 64, device=device) for _ in range(passes)]
    for _ in range(2):  # what is made once: memory, the optimizer's state
        micro_batches.begin(iter(parts))
        train_step(engine, micro_batches, NTXent(0.1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        micro_batches.begin(iter(parts))
        train_step(engine, micro_batches, NTXent(0.1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_views_of_a_step_come_back_from_the_host_in_order_and_take_no_more_memory_when_there_are_more() -> None:
    """The stream is kept busy, so that the host runs ahead and every missing wait would show."""
    device = torch.device("cuda", 0)
    held = []
    for count in (3, 24):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        micro_batches = MicroBatches(device, count)
        seen, expected = [], []
        for step in range(3):
            torch.cuda._sleep(20_000_000)
            micro_batches.begin(torch.full((1 << 20,), float(step * count + n), device=device) for n in range(count))
            for _ in range(3):
                for number, views in enumerate(micro_batches):
                    torch.cuda._sleep(2_000_000)
                    seen.append(views.mean())
                    expected.append(float(step * count + number))
        held.append(torch.cuda.memory_stats()["active_bytes.all.peak"])
        assert torch.stack(seen).tolist() == expected
        del micro_batches
    assert held[1] <= 1.5 * held[0]


def test_a_slow_consumer_that_drops_its_batches_gets_the_right_ones(train_split: ShardSet) -> None:
    expected = [batch.views.mean().item() for batch in views_of(train_split, GPU)]
    order = Order(train_split.shard_sizes(), 24, 4, 2, 9)
    means = []
    for batch in two_views(train_split, order, Recipe(), GPU, epochs=2):
        torch.cuda._sleep(20_000_000)
        means.append(batch.views.mean())
        del batch
    assert torch.stack(means).tolist() == expected


@pytest.mark.launch
@pytest.mark.parametrize("micro_batch", [16, 4])
def test_the_trainer_runs_and_goes_on_on_the_gpu(micro_batch: int, packed: Path, tmp_path: Path) -> None:
    words = ["--config", tiny_config(tmp_path), "--data", packed, "--run", tmp_path / "run"]
    settings = ["--set", "torch_autocast.enabled=true", "--set", f"train_micro_batch_size_per_gpu={micro_batch}"]
    for more in (["--stop-after-steps", 7], []):
        done = run_python(ROOT / "train/pretrain.py", *words, *settings, *more, env=ON_GPU)
        assert done.returncode == 0, done.stderr
    assert "1 x cuda" in done.stdout
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(30))


@pytest.mark.launch
def test_a_deterministic_run_on_the_gpu_resumes_to_the_bit(packed: Path, tmp_path: Path) -> None:
    """Compiled, in bfloat16, with a check of nearest neighbours between; and once uncompiled."""
    config = tiny_config(tmp_path)
    for compile in ("auto", "no"):
        settings = ["simclr.deterministic=true", "torch_autocast.enabled=true", f"simclr.compile={compile}"]
        settings += ["simclr.knn_every_epochs=1", f"simclr.cache={tmp_path / 'cache'}"]
        words = ["--config", config, "--data", packed, *(word for value in settings for word in ("--set", value))]
        for run, steps in (("stopped", 7), ("stopped", 13), ("whole", 20)):
            more = ["--run", tmp_path / f"{run}-{compile}", "--stop-after-steps", steps]
            done = run_python(ROOT / "train/pretrain.py", *words, *more, env=ON_GPU)
            assert done.returncode == 0, done.stderr
            assert ("compiled in" in done.stdout) == (compile == "auto")
        runs = [metrics(tmp_path / f"{run}-{compile}") for run in ("stopped", "whole")]
        assert runs[0] == runs[1] and len(runs[0]) == 20


@pytest.mark.launch
def test_a_compiled_run_on_the_gpu_begins_as_the_plain_one(packed: Path, tmp_path: Path) -> None:
    words = ["--config", tiny_config(tmp_path), "--data", packed, "--stop-after-steps", 4]
    losses = []
    for compile in ("auto", "no"):
        more = ["--run", tmp_path / compile, "--set", f"simclr.compile={compile}"]
        done = run_python(ROOT / "train/pretrain.py", *words, *more, env=ON_GPU)
        assert done.returncode == 0 and "without compiling" not in done.stderr, done.stderr
        losses.append([line["loss"] for line in metrics(tmp_path / compile)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # TF32 convolutions of either


def test_probes_on_the_gpu_find_what_the_cpu_finds() -> None:
    features, labels = problem(600)
    queries, truth = problem(90)
    found = {}
    for device in ("cpu", "cuda"):
        x, y, asked, true = (part.to(device) for part in (features, labels, queries, truth))
        layer = fit_linear(x, y, 4, 1e-2).layer
        swept = sweep(x, y, np.arange(600), 4, [Point(1e-6, 0.0), Point(0.1, 1e-3)], epochs=5)
        assert layer.weight.device.type == swept.layer.weight.device.type == device and swept.chosen.lr == 0.1
        found[device] = (
            score(layer, asked, true),
            accuracies(x, y, asked, true, 4, [1, 20], 0.1),
            layer(asked).detach().cpu(),
            swept.layer(asked).detach().cpu(),
        )
    assert abs(found["cpu"][0].top1 - found["cuda"][0].top1) < 2.5
    for k, (top1, _) in found["cpu"][1].items():
        assert abs(top1 - found["cuda"][1][k][0]) < 2.5
    for ours, expected in zip(found["cuda"][2:], found["cpu"][2:], strict=True):
        assert torch.allclose(ours, expected, rtol=0.05, atol=0.05)


def test_evaluations_on_the_gpu(packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--config", tiny_config(tmp_path), "--data", packed, "--run", run, "--set", "simclr.knn_every_epochs=1"]
    assert run_python(ROOT / "train/pretrain.py", *words, env=ON_GPU).returncode == 0 and (run / "knn.jsonl").is_file()
    commands: list[tuple[str, list[Any]]] = [
        ("linear", []),
        ("linear", ["--protocol", "sweep"]),
        ("linear", ["--protocol", "google-sgd-90e", "--train-batch", 16, "--epochs", 2]),
        ("knn", ["--k", 5]),
        ("finetune", ["--fraction", 0.2, "--train-batch", 16, "--epochs", 2]),
    ]
    for script, options in commands:
        done = run_python(ROOT / f"eval/{script}.py", "--ckpt", run, *options, env=ON_GPU)
        assert done.returncode == 0, done.stderr
    for model in ("linear.pt", "finetune-0.2.pt"):
        pictures = sorted(packed.with_name("set").rglob("val/*/*"))[:3]
        assert run_python(ROOT / "eval/predict.py", "--ckpt", run / model, *pictures, env=ON_GPU).returncode == 0
