"""What mmpretrain calls its SimCLR configs (configs/simclr), and what they are here. Imports nothing heavy."""

PRESETS = {
    "simclr_resnet50_16xb256-coslr-200e_in1k": "ds_lars.json",
    "simclr_resnet50_16xb256-coslr-800e_in1k": "ds_lars_800e.json",
}
"""Of train/configs: the same batch, learning rate, schedule and views."""
PROTOCOLS = {"resnet50_8xb512-linear-coslr-90e_in1k": "mmpretrain-lars-90e"}
"""Of the linear probe (eval.protocols)."""


def config_name(text: str) -> str:
    """The name of a config that is given as a path or a file."""
    return text.rpartition("/")[2].removesuffix(".py")
