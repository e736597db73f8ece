"""load and predict on pictures as programs hold them: the views are those of an evaluation."""

import copy
import json
import pickle
import shutil
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
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
    held = PIL.Image.open(tmp_path / "turned.png")
    held.load()
    for given in (
        image, pixels, tensor, [pixels], pixels[None], [tensor], (image,), image.convert("RGBA"),
        held, str(tmp_path / "a.png"),
    ):  # fmt: skip
        assert torch.allclose(encoder(given), of_file, atol=1e-5), type(given)
    gray = image.convert("L")
    level = np.asarray(gray)
    for given in (level, level[:, :, None], torch.from_numpy(level.copy()), torch.from_numpy(level.copy())[None]):
        assert torch.allclose(encoder(given), encoder(gray), atol=1e-5)
    # Each of its own size, in the order given; a batch of floats is taken as it is.
    several = encoder([image, gray.resize((40, 200)), tmp_path / "a.png"])
    assert torch.allclose(several[0], several[2], atol=1e-5) and not torch.allclose(several[0], several[1])
    views = encoder.views([image, image])
    assert views.shape == (2, 3, 32, 32) and torch.equal(encoder(views), several[[0, 2]])
    assert torch.allclose(encoder(torch.stack([tensor, tensor])), of_file, atol=1e-5)  # as predict does, too
    assert encoder(torch.zeros(2, 3, 90, 61)).shape == (2, encoder.width)
    with (tmp_path / "a.png").open("rb") as file:
        assert torch.allclose(encoder(file), of_file, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nowhere.jpg", ["nowhere.jpg", "does not exist"]),
        ([], ["no picture"]),
        (3, ["int"]),
        ({"a": 1}, ["dict"]),
        ([b"jpeg"], ["picture 0", "bytes"]),
        ("", ["empty path"]),
        ("x" * 5000, ["cannot be looked at"]),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), ["picture 0", "[8, 8, 3]", "[3, h, w]"]),
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
    with pytest.raises(UserError, match=r"picture 0 .*truncated"):
        load(run)(opened)


def test_what_was_only_opened_is_read_as_its_file_is(run: Path, tmp_path: Path) -> None:
    """Also where Pillow would have given something else: 16 bits, a JPEG's own chroma, a palette."""
    encoder = load(run)
    image = draw_picture("spiral", np.random.default_rng(0), (90, 61))
    image.save(tmp_path / "a.jpg", quality=80)
    image.convert("P").save(tmp_path / "a.gif")
    image.convert("CMYK").save(tmp_path / "b.jpg", quality=95)
    for name in ("a.jpg", "a.gif", "b.jpg"):
        opened = PIL.Image.open(tmp_path / name)
        assert torch.equal(encoder.views(opened), encoder.views(tmp_path / name)), name
        opened.load()
        assert (encoder.views(opened) - encoder.views(tmp_path / name)).abs().mean() < 0.1
    dim = (np.asarray(image).astype(np.uint16) * 16).astype(">u2")
    header = struct.pack(">IIBBBBB", 90, 61, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in dim)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    (tmp_path / "dim.png").write_bytes(b"\x89PNG\r\n\x1a\n" + packed)
    for given in (tmp_path / "dim.png", PIL.Image.open(tmp_path / "dim.png")):
        with pytest.raises(UserError, match=r"16 bits.*scale it to 8 bits") as caught:
            encoder(given)
        assert "--" not in str(caught.value)


def test_gray_of_16_bits_stands_upright(tmp_path: Path, run: Path) -> None:
    level = np.asarray(draw_picture("rays", np.random.default_rng(0), (90, 61)).convert("L")).astype(np.uint16) * 257
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    for name in ("a.png", "a.tif"):
        PIL.Image.fromarray(np.rot90(level).copy()).save(tmp_path / name, exif=turned)
        PIL.Image.fromarray(level).save(tmp_path / f"upright-{name}")
        found, expected = load(run).views(tmp_path / name), load(run).views(tmp_path / f"upright-{name}")
        assert (found - expected).abs().mean() < 0.1 < (found - expected.rot90(1, (2, 3))).abs().mean(), name


def test_many_threads_may_ask_one_encoder(run: Path, pictures: Path) -> None:
    encoder = load(run)
    files = sorted(path for path in (pictures / "val").rglob("*") if path.is_file())[:12]
    expected = encoder.views(files)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(encoder.views, files * 4, timeout=200))
    assert all(torch.equal(view[0], expected[number % 12]) for number, view in enumerate(found))


def test_values_that_were_not_normalised_are_named_once(run: Path) -> None:
    encoder = load(run)
    with pytest.warns(UserWarning, match="values from .* normalised"):
        encoder(torch.rand(2, 3, 32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(torch.rand(2, 3, 32, 32))
        load(run)(torch.randn(2, 3, 32, 32))
    with pytest.warns(UserWarning, match="from 0 to 255"):
        load(run)(torch.arange(256.0).expand(1, 3, 16, 256))


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
    assert torch.allclose(compiled(image), expected, atol=1e-6)
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
    other = predict(resnet18, image, unit_range=True)
    assert other.score != pytest.approx(found.score, rel=1e-3)
    state = torch.load(resnet18, weights_only=True)
    torch.save({**state, "fc.bias": state["fc.bias"] * float("nan")}, tmp_path / "nan.pth")
    with pytest.raises(UserError, match="no numbers"):
        predict(tmp_path / "nan.pth", image)
    done = run_python(ROOT / "eval/predict.py", "--ckpt", resnet18, "--unit-range", tmp_path / "bird.png", "--json")
    assert json.loads(done.stdout)[0]["predictions"][0]["label"] == other.label, done.stderr


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
