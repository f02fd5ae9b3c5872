"""Checkpoints: a step directory is complete or absent."""

from acceleration.checkpoint.manager import CheckpointManager, newest, steps_in

__all__ = ["CheckpointManager", "newest", "steps_in"]
