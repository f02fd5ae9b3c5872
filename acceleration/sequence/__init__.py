"""Sequence parallelism: one sample's tokens over several processes."""

from acceleration.sequence.fill import fill_slots
from acceleration.sequence.layout import SequenceContext, SequenceParallel
from acceleration.sequence.ring import RingAttention
from acceleration.sequence.ulysses import UlyssesAttention

__all__ = ["RingAttention", "SequenceContext", "SequenceParallel", "UlyssesAttention", "fill_slots"]
