"""Sequence parallelism: one sample's tokens over several processes."""

from acceleration.sequence.axis_switch import AxisExchange
from acceleration.sequence.install import fill_slots
from acceleration.sequence.layout import SequenceContext, SequenceParallel
from acceleration.sequence.ring import RingAttention
from acceleration.sequence.segments import Segments
from acceleration.sequence.ulysses import UlyssesAttention

__all__ = [
    "AxisExchange",
    "RingAttention",
    "Segments",
    "SequenceContext",
    "SequenceParallel",
    "UlyssesAttention",
    "fill_slots",
]
