"""A model card, filled from what a run and its evaluations left behind."""

import json
from pathlib import Path
from typing import Any

from simclr_dali.eval.evaluation import result_folder
from simclr_dali.model.pretrained import Pretrained, fingerprint
from simclr_dali.pipeline.draws import center_fraction
from simclr_dali.shards.wording import of_classes

_RESULTS = ("linear*.json", "knn.json", "finetune-*.json")


def model_card(source: Pretrained, size: int, *, in_timm: bool) -> str:
    """README.md of a hub folder; says so where something was not measured or is not known."""
    of = source.architecture.encoder
    head, unit_range = source.classifier, source.encoder.unit_range
    tags = ["self-supervised", "simclr", "image-classification" if head else "image-feature-extraction"]
    lines = [
        "---",
        f"library_name: {'timm' if in_timm else 'pytorch'}",
        f"pipeline_tag: {tags[-1]}",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
        f"# {of.label()}, SimCLR",
        "",
        f"{'A classifier ' + of_classes(len(head.classes)) + ' on' if head else 'Features of'} a {of.name} encoder "
        f"({source.encoder.width:,} wide), pre-trained without labels by SimCLR "
        "(Chen et al. 2020).",
        "",
        "## Use",
        "",
        "```python",
        *_use(source, in_timm),
        "```",
        "",
        f"Images are RGB, {size} x {size} pixels, the central {center_fraction(size):g} of the short side, normalised "
        "by ImageNet's mean and standard deviation"
        + (" (the weights take values in 0 to 1, to which the model converts them)." if unit_range else "."),
        "",
        "## Training",
        "",
        *_training(source),
        "",
        "## Results",
        "",
        *_results(source),
        "",
        "## Limits",
        "",
        "The features know what the pictures of the training set show and carry its biases. Nothing was measured but "
        "what stands above. The licence is for the publisher to state; the terms of the training data apply.",
        "",
        f"sha256 of the checkpoint: `{source.sha256}`.",
    ]
    return "\n".join(lines) + "\n"


def _use(source: Pretrained, in_timm: bool) -> list[str]:
    ours = [
        "from simclr_dali import load",
        'encoder = load("model.safetensors")',
        "features = encoder(images)",
    ]
    if not in_timm:
        return ours
    what = "scores" if source.classifier else "features"
    return ["import timm", 'model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()',
            f"{what} = model(images)", "", *ours]  # fmt: skip


def _training(source: Pretrained) -> list[str]:
    if source.step == 0:
        return ["None: these are the weights that a run began with."]
    if source.run_state is None:
        where = f"read from {source.path.name} ({source.layout})"
        step = f", after {source.step:,} steps" if source.step is not None else ""
        return [f"The weights were {where}{step}; how they were trained is not recorded in that file."]
    config: dict[str, Any] = source.run_state["config"]
    simclr, optimizer = config["simclr"], config["optimizer"]
    params, views = optimizer["params"], simclr["views"]
    rows = {
        "data": f"{Path(simclr['data']).name} (manifest {source.run_state['manifest'][:16]})",
        "steps": f"{source.step:,}, global batch {config['train_batch_size']:,}, run of {simclr['epochs']} epochs",
        "optimizer": ", ".join([optimizer["type"], *(f"{key} {value}" for key, value in params.items())]),
        "warm-up": f"{simclr['warmup_epochs']:g} epochs, then a cosine to 0",
        "temperature": f"{simclr['temperature']:g}",
        "views": f"{simclr['image_size']} px, " + ", ".join(f"{key} {value}" for key, value in views.items() if value),
        "projector": "-".join(map(str, source.architecture.projector)),
        "seed": str(simclr["seed"]),
        "versions": ", ".join(f"{name} {version}" for name, version in source.run_state["versions"].items()),
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _results(source: Pretrained) -> list[str]:
    rows = []
    for result in _own_results(source):
        changed = f" (differs: {result['differs']})" if result.get("differs") else ""
        for name, found in _figures(result):
            low, high = found["top1_interval_95"]
            top5 = "" if found["top5"] is None else f"{found['top5']:.2f} %"
            rows.append(
                f"| {name}{changed} | {found['top1']:.2f} % ({low:.2f} .. {high:.2f}) | {top5} | "
                f"{result['val_images']:,} |"
            )
    if not rows:
        return ["None was measured."]
    return ["| protocol | top-1 (95 % interval) | top-5 | images |", "|---|---|---|---|", *rows]


def _own_results(source: Pretrained) -> list[dict[str, Any]]:
    """Of a classifier the one it was fitted in; of an encoder those in its folder that were measured on it."""
    if source.classifier is not None:
        return [source.classifier.about] if "top1" in source.classifier.about else []
    own = {"encoder_sha256": fingerprint(source.encoder), **source.encoder.conventions()}
    found = []
    for path in sorted(path for pattern in _RESULTS for path in result_folder(source).glob(pattern)):
        try:
            result = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if not isinstance(result, dict) or any(result.get(key) != value for key, value in own.items()):
            continue
        name = result["protocol"]
        names = (name, "linear", f"linear-{name}")  # others have a number, and are of another setting
        if path.stem.removesuffix("-untrained") in names:
            found.append(result)
    return found


def _figures(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    if result["protocol"] != "knn":
        return [(result["protocol"], result)]
    return [(f"kNN, k {key[1:]}", found) for key, found in result.items() if key[0] == "k" and isinstance(found, dict)]
