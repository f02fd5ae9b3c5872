"""The cost of micro-batches as a run has measured it: from the times in its metrics.jsonl to ``data.cost``."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from opensora.datasets.buckets.cost import CostConfig, fit
from opensora.datasets.plan.batch_plan import BatchPlan
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import NUMBER
from opensora.utils.metrics_log import VALIDATED, read_metrics

LEAST_RECORDS = 8
MOST_STEPS = 10**5  # from one record to the next; more is a damaged number
TIMES = ("time/step_s", "data/wait_s")


def calibrate(plan: BatchPlan, metrics: Path, processes: int) -> tuple[CostConfig, float]:
    """(cost in seconds, mean relative error of the times it predicts).

    Args:
        plan: of the run that wrote ``metrics``, which says what its steps consisted of.
        processes: data-parallel processes that shared the steps.

    Raises:
        UserError: too few records, or too uniform ones.
    """
    records, events = read_metrics(metrics)
    rows, seconds = measured(plan, records, {int(event["step"]) for event in events if event["event"] != VALIDATED})
    if len(rows) < LEAST_RECORDS:
        raise UserError(f"{metrics}: {len(rows)} usable records, wanted {LEAST_RECORDS}; train on, log more often")
    rows = rows / processes
    try:
        cost = fit(rows, seconds)
    except ValueError as error:
        raise UserError(f"{metrics}: {error}") from None
    return cost, float(np.abs(rows @ cost.terms / seconds - 1).mean())


def measured(plan: BatchPlan, records: list[dict[str, Any]], events: set[int]) -> tuple[np.ndarray, np.ndarray]:
    """((n, 4) cost features, (n,) seconds) between consecutive records.

    The first record after a start is left out, as it has the time to warm up, and so is a step done twice.
    """
    rows, seconds = [], []
    for before, after in pairwise(records):
        steps = range(before["step"], after["step"])
        damaged = len(steps) > MOST_STEPS or not all(NUMBER.test(after.get(name)) for name in TIMES)
        if steps and not damaged and not any(step in events for step in steps):
            rows.append(sum(plan.cost_features(step) for step in steps))
            seconds.append((after["time/step_s"] - after["data/wait_s"]) * len(steps))
    return np.array(rows), np.array(seconds)
