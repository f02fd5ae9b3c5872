"""What a worker tells the web process of a model: legal sizes and lengths, defaults, and what they cost.

The web process checks requests against it and imports no torch; the page offers what is in it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one clip: forecast, the planner's."""

    width: int
    height: int
    frames: int
    tokens: int
    peak_bytes: int  # of a process
    step_s: float  # of a device of the kind that the worker has; corrected by what was measured
    other_s: float  # text, decoding, file


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A model as requests see it."""

    name: str
    created: int  # seconds since 1970, of the weights
    defaults: Mapping[str, Any]  # every field of SamplingOption, width and height filled in
    neg: str  # default negative prompt
    multiple: int  # pixels; sides are rounded up to it
    sizes: tuple[tuple[int, int], ...]  # (width, height) that the page offers, the default first
    frames: tuple[int, ...]  # legal lengths, ascending
    cond_types: tuple[str, ...]  # t2v first; what references may give
    references: Mapping[str, int]  # files that a cond_type takes
    loras: tuple[str, ...] = ()
    # Solvers that fit what it was trained for, the default first -> fields of SamplingOption that are for others alone;
    # {}: not told
    solvers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: int = 1  # models that make its steps, one after the other
    channels: int = 0  # of its latents; 0: not told
    room_bytes: int = 0  # that a process may use
    costs: tuple[Cost, ...] = field(default=())  # every offered size at some lengths, ascending in tokens

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def read(data: Mapping[str, Any]) -> "ModelInfo":
        told = dict(data)
        told["sizes"] = tuple((int(width), int(height)) for width, height in told["sizes"])
        told["costs"] = tuple(Cost(**cost) for cost in told["costs"])
        for name in ("frames", "cond_types", "loras"):
            told[name] = tuple(told[name])
        told["solvers"] = {name: tuple(others) for name, others in told.get("solvers", {}).items()}
        return ModelInfo(**told)

    def nearest_frames(self, wanted: float) -> int:
        """The legal length that is nearest; of two the longer one."""
        return min(self.frames, key=lambda frames: (abs(frames - wanted), -frames))

    def cost(self, width: int, height: int, frames: int) -> tuple[float, float, float]:
        """(bytes of a process, seconds a step, other seconds) of a clip, by its pixels between those that are known;
        beyond them in proportion."""
        pixels = width * height * frames
        known = sorted(self.costs, key=lambda cost: cost.width * cost.height * cost.frames)
        if not known:
            return 0.0, 0.0, 0.0
        sizes = [cost.width * cost.height * cost.frames for cost in known]
        above = next((index for index, size in enumerate(sizes) if size >= pixels), len(known) - 1)
        low, high = known[max(above - 1, 0)], known[above]
        small, large = sizes[max(above - 1, 0)], sizes[above]
        share = (pixels - small) / (large - small) if large > small else pixels / large

        def between(first: float, last: float) -> float:
            return first + share * (last - first) if large > small else last * share

        return (
            between(low.peak_bytes, high.peak_bytes),
            between(low.step_s, high.step_s),
            between(low.other_s, high.other_s),
        )
