"""Encoders, projector, loss and optimizer."""
