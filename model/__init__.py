"""Encoders, projector, loss and optimizer; ``load`` is all that a user of trained weights needs."""

from model.pretrained import load

__all__ = ["load"]
