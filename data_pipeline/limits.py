"""What one source may cost, whoever made it: beyond it, it becomes a row with an error and the run goes on."""

from dataclasses import dataclass
from typing import ClassVar

from opensora.utils.limits import SECONDS, Limits


@dataclass(frozen=True, kw_only=True)
class SourceLimits:
    """Per source and stage."""

    time_s: float = 3600.0  # of one stage; a worker that takes longer is killed
    frames: int = 1_000_000  # decoded: nine hours at 30 a second
    pixels: int = 2**26  # of a frame
    memory_mib: int = 2048  # that a worker process may ask for
    attempts: int = 3  # a source whose worker dies so often in a row is quarantined, as "poison"

    LIMITS: ClassVar[Limits] = {
        "time_s": SECONDS,
        "frames": (2**24, "cut it into shorter files"),
        "pixels": (2**26, "no reader takes more"),
        "memory_mib": (2**20, "that is a terabyte"),
        "attempts": (100, "each costs a process"),
    }

    def __post_init__(self) -> None:
        for name in ("time_s", "frames", "pixels", "memory_mib", "attempts"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number above 0")
        if self.memory_mib < 256:
            raise ValueError(f"memory_mib={self.memory_mib}: must be at least 256, which Python and its libraries take")
