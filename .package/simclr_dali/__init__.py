"""SimCLR pre-training: ``load`` gives the encoder of a run or of a file of weights, ``predict`` classifies pictures;
``pack``, ``pretrain`` and ``probe`` are commands as functions (simclr_dali.functions).

    from simclr_dali import load, predict

    encoder = load("runs/ds_lars")
    encoder("bird.jpg")        # pooled features [1, 2048], of the view that an evaluation has
    encoder(images)            # pooled features [n, 2048], of a batch of floats [n, 3, h, w] as it is
    encoder.features(images)   # the feature map [n, 2048, 7, 7]
    predict("runs/ds_lars", "bird.jpg").name

This folder gives the project its one import name. It holds links to the folders of the repository, so that a clone
works without being installed, with this folder's parent on the path.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simclr_dali.eval.inference import load, predict
    from simclr_dali.functions import pack, pretrain, probe

__all__ = ["__version__", "command", "load", "pack", "predict", "pretrain", "probe"]
__version__ = "0.6.0"
command: str | None = None
"""Which command of ``simclr-dali`` runs in this process, if one does."""


def __getattr__(name: str) -> Any:
    # Whoever imports one module of ours, or asks a command for its help, does not wait for torch.
    if name in ("load", "predict"):
        from simclr_dali.eval import inference

        return getattr(inference, name)
    if name in ("pack", "pretrain", "probe"):
        from simclr_dali import functions

        return getattr(functions, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
