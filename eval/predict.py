"""Classify pictures with a trained classifier.

    python eval/predict.py --ckpt runs/ds_lars/linear.pt bird.jpg            # of eval/linear.py
    python eval/predict.py --ckpt runs/ds_lars/finetune-0.1.pt holiday/      # of eval/finetune.py; a whole folder
    python eval/predict.py --ckpt resnet50_simclr-200e-pre_8xb512-linear-coslr-90e_in1k bird.jpg    # mmpretrain's
    python eval/predict.py --ckpt runs/ds_lars/linear.pt --json *.jpg > predictions.json
    python eval/predict.py --ckpt runs/ds_lars/linear.pt --names LOC_synset_mapping.txt bird.jpg

Prints the most likely classes of each picture with their scores, which add up to 1 over all classes. Pictures are seen
as evaluations see them: upright, the central view, at the size the classifier was fitted to. A file that cannot be read
is named at the end, with exit code 2, and the others are classified; a path that does not exist ends it at once.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This script's own folder must not shadow installed modules, and its checkout must win over an installed copy.
    sys.path[0] = str(Path(__file__).resolve().parents[1] / ".package")

from simclr_dali.eval.arguments import add_foreign_arguments, conventions_of
from simclr_dali.shards.command_line import parser_of, positive_int
from simclr_dali.shards.errors import UserError, run_main


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--ckpt", type=Path, required=True, metavar="CLASSIFIER",
        help="Ask this classifier: linear.pt or finetune-F.pt, a run folder that has a linear.pt, an export of one of "
        "them, a file of torchvision or mmpretrain with its classifier, or the name of published weights.",
    )  # fmt: skip
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="They are pictures, or folders of them.")
    parser.add_argument(
        "--top", type=positive_int, default=5, metavar="N", help="Name the N likeliest classes (default: 5)."
    )
    parser.add_argument(
        "--names", type=Path, metavar="FILE", help="Call the classes as FILE does, a class and a name a line."
    )
    add_foreign_arguments(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    parser.add_argument("--batch", type=positive_int, default=64, help="Take so many pictures at a time (default: 64).")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistakes are answered before torch is imported, which takes seconds

from simclr_dali.eval.inference import classify_files, open_classifier
from simclr_dali.pipeline.image_files import ImageFiles, find_images, refuse_failures


def main(arguments: argparse.Namespace) -> None:
    classifier = open_classifier(arguments.ckpt, **conventions_of(arguments))
    label, layout = classifier.architecture.encoder.label(), classifier.about.get("layout", "unknown")
    print(f"{arguments.ckpt}: {label}, layout of {layout}, takes {classifier.encoder.input_range()}", file=sys.stderr)
    paths = find_images(arguments.images)
    files = ImageFiles(paths)
    names = read_names(arguments.names) if arguments.names else {}
    if names and not names.keys() & set(classifier.classes):
        raise UserError(
            f"--names {arguments.names} names none of the {len(classifier.classes)} classes, such as "
            f"{classifier.classes[0]!r}; give a line for each, class and name"
        )
    found = []
    for place, best in classify_files(classifier, files, arguments.top, arguments.batch):
        lines = [
            {"class": names.get(one.name, one.name), "label": one.label, "score": round(one.score, 6)} for one in best
        ]
        found.append({"image": str(paths[place]), "predictions": lines})
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print(table(found))
    refuse_failures(files.failures, paths)


def read_names(path: Path) -> dict[str, str]:
    """Names of classes, from lines such as ``n01440764 tench, Tinca tinca``; the first of several is taken.

    A tab stands before the name where a class has spaces.
    """
    try:
        lines = [line.split("\t" if "\t" in line else None, 1) for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--names {path} cannot be read ({error}); give a text file, a class and its name a line"
        ) from error
    return {words[0]: words[1].split(",")[0].strip() for words in lines if len(words) == 2}


def table(found: list[dict[str, Any]]) -> str:
    """One line per picture: its name, then classes with scores."""
    if not found:
        return "no picture could be classified"
    wide = max(len(line["image"]) for line in found)
    return "\n".join(
        f"{line['image']:<{wide}}  " + "  ".join(f"{best['class']} {best['score']:.3f}" for best in line["predictions"])
        for line in found
    )


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
