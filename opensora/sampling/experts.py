"""Two experts in one clip: which of them a step is for, and how it is guided."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, TypeAlias

from opensora.sampling.options import SamplingOption

ROUNDING = 1e-9  # of times: a step that starts at the boundary by its formula is before it by one bit, or is not
Expert: TypeAlias = Literal["high", "low"]  # for high noise, or for low


class Phase(NamedTuple):
    """Steps in a row of one expert."""

    expert: Expert
    steps: range


def expert_of(time: float, boundary: float | None) -> Expert:
    """Whose step it is that starts at ``time``, in parts of the time of pure noise: at the boundary that of high noise;
    without one a single model makes all."""
    return "high" if boundary is None or time >= boundary - ROUNDING else "low"


def phases(times: Sequence[float], boundary: float | None) -> list[Phase]:
    """All steps, one expert after the other.

    Args:
        times: falling, in parts of the time of pure noise; all but the last begin a step.
    """
    experts = [expert_of(time, boundary) for time in times[:-1]]
    of_high = experts.count("high")
    found = [Phase("high", range(of_high)), Phase("low", range(of_high, len(experts)))]
    return [phase for phase in found if phase.steps]


def guided_by(option: SamplingOption, expert: Expert) -> SamplingOption:
    """The option with the guidance of an expert."""
    scale = option.guidance_low if expert == "low" and option.guidance_low is not None else option.guidance
    return replace(option, guidance=scale, guidance_low=None)
