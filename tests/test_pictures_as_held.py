"""load and predict on pictures as programs hold them: the views are those of an evaluation."""

import copy
import pickle
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors
import safetensors.torch
import torch

from scripts.draw_pictures import draw_picture
from simclr_dali import load, predict
from simclr_dali.eval.inference import Prediction, open_classifier
from simclr_dali.model.checkpoint import CheckpointError
from simclr_dali.model.vision import imagenet_classes, torchvision
from simclr_dali.pipeline.features import extract
from simclr_dali.pipeline.files import Split
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.subset import keys
from simclr_dali.shards.errors import UserError
from tests.conftest import ROOT, run_python

SETTING = LoaderConfig(32, torch.device("cpu"))


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torchvision file with a classifier of 1,000 classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


@torch.no_grad()
def test_files_are_embedded_as_their_packed_pictures_are(run: Path, packed: Path, pictures: Path) -> None:
    encoder = load(run)
    split = Split.local(packed, "val")
    expected = extract(encoder, split, SETTING, batch=48).features
    labels = split.shards.samples["label"]
    rows = {
        (split.shards.classes[label], key.partition("_")[2]): row
        for row, (label, key) in enumerate(zip(labels, keys(split), strict=True))
    }
    files = sorted(path for path in (pictures / "val").rglob("*") if path.is_file())
    order = [rows[path.parent.name, path.stem] for path in files]
    for given in (pictures / "val", str(pictures / "val"), files, iter(files)):
        assert torch.allclose(encoder(given), expected[order], atol=1e-5)


@torch.no_grad()
def test_a_picture_may_be_held_in_many_ways(run: Path, tmp_path: Path) -> None:
    encoder = load(run)
    image = draw_picture("spiral", np.random.default_rng(0), (90, 61))
    image.save(tmp_path / "a.png")
    pixels = np.asarray(image)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    of_file = encoder(tmp_path / "a.png")
    assert of_file.shape == (1, encoder.width)
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=turned)
    for given in (
        image, pixels, tensor, [pixels], pixels[None], [tensor], (image,), image.convert("RGBA"),
        PIL.Image.open(tmp_path / "turned.png"), str(tmp_path / "a.png"),
    ):  # fmt: skip
        assert torch.allclose(encoder(given), of_file, atol=1e-5), type(given)
    gray = image.convert("L")
    level = np.asarray(gray)
    for given in (level, level[:, :, None], torch.from_numpy(level.copy()), torch.from_numpy(level.copy())[None]):
        assert torch.allclose(encoder(given), encoder(gray), atol=1e-5)
    # Each of its own size, in the order given; a batch of floats, or of bytes, is taken as it is.
    several = encoder([image, gray.resize((40, 200)), tmp_path / "a.png"])
    assert torch.allclose(several[0], several[2], atol=1e-5) and not torch.allclose(several[0], several[1])
    views = encoder.views([image, image])
    assert views.shape == (2, 3, 32, 32) and torch.equal(encoder(views), several[[0, 2]])
    assert encoder(torch.zeros(2, 3, 90, 61, dtype=torch.uint8)).shape == (2, encoder.width)
    assert encoder.views(torch.zeros(2, 3, 90, 61, dtype=torch.uint8)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nowhere.jpg", ["nowhere.jpg", "does not exist"]),
        ([], ["no picture"]),
        (3, ["int"]),
        ({"a": 1}, ["dict"]),
        ([b"jpeg"], ["picture 0", "bytes"]),
        (torch.zeros(3, 8, 8), ["float32", "[3, 8, 8]", "uint8"]),
        (np.zeros((8, 8, 4), np.uint8), ["[8, 8, 4]", "[h, w, 3]"]),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), ["[8, 8, 3]", "[3, h, w]"]),
        (np.zeros((0, 8, 3), np.uint8), ["[0, 8, 3]"]),
        ([np.zeros((8, 8), np.uint8), PIL.Image.new("F", (8, 8), 0.5)], ["1 of 2", "picture 1", "floating"]),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_one_sentence(given: object, words: list[str], run: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(run)(given)
    assert all(word in str(caught.value) for word in words), caught.value


def test_damaged_pictures_are_named_all_at_once(run: Path, tmp_path: Path) -> None:
    draw_picture("spiral", np.random.default_rng(0), (90, 61)).save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:700])
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(UserError, match=r"2 of 3.*cut\.jpg.*text\.jpg"):
        load(run)([tmp_path / name for name in ("good.jpg", "cut.jpg", "text.jpg")])
    opened = PIL.Image.open(tmp_path / "cut.jpg")
    with pytest.raises(UserError, match="picture 0 cannot be read"):
        load(run)(opened)


