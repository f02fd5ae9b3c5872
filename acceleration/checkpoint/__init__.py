"""Checkpoints: a step directory is complete or absent."""

from acceleration.checkpoint.listing import contents, newest, steps_in
from acceleration.checkpoint.manager import CheckpointManager, SaveError

__all__ = ["CheckpointManager", "SaveError", "contents", "newest", "steps_in"]
