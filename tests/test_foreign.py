"""Weights of other libraries: found by their keys, whole, and computing what they computed there."""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightly.models
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor, nn

from simclr_dali import load
from simclr_dali.model.checkpoint import CheckpointError
from simclr_dali.model.pretrained import fingerprint, open_pretrained
from simclr_dali.model.resnet import ResNet
from simclr_dali.model.simclr import Architecture
from simclr_dali.model.vision import torchvision
from tests.conftest import ROOT, assert_sentence, run_python

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def settled(model: Any) -> Any:
    """In eval mode, with statistics and scales that no fresh network has, so that a mixed-up layer shows."""
    generator = torch.Generator().manual_seed(1)
    for value in model.state_dict().values():
        if value.is_floating_point() and value.dim() == 1:
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return model.eval()


def torchvision_resnet(name: str = "resnet18") -> Any:
    model = settled(getattr(torchvision.models, name)())
    model.fc = nn.Identity()
    return model


def prefixed(model: nn.Module, prefix: str, **others: Any) -> dict[str, Any]:
    return {**{prefix + key: value for key, value in model.state_dict().items()}, **others}


def mmpretrain(model: nn.Module) -> Any:
    """docs/en/user_guides/downstream.md and the keys of SimCLR's neck (models/necks/nonlinear_neck.py)."""
    neck = {
        "neck.fc0.weight": torch.zeros(512, 512),
        "neck.bn0.weight": torch.ones(512),
        "neck.fc1.weight": torch.zeros(8, 512),
    }
    return {"meta": {"epoch": 200, "mmengine_version": "0.10"}, "state_dict": {**prefixed(model, "backbone."), **neck}}


def vissl(model: nn.Module) -> Any:
    """extra_scripts/convert_vissl_to_torchvision.py."""
    trunk = prefixed(model, "_feature_blocks.")
    heads = {"0.clf.0.weight": torch.zeros(128, 512), "0.clf.0.bias": torch.zeros(128)}
    return {
        "phase_idx": 3,
        "iteration": 7,
        "classy_state_dict": {"train": True, "base_model": {"model": {"trunk": trunk, "heads": heads}}},
    }


def moco(model: nn.Module) -> Any:
    """facebookresearch/moco, main_moco.py: the encoder beside its moving average."""
    average = {key: value + 1 for key, value in prefixed(model, "module.encoder_k.").items()}
    queue = {"module.queue": torch.zeros(128, 16), "module.encoder_q.fc.0.weight": torch.zeros(128, 512)}
    return {"epoch": 9, "arch": "resnet18", "state_dict": {**average, **prefixed(model, "module.encoder_q."), **queue}}


def moco_v3(model: nn.Module) -> Any:
    average = {key: value + 1 for key, value in prefixed(model, "module.momentum_encoder.").items()}
    return {"state_dict": {**prefixed(model, "module.base_encoder."), **average}}


def mmpretrain_moco(model: nn.Module) -> Any:
    """models/selfsup/moco.py: the average of backbone and neck together, as a nn.Sequential."""
    average = {key: value + 1 for key, value in prefixed(model, "encoder_k.module.0.").items()}
    neck = {"neck.fc0.weight": torch.zeros(512, 512), "encoder_k.module.1.fc0.weight": torch.zeros(512, 512)}
    return {"state_dict": {**average, **prefixed(model, "backbone."), **neck, "queue": torch.zeros(128, 16)}}


def older_solo_learn(model: nn.Module) -> Any:
    average = {key: value + 1 for key, value in prefixed(model, "momentum_encoder.").items()}
    heads = {"projector.0.weight": torch.zeros(8, 512), "classifier.weight": torch.zeros(10, 512)}
    return {"state_dict": {**average, **prefixed(model, "encoder."), **heads}}


def solo_learn(model: nn.Module) -> Any:
    """solo/methods/base.py under Lightning, with hyper-parameters of a class that only it has."""
    state = prefixed(
        model, "backbone.", **{"projector.0.weight": torch.zeros(8, 512), "classifier.weight": torch.zeros(10, 512)}
    )
    return {"state_dict": state, "hyper_parameters": argparse.Namespace(lr=0.3), "epoch": 3, "loss": np.float64(0.3)}