@torch.no_grad()
def test_a_loaded_encoder_is_a_module_like_any_other(run: Path) -> None:
    encoder = load(run)
    image = draw_picture("spiral", np.random.default_rng(0), (90, 61))
    expected, batch = encoder(image), torch.zeros(2, 3, 32, 32)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        other.conv1.weight.mul_(2)
        assert torch.equal(encoder(image), expected) and not torch.equal(other(image), expected)
    half = copy.deepcopy(encoder).to(torch.bfloat16)
    assert half(image).dtype == torch.bfloat16
    exported = torch.export.export(encoder, (batch,)).module()
    assert torch.allclose(exported(batch), encoder(batch), atol=1e-6)
    compiled = torch.compile(encoder, backend="eager")
    assert torch.allclose(compiled(batch), encoder(batch), atol=1e-6)


@torch.no_grad()
def test_the_classifier_of_a_torchvision_file_predicts(resnet18: Path, tmp_path: Path) -> None:
    image = draw_picture("spiral", np.random.default_rng(0), (300, 260))
    image.save(tmp_path / "bird.png")
    found = predict(resnet18, tmp_path / "bird.png")
    model = torchvision.models.resnet18()
    model.load_state_dict(torch.load(resnet18, weights_only=True))
    scores = model.eval()(load(resnet18).views(image)).softmax(1)[0]
    assert isinstance(found, Prediction) and len(found.best) == 5
    assert found.label == int(scores.argmax()) and found.score == pytest.approx(float(scores.max()), rel=1e-4)
    assert found.name == imagenet_classes()[found.label] and imagenet_classes()[:2] == ("tench", "goldfish")
    several = predict(resnet18, [image, tmp_path / "bird.png"], top=1000)
    assert [one.label for one in several] == [found.label] * 2
    assert sum(one.score for one in several[0].best) == pytest.approx(1, abs=1e-4)
    assert isinstance(predict(resnet18, tmp_path), list)
    assert predict(open_classifier(resnet18), image) == predict(resnet18, image)
    for name in ("top", "batch"):
        with pytest.raises(UserError, match=f"{name} is 0"):
            predict(resnet18, image, **{name: 0})


def test_runs_and_exports_predict(run: Path, pictures: Path, tmp_path: Path) -> None:
    probe = run_python(ROOT / "eval/linear.py", "--ckpt", run, "--out", tmp_path)
    assert probe.returncode == 0, probe.stderr
    hub = tmp_path / "hub"
    done = run_python(ROOT / "eval/export.py", "--ckpt", tmp_path / "linear.pt", "--format", "hub", "--out", hub)
    assert done.returncode == 0, done.stderr
    picture = next(path for path in sorted((pictures / "val").rglob("*")) if path.is_file())
    of_run, of_file, of_hub = (predict(path, picture) for path in (tmp_path, tmp_path / "linear.pt", hub))
    assert of_run == of_file and of_hub.label == of_run.label
    assert [one.name for one in of_hub.best] == [one.name for one in of_run.best]
    assert of_hub.score == pytest.approx(of_run.score, abs=1e-5)
    # A run in whose folder an export lies is a run; one whose head is damaged has no classifier.
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    for name in ("linear.pt", "hub/model.safetensors"):
        shutil.copy(tmp_path / name, whole)
    assert predict(whole, picture) == of_run
    state = safetensors.torch.load_file(hub / "model.safetensors")
    with safetensors.safe_open(hub / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    for damaged in ({"fc.weight": state["fc.weight"]}, {**state, "fc.bias": state["fc.bias"][1:]}):
        rest = {key: value for key, value in state.items() if not key.startswith("fc.")}
        safetensors.torch.save_file({**rest, **damaged}, tmp_path / "cut.safetensors", metadata)
        with pytest.raises(CheckpointError, match="no classifier"):
            predict(tmp_path / "cut.safetensors", picture)


def test_the_classifier_of_another_library_is_exported_too(resnet18: Path, tmp_path: Path) -> None:
    words = ["--ckpt", resnet18, "--format", "safetensors", "--image-size", 64, "--out", tmp_path / "out.safetensors"]
    done = run_python(ROOT / "eval/export.py", *words)
    assert done.returncode == 0, done.stderr
    image = draw_picture("spiral", np.random.default_rng(0), (100, 90))
    found, expected = open_classifier(tmp_path / "out.safetensors"), open_classifier(resnet18)
    assert found.classes == expected.classes and torch.equal(found.head.weight, expected.head.weight)
    assert predict(tmp_path / "out.safetensors", image).name in expected.classes


def test_classifiers_whose_classes_nobody_names_are_refused(run: Path, tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), tmp_path / "seven.pth")
    with pytest.raises(CheckpointError, match=r"seven\.pth.*7 classes"):
        open_classifier(tmp_path / "seven.pth")
    headless = {key: value for key, value in torchvision.models.resnet18().state_dict().items() if key[:3] != "fc."}
    torch.save(headless, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="no classifier"):
        predict(tmp_path / "none.pth", "x.jpg")
