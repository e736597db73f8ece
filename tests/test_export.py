"""Exports, read by the programs they are for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from simclr_dali import load
from simclr_dali.eval.export import export
from simclr_dali.eval.export_formats import FORMATS
from simclr_dali.model.classifier import Classifier, save_classifier
from simclr_dali.model.pretrained import Pretrained, open_pretrained
from simclr_dali.model.resnet import ResNet
from simclr_dali.model.simclr import Architecture
from simclr_dali.model.vision import torchvision
from simclr_dali.shards.errors import UserError
from tests.conftest import ROOT, assert_sentence, run_python
from tests.test_foreign import settled

IMAGES = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def source(tmp_path: Path, name: str = "resnet50", head: int = 0, **other: Any) -> Pretrained:
    """An encoder as another library would save it, or a classifier of ours on top of it."""
    architecture = Architecture(ResNet(name, other.get("width", 1.0), other.get("stem", "7x7"), other.get("sk", False)))
    encoder = settled(architecture.encoder.build())
    if not head:
        torch.save(encoder.state_dict(), tmp_path / "source.pth")
        return open_pretrained(tmp_path / "source.pth")
    classes = tuple(f"class {number}" for number in range(head))
    linear = nn.Linear(encoder.width, head).requires_grad_(False)
    save_classifier(
        tmp_path / "linear.pt", Classifier(encoder, architecture, linear, classes, 64, 0.875, "bilinear", {})
    )
    return open_pretrained(tmp_path / "linear.pt")


def close(found: Any, expected: Tensor) -> bool:
    values = torch.as_tensor(np.asarray(found.detach() if isinstance(found, Tensor) else found))
    return bool((values - expected).abs().max() < 1e-4 * expected.abs().max())


@torch.no_grad()
def test_torchvision_misses_its_classifier_alone(tmp_path: Path) -> None:
    of = source(tmp_path)
    export(of, "torchvision", tmp_path / "out.pth", 64)
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    model = torchvision.models.resnet50()
    missed = model.load_state_dict(state, strict=False)
    assert set(missed.missing_keys) == {"fc.weight", "fc.bias"} and not missed.unexpected_keys
    model.fc = nn.Identity()
    assert close(model.eval()(IMAGES), of.encoder(IMAGES))


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_timm_loads_it_strictly(name: str, tmp_path: Path) -> None:
    of = source(tmp_path, name)
    out = tmp_path / "encoder.safetensors"
    export(of, "timm", out, 64)
    assert close(timm.create_model(name, num_classes=0, checkpoint_path=str(out)).eval()(IMAGES), of.encoder(IMAGES))
    # Strictly: one key less is an error.
    state = safetensors.torch.load_file(out)
    state.pop("layer3.0.bn2.bias")
    safetensors.torch.save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(RuntimeError, match=r"layer3\.0\.bn2\.bias"):
        timm.create_model(name, num_classes=0, checkpoint_path=str(tmp_path / "less.safetensors"))


@torch.no_grad()
@pytest.mark.parametrize("head", [0, 7])
def test_onnxruntime_computes_the_same(head: int, tmp_path: Path) -> None:
    of = source(tmp_path, "resnet18", head)
    export(of, "onnx", tmp_path / "out.onnx", 64)
    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 5):
        found = session.run(None, {"images": IMAGES[:count].numpy()})
        assert close(found[0], of.encoder(IMAGES[:count]))
        if of.classifier:
            assert close(found[1], of.classifier.scores(IMAGES[:count])) and found[1].shape == (count, 7)
    assert [output.name for output in session.get_outputs()] == ["features", "scores"][: 2 if head else 1]


@torch.no_grad()
def test_pt2_takes_any_number_of_images(tmp_path: Path) -> None:
    of = source(tmp_path, "resnet18", sk=False, width=0.5, stem="3x3")
    export(of, "pt2", tmp_path / "out.pt2", 32)
    module = torch.export.load(tmp_path / "out.pt2").module()
    for count in (1, 5):
        images = IMAGES[:count, :, :32, :32]
        assert close(module(images), of.encoder(images))


@torch.no_grad()
@pytest.mark.parametrize("head", [0, 7])
def test_a_hub_folder_is_read_by_timm_and_by_us(head: int, tmp_path: Path) -> None:
    of = source(tmp_path, "resnet18", head)
    export(of, "hub", tmp_path / "hub", 64)
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    expected = of.classifier.scores(IMAGES) if of.classifier else of.encoder(IMAGES)
    assert close(model(IMAGES), expected) and model.num_classes == head
    assert list(model.pretrained_cfg["input_size"]) == [3, 64, 64]
    assert close(load(tmp_path / "hub")(IMAGES), of.encoder(IMAGES))
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


@torch.no_grad()
def test_what_only_we_have_comes_back_whole(tmp_path: Path) -> None:
    of = source(tmp_path, "resnet50", sk=True, width=0.25)
    of.encoder.unit_range = True
    export(of, "safetensors", tmp_path / "out.safetensors", 64)
    again = open_pretrained(tmp_path / "out.safetensors")
    assert again.encoder.unit_range and again.architecture == of.architecture and again.image_size == 64
    assert close(again.encoder(IMAGES), of.encoder(IMAGES))
    for name in ("torchvision", "timm"):
        with pytest.raises(UserError, match=r"width 0\.25 and selective kernels and images in 0\.\.1"):
            export(of, name, tmp_path / "other.pth", 64)
    assert not (tmp_path / "other.pth").exists() and not list(tmp_path.glob("partial-*"))


def test_what_reads_back_differently_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = source(tmp_path, "resnet18")
    right = FORMATS["safetensors"]
    monkeypatch.setitem(
        FORMATS, "safetensors", lambda *words: {name: 1.001 * value for name, value in right(*words).items()}
    )
    with pytest.raises(UserError, match="differs by 1"):
        export(of, "safetensors", tmp_path / "out.safetensors", 64)
    of.encoder.bn1.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="differs by nan"):
        export(of, "safetensors", tmp_path / "out.safetensors", 64)
    assert not (tmp_path / "out.safetensors").exists() and not list(tmp_path.glob("partial-*"))


@pytest.mark.launch
def test_the_card_of_a_run_says_how_it_was_made(run: Path, tmp_path: Path) -> None:
    assert run_python(ROOT / "eval/knn.py", "--ckpt", run, "--k", 5).returncode == 0
    command = [ROOT / "eval/export.py", "--ckpt", run, "--format", "hub", "--out", tmp_path / "hub"]
    done = run_python(*command)
    assert done.returncode == 0, done.stderr
    # What another encoder scored is not this one's, and what is no result is passed over.
    (run / "linear-notes.json").write_text("[")
    (run / "linear.json").write_text(json.dumps({**json.loads((run / "knn.json").read_text()), "protocol": "other",
                                                 "encoder_sha256": "0"}))  # fmt: skip
    (run / "linear-list.json").write_text("[]")
    # Fine-tunings of it are, unless they were set aside with a number.
    tuned = {key: value for key, value in json.loads((run / "knn.json").read_text()).items() if key != "k5"}
    tuned |= json.loads((run / "knn.json").read_text())["k5"]
    for name, top1 in (("finetune-0.1", 91.25), ("finetune-0.1.1", 92.25), ("finetune-0.01", 93.25)):
        protocol = "finetune-0.01" if name == "finetune-0.01" else "finetune-0.1"
        (run / f"{name}.json").write_text(json.dumps({**tuned, "protocol": protocol, "top1": top1}))
    done = run_python(*command[:-1], tmp_path / "again")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "again/README.md").read_text()
    assert "| other" not in card and "| finetune-0.1 | 91.25 %" in card and "| finetune-0.01 | 93.25 %" in card
    assert "92.25" not in card
    start = run_python(*command[:-1], tmp_path / "start", "--untrained")
    assert start.returncode == 0, start.stderr
    card = (tmp_path / "start/README.md").read_text()
    assert "None was measured" in card and "weights that a run began with" in card
    card = (tmp_path / "hub/README.md").read_text()
    top1 = json.loads((run / "knn.json").read_text())["k5"]["top1"]
    for word in ("8, global batch 16", "trust_coefficient 0.02", "32-16", f"| kNN, k 5 | {top1:.2f} %", "x0.125"):
        assert word in card, word
    assert_sentence(run_python(*command), "exists already")
    words = ["--ckpt", run, "--format", "timm", "--out"]
    assert_sentence(run_python(ROOT / "eval/export.py", *words, tmp_path / "a.safetensors"), "width 0.125")
    assert_sentence(run_python(ROOT / "eval/export.py", *words, tmp_path / "a.pth"), ".safetensors")
