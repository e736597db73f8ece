"""The linear probe: a true optimum, an untouched encoder, an honest count."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from simclr_dali.eval.arguments import DataChoice, EncoderChoice
from simclr_dali.eval.evaluation import open_evaluation
from simclr_dali.eval.logistic import fit_linear, interval_95, score
from simclr_dali.model.pretrained import fingerprint, open_pretrained
from simclr_dali.pipeline.features import extract
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.shards.manifest import load_split
from tests.conftest import ROOT, assert_sentence, run_python
from tests.loaders import local


def problem(count: int = 300, width: int = 5, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=generator)
    means = torch.randn(classes, width, generator=generator)
    # Features of very different scale, shift and none at all: the fit must not care.
    scale = torch.tensor([1.0, 100.0, 0.01, 5.0, 0.0])
    features = (means[labels] + torch.randn(count, width, generator=generator)) * scale + torch.tensor(7.0)
    return features, labels


def test_the_classifier_is_the_optimum_of_its_objective() -> None:
    features, labels = problem()
    fit = fit_linear(features, labels, 4, weight_decay=1e-2)
    layer = fit.layer
    assert fit.converged and fit.gradient < 1e-4
    x = features.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std[-1] = 1
    weight = (layer.weight.detach().double() * std).requires_grad_()
    bias = (layer.bias.detach().double() + layer.weight.detach().double() @ mean).requires_grad_()
    scaled = (x - mean) / std
    objective = F.cross_entropy(scaled @ weight.T + bias, labels) + 0.005 * weight.square().sum()
    for gradient in torch.autograd.grad(objective, [weight, bias]):
        assert gradient.abs().max() < 1e-4


@pytest.mark.parametrize(("scale", "shift"), [(50, -3), (1e-8, 0), (1e-20, 0), (1e15, 0)])
def test_the_scale_of_a_feature_does_not_matter(scale: float, shift: float) -> None:
    features, labels = problem()
    plain = fit_linear(features, labels, 4, 1e-3).layer(features)
    scaled = features * scale + shift
    assert torch.allclose(fit_linear(scaled, labels, 4, 1e-3).layer(scaled), plain, atol=2e-2)


def test_accuracy_counts() -> None:
    layer = torch.nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(8))
        layer.bias.zero_()
    features = torch.arange(8.0).expand(4, 8)  # class 7 first, then 6, 5, 4, 3
    found = score(layer, features, torch.tensor([7, 6, 3, 2]))
    assert (found.top1, found.top5, found.count) == (25.0, 75.0, 4)
    assert found.confused == ((2, 7, 1), (3, 7, 1), (6, 7, 1))
    assert score(layer, features, torch.tensor([6, 6, 3, 7])).confused == ((6, 7, 2), (3, 7, 1))
    assert found.per_class[7] == 100 and found.per_class[6] == 0 and math.isnan(found.per_class[0])


def test_interval_holds_the_share_and_narrows() -> None:
    low, high = interval_95(60.0, 700)
    assert (low, high) == pytest.approx((56.3, 63.6), abs=0.1)  # Wilson's formula by hand
    assert interval_95(0.0, 10)[0] == pytest.approx(0) and interval_95(100.0, 10)[1] == pytest.approx(100)


def test_the_probe_reports_what_a_second_count_finds(run: Path, packed: Path) -> None:
    done = run_python(ROOT / "eval/linear.py", "--ckpt", run)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "linear.json").read_text())
    found = open_pretrained(run)
    encoder = found.encoder
    assert result["protocol"] == "fast" and result["checkpoint_step"] == 8
    assert result["checkpoint_sha256"] == found.sha256 and result["encoder_sha256"] == fingerprint(encoder)

    # Its saved classifier on features that we compute ourselves, image by image.
    val = load_split(packed, "val")
    saved = torch.load(run / "linear.pt", weights_only=True)
    assert saved["classes"] == list(val.classes)
    setting = LoaderConfig(size=32, device=torch.device("cpu"))
    features = extract(encoder, local(val), setting, batch=7)
    scores = features.features @ saved["weight"].T + saved["bias"]
    right = (scores.argmax(1) == features.labels).double().mean()
    assert result["top1"] == pytest.approx(100 * right.item(), abs=0.01 + 100 / len(val))
    assert result["val_images"] == len(val) == 48 and result["classes"] == 12
    low, high = result["top1_interval_95"]
    assert low <= result["top1"] <= high and result["top1"] <= result["top5"]


def test_features_that_never_change_say_nothing_and_the_fit_reaches_its_optimum() -> None:
    """Against scikit-learn's optimum, with half of the features constant but for rounding, at scales 1e-3 to 10."""
    from sklearn.linear_model import LogisticRegression

    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(2000, 12, generator=random)
    labels = (hidden[:, :5] + torch.randn(2000, 5, generator=random)).argmax(1)
    varying = (hidden @ torch.randn(12, 60, generator=random)).relu() * torch.logspace(-3, 1, 60)
    constant = 0.37 + 1e-8 * torch.randn(2000, 60, generator=random)
    fit = fit_linear(torch.cat([constant, varying], 1), labels, 5, 1e-3)
    assert fit.converged and not fit.layer.weight[:, :60].any()

    scaled = ((varying - varying.mean(0)) / varying.std(0, correction=0)).double()
    best = LogisticRegression(C=1 / (1e-3 * 2000), max_iter=10_000, tol=1e-8).fit(scaled.numpy(), labels.numpy())

    def objective(weight: torch.Tensor, bias: torch.Tensor) -> float:
        loss = torch.nn.functional.cross_entropy(scaled @ weight.T + bias, labels)
        return float(loss + 1e-3 / 2 * weight.square().sum())

    weight = fit.layer.weight[:, 60:].double() * varying.std(0, correction=0)
    bias = fit.layer(torch.cat([constant, varying], 1).mean(0)).double()
    optimum = objective(torch.from_numpy(best.coef_), torch.from_numpy(best.intercept_))
    assert objective(weight.detach(), bias.detach()) == pytest.approx(optimum, rel=1e-5)


def test_untrained_is_kept_apart(run: Path, tmp_path: Path) -> None:
    done = run_python(
        ROOT / "eval/linear.py", "--ckpt", run / "checkpoints/step-00000008", "--untrained", "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "linear-untrained.json").read_text())
    start = open_pretrained(run, untrained=True).encoder
    assert result["untrained"] and result["encoder_sha256"] == fingerprint(start)
    assert not (tmp_path / "linear.json").exists()


def test_an_encoder_that_changes_is_noticed(run: Path, packed: Path) -> None:
    try:
        job = open_evaluation(EncoderChoice(run), DataChoice(str(packed)), batch=48, out=None)
        job.refuse_change()
        job.encoder.layer1[0].bn1.num_batches_tracked += 1
        with pytest.raises(RuntimeError, match="the encoder changed"):
            job.refuse_change()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)


@pytest.mark.parametrize("case", ["missing", "not ours", "empty folder", "no data"])
def test_mistakes_are_one_sentence(case: str, run: Path, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    words, expected = {
        "missing": (["--ckpt", tmp_path / "nowhere"], "nowhere"),
        "not ours": (["--ckpt", tmp_path / "other.pth"], "fc.weight"),
        "empty folder": (["--ckpt", tmp_path], "no checkpoint"),
        "no data": (["--ckpt", run, "--data", tmp_path / "none"], "none"),
    }[case]
    assert_sentence(run_python(ROOT / "eval/linear.py", *words), expected)
    assert not list(tmp_path.rglob("linear.json"))
