"""Sequence parallelism: one sample's tokens over several processes."""

from acceleration.sequence.layout import SequenceContext, SequenceParallel
from acceleration.sequence.ulysses import UlyssesAttention, fill_slots

__all__ = ["SequenceContext", "SequenceParallel", "UlyssesAttention", "fill_slots"]
