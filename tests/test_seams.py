"""Where the trainer grows: another loss, another encoder, each without a change elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simclr_dali.model.encoder import Encoder
from simclr_dali.model.lars import parameter_groups
from simclr_dali.model.process import Process
from simclr_dali.model.resnet import ResNet
from simclr_dali.model.simclr import Architecture, build_model, describe
from simclr_dali.pipeline.draws import Recipe
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.order import Order
from simclr_dali.shards.manifest import ShardSet
from simclr_dali.train.metrics import Reporter
from simclr_dali.train.step import StepResult, train_step
from tests.conftest import ROOT, run_python
from tests.loaders import two_views
from tests.runs import TINY, metrics
from tests.test_step import PlainEngine, model_with_fixed_statistics
from tests.vit import TinyViT


def barlow_twins(z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Zbontar et al. 2021: the cross-correlation of the two views of a batch becomes the identity."""
    first, second = ((view - view.mean(0)) / (view.std(0) + 1e-4) for view in z.chunk(2))
    correlation = first.T @ second / len(first)
    on_diagonal = (correlation.diagonal() - 1).square().sum()
    off_diagonal = correlation.square().sum() - correlation.diagonal().square().sum()
    return on_diagonal + 0.005 * off_diagonal, {
        "invariance": on_diagonal.detach(),
        "redundancy": off_diagonal.detach(),
    }


def micro_batches(train_split: ShardSet, passes: int) -> list[Tensor]:
    """Views of twelve images of the tiny set."""
    order = Order(train_split.shard_sizes(), 12, 1, 2, 0)
    config = LoaderConfig(32, torch.device("cpu"))
    loader = two_views(train_split, order, Recipe(), config, epochs=1, micro_batch=12 // passes)
    found = [next(loader).views.clone() for _ in range(passes)]
    loader.close()
    return found


@pytest.mark.parametrize("passes", [1, 3])
def test_another_loss_trains_through_the_same_step(passes: int, train_split: ShardSet) -> None:
    model = build_model(Architecture(ResNet("resnet18", 0.25, "7x7"), (16, 8)), 0)
    engine = PlainEngine(model, passes)
    engine.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    parts = micro_batches(train_split, passes)
    results = [train_step(engine, parts, barlow_twins) for _ in range(40)]
    assert results[-1].loss < 0.5 * results[0].loss
    assert set(results[0].metrics) == {"invariance", "redundancy"} and results[0].gradient_norm > 0


def test_passes_change_nothing_of_another_loss(train_split: ShardSet) -> None:
    found = []
    for passes in (1, 3):
        model = model_with_fixed_statistics()
        parts = [part.double() for part in micro_batches(train_split, passes)]
        result = train_step(PlainEngine(model, passes), parts, barlow_twins)
        found.append((result, torch.cat([p.detach().flatten() for p in model.parameters()])))
    (one, alone), (three, together) = found
    assert torch.allclose(one.loss, three.loss, rtol=1e-10)
    assert torch.allclose(one.metrics["redundancy"], three.metrics["redundancy"], rtol=1e-10)
    assert torch.allclose(alone, together, rtol=0, atol=1e-10)


def test_what_a_loss_reports_is_written_by_name_in_any_order(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        process = Process(0, 1, 1, torch.device("cpu"), 1)
        reporter = Reporter(
            tmp_path, process, batch=4, steps_per_epoch=10, total_steps=100, first_step=0, keep_batch=lambda *_: [],
            derived=lambda means: {"both": means["b"] + means["a"], "a": means["a"]},
        )  # fmt: skip
        values = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
        for step, names in enumerate((["a", "b"], ["b", "a"])):
            result = StepResult(torch.tensor(5.0), {name: values[name] for name in names}, torch.tensor(7.0))
            reporter.add(step, 0.1, result)
        reporter.drain(lambda: "none yet")
    finally:
        torch.distributed.destroy_process_group()
    for line in metrics(tmp_path):
        assert (line["loss"], line["both"], line["a"], line["gradient_norm"]) == (5, 3, 1, 7)


def test_tokens_positions_and_norms_are_neither_decayed_nor_adapted() -> None:
    model = build_model(Architecture(TinyViT("tiny_vit", image_size=32), (16, 8)), 0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights, others = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 1e-6))
    assert len(weights) + len(others) == sum(p.requires_grad for p in model.parameters())
    assert {"encoder.vit.class_token", "encoder.vit.encoder.pos_embedding", "encoder.vit.encoder.ln.weight"} <= others
    assert {name.split(".")[-1] for name in weights} == {"weight", "in_proj_weight"}
    assert any("in_proj_weight" in name for name in weights) and "encoder.vit.conv_proj.weight" in weights
    assert all("bias" in name or name in others for name in names.values() if "ln_" in name)


def run_with_vit(script: str, *words: Any) -> str:
    done = run_python("-m", "tests.vit", ROOT / script, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.launch
def test_a_vision_transformer_trains_resumes_is_probed_and_exported(packed: Path, tmp_path: Path) -> None:
    """It is known to one table (tests/vit.py) and to nothing else."""
    encoder = {"name": "tiny_vit", "layers": 1, "projector": [32, 16]}
    config, run = tmp_path / "vit.json", tmp_path / "run"
    config.write_text(json.dumps({**TINY, "simclr": {**TINY["simclr"], "encoder": encoder, "knn_every_epochs": 1}}))
    words = ["--config", config, "--data", packed, "--run", run]
    run_with_vit("train/pretrain.py", *words, "--stop-after-steps", 7)
    assert "going on from step 7" in run_with_vit("train/pretrain.py", *words)
    undisturbed = tmp_path / "undisturbed"
    run_with_vit("train/pretrain.py", *words[:-1], undisturbed)
    assert metrics(run) == metrics(undisturbed) and len(metrics(run)) == 30
    run_with_vit("eval/linear.py", "--ckpt", run)
    result = json.loads((run / "linear.json").read_text())
    assert result["encoder"] == "tiny_vit" and result["val_images"] == 48
    exported = tmp_path / "encoder.safetensors"
    run_with_vit("eval/export.py", "--ckpt", run, "--format", "safetensors", "--out", exported)
    assert "48 images" in run_with_vit("eval/linear.py", "--ckpt", exported, "--data", packed, "--out", tmp_path)
    words = ["--ckpt", run, "--format", "timm", "--out", tmp_path / "timm.safetensors"]
    refused = run_python("-m", "tests.vit", ROOT / "eval/export.py", *words)
    assert refused.returncode == 2 and "timm has no tiny_vit" in refused.stderr


def test_an_encoder_that_nobody_described_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'vit_huge'.*resnet50"):
        describe("vit_huge", {})
    with pytest.raises(NotImplementedError):
        _ = Encoder().width
