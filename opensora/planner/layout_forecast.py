"""What is forecast: a bucket as the model sees it, and one layout on it."""

from dataclasses import dataclass
from typing import Any

from acceleration.accounting.peak_memory import Footprint
from acceleration.accounting.rank_layout import MicroBatch
from acceleration.config import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A bucket as the model sees it."""

    name: str
    batch: MicroBatch
    clips: tuple[int, int, int, int] | None = None  # samples, frames, height, width before they are encoded
    bucket: int | None = None  # its number in the bucket table
    packs: int = 0  # sequences in a step of this bucket alone, where samples are packed; 0: they are not
    samples: int = 0  # of such a step


@dataclass(frozen=True, kw_only=True)
class ValidationForecast:
    """A round of validation, with what the process keeps; 0: there is none of it."""

    every: int  # steps between two rounds
    held_out: int = 0  # bytes for the loss on the held-out table
    held_out_s: float = 0.0  # seconds, at most
    clips: int = 0  # bytes for the clips of the prompts
    clips_s: float = 0.0  # seconds, at most

    @property
    def peak(self) -> int:
        """Most bytes at any moment."""
        return max(self.held_out, self.clips)

    @property
    def seconds(self) -> float:
        """Of the whole round, at most."""
        return self.held_out_s + self.clips_s

    def plain(self) -> dict[str, Any]:
        """For JSON; memory in GiB."""
        return {
            "every": self.every,
            "held_out_gib": self.held_out / 2**30,
            "held_out_s_at_most": self.held_out_s,
            "clips_gib": self.clips / 2**30,
            "clips_s_at_most": self.clips_s,
        }


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One layout on one bucket, for the process that needs most."""

    parallel: ParallelConfig
    degrees: dict[str, int]
    shape: str
    batches: int  # micro-batches of a process in a step
    memory: Footprint
    sent: dict[str, int]  # bytes by axis and step
    flops: float  # model FLOPs of a step, all processes together
    step_s: float
    mfu: float
    encoding: int = 0  # bytes while clips are encoded, with what the process keeps then; 0: less than for other shapes
    text: int = 0  # bytes while prompts are encoded, likewise; 0: nothing is
    encode_s: float = 0.0  # time of a step's clips, references and prompts in the encoders, before it
    validation: ValidationForecast | None = None  # None: of a shape that others outweigh, or nothing is looked at

    @property
    def peak(self) -> int:
        """Most bytes at any moment."""
        return max(self.memory.total, self.encoding, self.text, self.validation.peak if self.validation else 0)

    def plain(self) -> dict[str, Any]:
        """For JSON; memory and bytes in GiB."""
        return {
            "mesh": {name: degree for name, degree in self.degrees.items() if degree > 1},
            "zero": self.parallel.zero,
            "recompute": self.parallel.recompute.kind,
            "shape": self.shape,
            "batches": self.batches,
            "memory_gib": {name: value / 2**30 for name, value in vars(self.memory).items()},
            "peak_gib": self.peak / 2**30,
            "encoding_gib": self.encoding / 2**30,
            "text_gib": self.text / 2**30,
            "encode_s": self.encode_s,
            "comm_gib": {axis: value / 2**30 for axis, value in self.sent.items()},
            "flops": self.flops,
            "step_s": self.step_s,
            "mfu": self.mfu,
            "validation": self.validation.plain() if self.validation else None,
        }
