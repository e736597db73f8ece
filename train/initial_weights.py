"""Beginning a run with weights that there are already: simclr.init_from."""

from pathlib import Path
from typing import Any

from simclr_dali.model.pretrained import open_pretrained
from simclr_dali.model.simclr import SimCLR, projector_weights
from simclr_dali.shards.errors import UserError


def take_weights(model: SimCLR, path: str) -> tuple[str, dict[str, Any]]:
    """Give ``model`` the encoder of ``path``, and its projector where that is a run with one of the same widths.

    Returns a line that says what was taken, and what a checkpoint keeps of it. The engine gives all ranks what rank 0
    has. Raises UserError where the file holds no encoder, or another one.
    """
    source = open_pretrained(Path(path))
    own, other = model.architecture, source.architecture
    if other.encoder != own.encoder:
        raise UserError(
            f"simclr.init_from is {path}, which holds {other.encoder.label()}, and simclr.encoder is "
            f"{own.encoder.label()}; change one of them"
        )
    model.encoder.load_state_dict(source.encoder.state_dict())
    taken = "the encoder"
    if source.run_state is not None and source.step and other.projector == own.projector:
        model.projector.load_state_dict(projector_weights(source.run_state))
        taken = "encoder and projector"
    note = ""
    if source.encoder.conventions() != model.encoder.conventions():
        note = f"; it took {source.encoder.input_range()}, and is trained on as networks of this project are"
    if source.tuned:
        note += f"; they learned from labels ({source.tuned})"
    begun_with = {"path": str(source.path), "sha256": source.sha256, "layout": source.layout, "tuned": source.tuned}
    return f"begins with {taken} of {source.path} ({source.layout}){note}", begun_with