def lightly_sequential(model: nn.Module) -> Any:
    """The SimCLR example of lightly's documentation."""

    class SimCLR(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(*list(model.children())[:-1])
            self.projection_head = SimCLRProjectionHead(512, 512, 128)

    return SimCLR().state_dict()


def lightly_benchmark(model: nn.Module) -> Any:
    """benchmarks/imagenet/resnet50/simclr.py."""
    projector = SimCLRProjectionHead(512, 512, 128).state_dict()
    return {"state_dict": {**prefixed(model, "backbone."), **{f"projection_head.{k}": v for k, v in projector.items()}}}


def compiled_ddp(model: nn.Module) -> Any:
    return {"model": prefixed(model, "module._orig_mod.")}


def plain(model: nn.Module) -> Any:
    return model.state_dict()


LAYOUTS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "torchvision": (plain, "torchvision"),
    "mmpretrain": (mmpretrain, "mmpretrain"),
    "mmpretrain, MoCo": (mmpretrain_moco, "mmpretrain"),
    "VISSL": (vissl, "VISSL"),
    "moco": (moco, "moco"),
    "moco-v3": (moco_v3, "moco"),
    "solo-learn": (solo_learn, "solo-learn"),
    "solo-learn, older": (older_solo_learn, "solo-learn"),
    "lightly, Sequential": (lightly_sequential, "lightly"),
    "lightly, benchmark": (lightly_benchmark, "lightly"),
    "compiled and wrapped": (compiled_ddp, "torchvision"),
}


