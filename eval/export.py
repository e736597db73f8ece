"""Write an encoder, or a classifier, for other programs.

    python eval/export.py --ckpt runs/ds_lars --format timm --out encoder.safetensors
    python eval/export.py --ckpt runs/ds_lars --format torchvision --out encoder.pth
    python eval/export.py --ckpt runs/ds_lars/linear.pt --format onnx --out classifier.onnx
    python eval/export.py --ckpt runs/ds_lars --format hub --out my-encoder

    torchvision  state_dict of torchvision's ResNet: load_state_dict(..., strict=False) misses fc alone
    timm         safetensors: timm.create_model("resnet50", num_classes=0, checkpoint_path=OUT)
    safetensors  the same keys, for every architecture; simclr_dali.load reads it
    onnx         images [n, 3, size, size] -> features [n, width]
    pt2          the same, as torch.export.load(OUT).module()
    hub          a folder with model.safetensors, config.json (timm's) and a model card filled from the run:
                 timm.create_model("local-dir:OUT", pretrained=True), where timm has such a network

A classifier (linear.pt, finetune-F.pt) is written with its head: as fc, or as a second output "scores". What was
written is read back by the program it is for (safetensors and hub by ours), and must compute the same within 1e-4
of the largest number; only then it gets its name. Images are RGB, normalised by ImageNet's mean and standard deviation.
"""

import argparse
import logging
import os
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    # This script's own folder must not shadow installed modules, and its checkout must win over an installed copy.
    sys.path[0] = str(Path(__file__).resolve().parents[1] / ".package")

from simclr_dali.eval.arguments import EXPORT_ENDINGS, EncoderChoice, add_encoder_arguments
from simclr_dali.shards.command_line import parser_of
from simclr_dali.shards.errors import UserError, run_main


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_encoder_arguments(parser, batch=False)
    parser.add_argument(
        "--format", choices=list(EXPORT_ENDINGS), required=True, metavar="FORMAT", help="Write this format."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="Write this file, or folder for hub.")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

import torch

from simclr_dali.eval.evaluation import image_size_of, open_encoder
from simclr_dali.eval.export_formats import FEATURES, FORMATS, SCORES
from simclr_dali.eval.inference import classifier_of
from simclr_dali.model.pretrained import Pretrained
from simclr_dali.shards.durable import refusals_named

IMAGES = 3  # in the comparison; more than 1, which an export might take for a constant
TOLERANCE = 1e-4  # of the largest number


def main(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    ending = EXPORT_ENDINGS[arguments.format]
    if ending and out.suffix != ending:
        raise UserError(f"--out is {out}; for --format {arguments.format} its ending must be {ending}")
    if out.exists():
        raise UserError(f"{out} exists already; give another --out, or remove it")
    chosen = EncoderChoice.of(arguments)
    source = open_encoder(chosen)
    source = replace(source, classifier=classifier_of(source))
    print(source.in_words())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # of torch about its own code
    worst = export(source, arguments.format, out, image_size_of(chosen, source))
    print(
        f"{source.architecture.encoder.name} as {arguments.format}: {out} (read back, differs by {worst:.1e} at most)"
    )


def export(source: Pretrained, name: str, out: Path, size: int) -> float:
    """Write ``out`` and return by how much of the largest number the result differs when it is read back.

    Raises UserError where it cannot be written, or differs by more than TOLERANCE.
    """
    temporary = out.with_name(f"partial-{os.getpid()}-{out.name}")
    source.encoder.requires_grad_(False)
    if source.classifier is not None:
        source.classifier.head.requires_grad_(False)
    images = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    with refusals_named(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            _remove(temporary)
            found = FORMATS[name](source, temporary, size, images)
            worst = _difference(source, found, images)
            if not worst <= TOLERANCE:  # as NaN is not
                raise UserError(
                    f"{out}, read back, differs by {worst:.1e} of the largest number, more than {TOLERANCE:g}; it was "
                    "not kept"
                )
            temporary.replace(out)
        finally:
            _remove(temporary)
    return worst


@torch.inference_mode()
def _difference(source: Pretrained, found: dict[str, torch.Tensor], images: torch.Tensor) -> float:
    features = source.encoder(images)
    expected = {FEATURES: features}
    if source.classifier is not None:
        expected[SCORES] = source.classifier.head(features)
    differences = []
    for name, value in found.items():
        rows = expected[name][-len(value) :]  # graphs are asked with fewer images than they were traced with
        differences.append(((value - rows).abs().max() / rows.abs().max()).item())
    return max(differences)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
