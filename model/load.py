"""An encoder out of a checkpoint."""

import hashlib
from pathlib import Path

from torch import nn

from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointError
from model.encoder import build_encoder, build_model

_PREFIX = "encoder."


def load_encoder(path: Path, *, untrained: bool = False) -> tuple[nn.Module, Checkpoint]:
    """The encoder of a run folder, checkpoint folder or ``state.pt``: images [n, 3, h, w] -> features [n, width].

    In eval mode, on the CPU, in float32. untrained: with the weights its run began with, the baseline of any claim.
    Raises CheckpointError where the file is missing, damaged, or does not fit its own architecture.
    """
    found = checkpoint.load(path)
    architecture = found.architecture()
    if untrained:
        return build_model(architecture, found.state["seed"]).encoder.eval(), found
    encoder = build_encoder(architecture)
    weights = {
        key.removeprefix(_PREFIX): value for key, value in found.state["model"].items() if key.startswith(_PREFIX)
    }
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{found.path} does not hold the {architecture.name} it names: {reason}") from error
    return encoder.eval(), found


def fingerprint(module: nn.Module) -> str:
    """sha256 over names and bytes of all parameters and buffers: equal before and after means untouched."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
