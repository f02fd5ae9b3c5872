"""How many updates fit into a given time: measure a few, then lay the schedule out for what is left.

Machines differ three-fold, so a demo of fixed length is either too long or stops before anything is learned.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

FIRST_SHARE = 0.1  # of the training time goes to the run that is interrupted
SAMPLING_STEPS = 12  # sampling, plot and summary cost about a start and as much as so many updates
FEWEST_STEPS = 40
SLACK = 0.95  # of the time left is planned for


@dataclass(frozen=True)
class Speed:
    """Of one layout on this machine: seconds before its first update, and of each update."""

    start_s: float
    step_s: float


@dataclass(frozen=True)
class Schedule:
    """Updates before the interruption, and in all."""

    first: int
    total: int


def measure(run: Callable[[], str], steps: int) -> Speed:
    """The speed of a layout by ``run``, which makes ``steps`` updates and returns what it printed.

    ``benchmarks.demo_step`` ends with a line of JSON that has the seconds of an update.
    """
    began = time.monotonic()
    record = json.loads(run().strip().splitlines()[-1])
    took = time.monotonic() - began
    return Speed(start_s=max(0.0, took - steps * record["step_s"]), step_s=record["step_s"])


def lay_out(seconds: float, first: Speed, second: Speed) -> Schedule:
    """What fits into ``seconds``: updates in the first layout, an interruption, updates in the second, samples."""
    overhead = first.start_s + 2 * second.start_s + SAMPLING_STEPS * second.step_s
    training = max(0.0, SLACK * seconds - overhead)
    before = int(FIRST_SHARE * training / first.step_s)
    total = before + int((1 - FIRST_SHARE) * training / second.step_s)
    total = max(FEWEST_STEPS, total)
    return Schedule(first=min(max(10, before), total // 2), total=total)


def fits(seconds: float, speed: Speed) -> int:
    """Updates that fit into ``seconds`` with one more start, and sampling, in this layout."""
    overhead = 2 * speed.start_s + SAMPLING_STEPS * speed.step_s
    return max(FEWEST_STEPS // 2, int((SLACK * seconds - overhead) / speed.step_s))
