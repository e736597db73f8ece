"""SimCLR pre-training: ``load`` gives the encoder of a run or of a file of weights.

    from simclr_dali import load

    encoder = load("runs/ds_lars")
    encoder(images)            # pooled features [n, 2048]
    encoder.features(images)   # the feature map [n, 2048, 7, 7]

This folder gives the project its one import name. It holds links to the folders of the repository, so that a clone
works without being installed, with this folder's parent on the path.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simclr_dali.model.pretrained import load

__all__ = ["__version__", "command", "load"]
__version__ = "0.5.0"
command: str | None = None
"""Which command of ``simclr-dali`` runs in this process, if one does."""


def __getattr__(name: str) -> Any:
    # Whoever imports one module of ours, or asks a command for its help, does not wait for torch.
    if name == "load":
        from simclr_dali.model.pretrained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