def same_features(encoder: nn.Module, expected: Tensor, images: Tensor = IMAGES) -> bool:
    with torch.no_grad():
        return bool((encoder(images) - expected).abs().max() < 1e-4 * expected.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_encoder_that_was_saved(layout: str, tmp_path: Path) -> None:
    save, name = LAYOUTS[layout]
    model = torchvision_resnet()
    torch.save(save(copy.deepcopy(model)), tmp_path / "weights.pth")
    found = open_pretrained(tmp_path / "weights.pth")
    assert found.layout == name and not found.encoder.training
    assert found.architecture == Architecture(ResNet("resnet18", 1.0, "7x7"))
    with torch.no_grad():
        assert torch.equal(found.encoder(IMAGES), model(IMAGES))
    assert found.left_out or layout in ("torchvision", "compiled and wrapped")
    others = {"queue", "projector", "neck", "heads", "projection_head", "classifier", "encoder_k", "momentum_encoder"}
    assert all(others & set(key.split(".")) or ".fc." in key for key in found.left_out)


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet101", "resnet152"])
def test_depths_are_told_by_the_keys(name: str, tmp_path: Path) -> None:
    model = getattr(torchvision.models, name)()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    found = open_pretrained(tmp_path / "weights.safetensors")
    assert found.architecture.encoder.name == name and set(found.left_out) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_timm_computes_the_same(name: str, tmp_path: Path) -> None:
    model = settled(timm.create_model(name))
    torch.save({"state_dict": model.state_dict(), "arch": name}, tmp_path / "timm.pth.tar")
    model.reset_classifier(0)
    with torch.no_grad():
        assert same_features(load(tmp_path / "timm.pth.tar"), model(IMAGES))


@pytest.mark.parametrize(("name", "ours"), [("resnet-18", "resnet18"), ("resnet-50", "resnet50")])
@pytest.mark.parametrize("sequential", [False, True])
def test_lightlys_own_resnet_with_the_small_stem(name: str, ours: str, sequential: bool, tmp_path: Path) -> None:
    model = settled(lightly.models.ResNetGenerator(name))
    pooled = nn.Sequential(*list(model.children())[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.save(prefixed(pooled if sequential else model, "backbone."), tmp_path / "lightly.ckpt")
    found = open_pretrained(tmp_path / "lightly.ckpt")
    assert found.architecture.encoder == ResNet(ours, 1.0, "3x3")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # As a nn.Sequential of its children the network has no ReLU after the first BatchNorm.
        expected = pooled(images) if sequential else pooled[2:](model.bn1(model.conv1(images)).relu())
        assert same_features(found.encoder, expected, images)
    assert found.encoder.stem_relu is not sequential


def test_solo_learns_small_stem_has_its_padding(tmp_path: Path) -> None:
    """solo-learn's CIFAR networks: the weights alone do not show it."""
    model = torchvision_resnet()
    model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=2, bias=False)
    model.maxpool = nn.Identity()
    torch.save(solo_learn(model), tmp_path / "solo.ckpt")
    found = open_pretrained(tmp_path / "solo.ckpt")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert found.architecture.encoder == ResNet("resnet18", 1.0, "3x3") and same_features(
            found.encoder, model(images), images
        )
        # Somebody else's network with the same keys; and weights of another stem have no such choice.
        model.conv1.padding = (1, 1)
        assert same_features(load(tmp_path / "solo.ckpt", stem_padding=1), model(images), images)
    torch.save(torchvision_resnet().state_dict(), tmp_path / "seven.pth")
    with pytest.raises(CheckpointError, match="7x7 stem"):
        load(tmp_path / "seven.pth", stem_padding=1)
    # DINO has a projector of another name; what its linear evaluation writes could be anybody's.
    model.conv1.padding = (2, 2)
    head, classifier = {"head.mlp.0.weight": torch.zeros(8, 512)}, {"classifier.weight": torch.zeros(10, 512)}
    average = {f"momentum_{key}": value + 1 for key, value in prefixed(model, "backbone.").items()}
    torch.save(
        {"state_dict": {**prefixed(model, "backbone."), **average, **head, **classifier}}, tmp_path / "dino.ckpt"
    )
    torch.save({"state_dict": {**prefixed(model, "backbone."), **classifier}}, tmp_path / "linear.ckpt")
    with torch.no_grad():
        assert same_features(load(tmp_path / "dino.ckpt"), model(images), images)
        with pytest.raises(CheckpointError, match="--stem-padding"):
            load(tmp_path / "linear.ckpt")
        assert same_features(load(tmp_path / "linear.ckpt", stem_padding=2), model(images), images)
    model.conv1 = nn.Conv2d(3, 64, 5, padding=2, bias=False)
    torch.save(solo_learn(model), tmp_path / "solo.ckpt")
    with pytest.raises(CheckpointError, match="convolution of 5 pixels"):
        load(tmp_path / "solo.ckpt")


@pytest.mark.parametrize(("selective", "width"), [(False, 1.0), (False, 2.0), (True, 1.0)])
def test_google_converted_weights(selective: bool, width: float, tmp_path: Path) -> None:
    """The keys of Separius/SimCLRv2-Pytorch, whose modules stand in the order in which ours are computed."""
    encoder = settled(ResNet("resnet50", width, "7x7", selective).build())
    google = {_google_key(key, selective): value for key, value in encoder.state_dict().items()}
    google |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    torch.save({"resnet": google, "head": {"layers.0.weight": torch.zeros(2, 2)}}, tmp_path / "r50.pth")
    found = open_pretrained(tmp_path / "r50.pth")
    assert found.layout == "google" and found.encoder.unit_range
    assert found.architecture == Architecture(ResNet("resnet50", width, "7x7", selective))
    assert fingerprint(found.encoder) == fingerprint(encoder)
    # Its inputs are in 0..1; ours come normalised, and are brought there.
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    levels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = encoder(levels / 255)
        assert same_features(found.encoder, expected, (levels / 255 - mean) / std)
        assert same_features(found.encoder, expected, levels)
    assert open_pretrained(tmp_path / "r50.pth", unit_range=False).encoder.unit_range is False


def _google_key(key: str, selective: bool) -> str:
    from simclr_dali.model.foreign import GOOGLE_BLOCK, GOOGLE_BLOCK_SK, GOOGLE_STEM, GOOGLE_STEM_SK

    stem = {ours: theirs for theirs, ours in (GOOGLE_STEM_SK if selective else GOOGLE_STEM).items()}
    block = {ours: theirs for theirs, ours in (GOOGLE_BLOCK_SK if selective else GOOGLE_BLOCK).items()}
    module, _, kind = key.rpartition(".")
    if module in stem:
        return f"net.0.{stem[module]}.{kind}"
    stage, number, rest = module.removeprefix("layer").split(".", 2)
    return f"net.{stage}.blocks.{number}.{block[rest]}.{kind}"


def broken(case: str, state: dict[str, Any]) -> dict[str, Any]:
    """A state_dict of torchvision's resnet18 with a fault, as it may be met."""
    if case == "stage missing":
        return {key: value for key, value in state.items() if not key.startswith("layer4")}
    if case == "key missing":
        return {key: value for key, value in state.items() if key != "layer3.1.bn2.running_var"}
    if case == "key too many":
        return {**state, "layer2.0.se.weight": torch.zeros(3)}
    if case == "other shape":
        return {**state, "layer4.0.conv1.weight": torch.zeros(512, 128, 3, 3)}
    if case == "two encoders":
        return {"state_dict": state, "state_dict_ema": {key: value + 0 for key, value in state.items()}}
    if case == "another network":
        return {"patch_embed.proj.weight": torch.zeros(3), "blocks.0.attn.qkv.weight": torch.zeros(3)}
    return {"epoch": 3}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("stage missing", ["[2, 2, 2, 0]", "conv1.weight"]),
        ("key missing", ["in part", "layer3.1.bn2.running_var"]),
        ("key too many", ["has besides", "layer2.0.se.weight"]),
        ("other shape", ["other shapes", "layer4.0.conv1.weight"]),
        ("two encoders", ["'state_dict.'", "'state_dict_ema.'", "prefix"]),
        ("another network", ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight"]),
        ("no tensors", ["no tensors"]),
    ],
)
def test_what_is_not_one_whole_encoder_is_refused_with_its_keys(case: str, words: list[str], tmp_path: Path) -> None:
    torch.save(broken(case, torchvision_resnet().state_dict()), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError) as raised:
        load(tmp_path / "weights.pth")
    assert all(word in str(raised.value) for word in ["weights.pth", *words]), raised.value


def test_a_prefix_chooses_among_several(tmp_path: Path) -> None:
    model = torchvision_resnet()
    torch.save(broken("two encoders", model.state_dict()), tmp_path / "weights.pth")
    with torch.no_grad():
        assert same_features(load(tmp_path / "weights.pth", prefix="state_dict_ema."), model(IMAGES))
        assert same_features(load(tmp_path / "weights.pth", prefix="state_dict"), model(IMAGES))
    with pytest.raises(CheckpointError, match=r"under 'teacher'; choose one of 'state_dict\.', 'state_dict_ema\.'"):
        load(tmp_path / "weights.pth", prefix="teacher")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_bytes_are_taken_in_any_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.save(torchvision_resnet().state_dict(), tmp_path / "weights.pth")
    encoder = load(tmp_path / "weights.pth")
    levels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = encoder(levels)
        found = encoder.to(dtype)(levels)
    assert found.dtype == dtype and torch.allclose(found.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.launch
def test_an_evaluation_of_foreign_weights(packed: Path, tmp_path: Path) -> None:
    torch.save(mmpretrain(torchvision_resnet()), tmp_path / "mm.pth")
    words = ["--ckpt", tmp_path / "mm.pth", "--image-size", 32, "--k", 5]
    assert_sentence(run_python(ROOT / "eval/knn.py", *words), "mm.pth", "--data")
    assert_sentence(run_python(ROOT / "eval/knn.py", *words, "--data", packed, "--untrained"), "--untrained")
    done = run_python(ROOT / "eval/knn.py", *words, "--data", packed)
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "knn.json").read_text())
    assert first["layout"] == "mmpretrain" and first["data"] == str(packed)
    # A second file beside it: the first result gets a number and stays. Again the same: it is replaced.
    torch.save(moco(torchvision_resnet("resnet34")), tmp_path / "moco.pth")
    words[1] = tmp_path / "moco.pth"
    for _ in range(2):
        assert run_python(ROOT / "eval/knn.py", *words, "--data", packed).returncode == 0
    assert json.loads((tmp_path / "knn.1.json").read_text()) == first
    assert json.loads((tmp_path / "knn.json").read_text())["layout"] == "moco"
    assert not (tmp_path / "knn.2.json").exists()
    broken_weights = {key: value * float("nan") for key, value in torchvision_resnet().state_dict().items()}
    torch.save(broken_weights, tmp_path / "moco.pth")
    assert_sentence(run_python(ROOT / "eval/knn.py", *words, "--data", packed), "240 of 240 images", "not finite")
