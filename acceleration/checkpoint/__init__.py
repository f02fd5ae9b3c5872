"""Checkpoints: a step directory is complete or absent."""

from acceleration.checkpoint.manager import CheckpointManager, SaveError, newest, steps_in

__all__ = ["CheckpointManager", "SaveError", "newest", "steps_in"]
