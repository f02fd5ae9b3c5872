"""What the report shows beside what the run itself is about."""

from dataclasses import dataclass
from typing import ClassVar

from opensora.utils.limits import Limits


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """``report.html`` and ``report.md`` in the folder of the run."""

    training: str = ""  # configuration of a training run: its buckets, and how full they would be; empty: none
    examples: int = 10  # nearest misses of every filter, and as many clips that were kept
    pairs: int = 30  # of duplicates that are shown side by side
    seed: int = 0  # of the examples that are drawn

    LIMITS: ClassVar[Limits] = {
        "examples": (200, "a page has every picture in it"),
        "pairs": (1000, "a page has every picture in it"),
        "seed": (2**32 - 1, "32 bits are more seeds than anybody tries"),
    }

    def __post_init__(self) -> None:
        for name in ("examples", "pairs", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be an integer >= 0")
