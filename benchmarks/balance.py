"""How much of a step do data-parallel processes wait for the slowest one, by how samples are dealt to them?

    python -m benchmarks.balance [--rows 3000000] [--steps 200] [--tables stage1 stage2]

Idle is 1 - mean / max of the processes' loads in a step, averaged over steps; loads follow the cost model of data.cost
(24 L d^2 + 4 L^2 d). Tables are configs/data/*.yaml on synthetic clips (lognormal durations, a fifth images). Policies:

    random        every process takes a micro-batch of any bucket (Open-Sora)
    equal tokens  as random, with batch sizes that make tokens per micro-batch equal (the table's mean)
    equal cost    as random, with batch sizes that make the cost equal (data.cost_per_batch): rounding remains
    ours          BatchPlan, data.balance_group=1, or 4 micro-batches per process and data.balance_group=4
    ours, auto    BatchPlan with the batch sizes of "equal cost"

Then: whether every sample comes once, and how random the order still is. Prints tables and one JSON line.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from benchmarks.clip_columns import clip_columns
from opensora.datasets.buckets.bucket import BucketTable
from opensora.datasets.buckets.cost import FullAttention
from opensora.datasets.config import DataConfig
from opensora.datasets.plan.balance import deal
from opensora.datasets.plan.batch_plan import BatchPlan
from opensora.datasets.table.manifest import ClipTable, TextsInMemory

RANKS = (8, 64, 224, 1024)
MULTIPLE = 16
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=3_000_000)
    parser.add_argument("--steps", type=int, default=200, help="steps to average over, spread over the epoch")
    parser.add_argument("--tables", nargs="+", default=["stage1", "stage2"])
    args = parser.parse_args()
    nothing = pa.chunked_array([[""]])
    table = ClipTable(
        **clip_columns(args.rows, 0),
        texts=TextsInMemory(nothing, nothing),
        folders=("",),
        first_rows=np.zeros(1, np.int64),
    )
    results: dict[str, Any] = {}
    for name in args.tables:
        buckets = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["data"]["buckets"]
        results[name] = {"idle": idle_of_policies(name, table, buckets, args.steps)}
        results[name] |= order_of(name, BatchPlan(table, config(buckets, 224), MULTIPLE, 0), len(table))
        print(f"{'':<12}with data.balance_group=4:", end=" ")
        order_of(name, BatchPlan(table, config(buckets, 224 * 4, 4), MULTIPLE, 0), len(table))
    print(json.dumps({"benchmark": "balance", "rows": args.rows, "steps": args.steps, "results": results}))


def config(buckets: dict, micro_batches: int, pack: int = 1, **budget: float) -> DataConfig:
    """The table as published, or with the batch sizes that a budget gives."""
    if budget:
        buckets = {name: {n: [row[0], "auto"] for n, row in rows.items()} for name, rows in buckets.items()}
    return DataConfig(
        buckets=buckets,
        micro_batches=micro_batches,
        balance_group=pack,
        unused_rows="report",
        **budget,  # type: ignore[arg-type]
    )


def idle_of_policies(name: str, table: ClipTable, buckets: dict, steps: int) -> list[dict[str, Any]]:
    fixed = every_cost(BatchPlan(table, config(buckets, 1), MULTIPLE, 0))
    rows = BucketTable(config(buckets, 1), MULTIPLE).buckets
    mean_tokens = np.mean([b.batch_size * FullAttention(MULTIPLE)(b.frames, b.height, b.width)[0] for b in rows])
    tokens = every_cost(BatchPlan(table, config(buckets, 1, tokens_per_batch=int(mean_tokens)), MULTIPLE, 0))
    budget = float(fixed.max())
    cost = every_cost(BatchPlan(table, config(buckets, 1, cost_per_batch=budget), MULTIPLE, 0))
    found = []
    print(f"\n{name}: idle per step in %, mean (and weighted by the steps' time)")
    heads = (
        "random",
        "equal tokens",
        "equal cost",
        "ours",
        "ours, auto",
        "random x4",
        "ours x4, pack 1",
        "ours x4, pack 4",
    )
    print(f"{'ranks':>6} " + " ".join(f"{head:>15}" for head in heads))
    for ranks in RANKS:
        loads: list[np.ndarray] = [dealt_at_random(costs, ranks, 1, steps) for costs in (fixed, tokens, cost)]
        plan = BatchPlan(table, config(buckets, ranks), MULTIPLE, 0)
        auto = BatchPlan(table, config(buckets, ranks, cost_per_batch=budget), MULTIPLE, 0)
        loads += [dealt(plan, ranks, steps), dealt(auto, ranks, steps), dealt_at_random(fixed, ranks, 4, steps)]
        loads += [dealt(BatchPlan(table, config(buckets, 4 * ranks, k), MULTIPLE, 0), ranks, steps) for k in (1, 4)]
        row = {head: idle(load) for head, load in zip(heads, loads, strict=True)}
        print(f"{ranks:>6} " + " ".join(f"{100 * mean:>7.2f} ({100 * timed:>5.2f})" for mean, timed in row.values()))
        found.append({"ranks": ranks} | {head: [round(x, 5) for x in pair] for head, pair in row.items()})
    print("x4: four micro-batches per process and step; the last two columns differ in data.balance_group only")
    return found


def idle(loads: np.ndarray) -> tuple[float, float]:
    """(mean over steps, weighted by the duration of steps) of 1 - mean / max; loads: (steps, ranks)."""
    return float(np.mean(1 - loads.mean(1) / loads.max(1))), float(1 - loads.mean(1).sum() / loads.max(1).sum())


def every_cost(plan: BatchPlan) -> np.ndarray:
    """Costs of all micro-batches of epoch 0, in random order."""
    epoch = plan._epoch(0)
    numbers = np.random.default_rng(0).permutation(epoch.micro_batches)
    return plan._buckets.costs(epoch.bucket_of(numbers), epoch.sizes(numbers))


def dealt_at_random(costs: np.ndarray, ranks: int, each: int, steps: int) -> np.ndarray:
    """(steps, ranks) loads where every rank takes any micro-batches."""
    count = min(steps, len(costs) // (ranks * each))
    return costs[: count * ranks * each].reshape(count, ranks, each).sum(axis=2)


def dealt(plan: BatchPlan, ranks: int, steps: int) -> np.ndarray:
    """(steps, ranks) loads as the plan assigns them, whole windows from the start of the epoch."""
    full = plan.steps_in_epoch(0) - 1
    chosen = np.unique(np.linspace(0, full - 1, min(steps, full)).astype(int))
    loads = []
    for step in chosen.tolist():
        costs = plan.costs(step)
        owners, _ = deal(costs, ranks)
        loads.append(np.bincount(owners, costs, minlength=ranks))
    return np.array(loads)


def order_of(name: str, plan: BatchPlan, rows: int) -> dict[str, Any]:
    """Every sample once, and what is left of an order."""
    used = np.zeros(rows, dtype=np.int8)
    ids_in_order, step_costs, main_rows, kinds = [], [], [], []
    for step in range(plan.steps_in_epoch(0)):
        micro_batches = plan.step(step)
        ids = np.concatenate([m.sample_ids for m in micro_batches])
        used[ids] += 1
        ids_in_order.append(ids[:64])
        step_costs.append(plan.costs(step).mean())
        names, counts = np.unique(
            [f"{m.bucket.resolution} {m.bucket.frames}" for m in micro_batches], return_counts=True
        )
        main_rows.append(names[counts.argmax()])
        kinds.append(len(names))
    wanted = sum(count for _, count in plan.report().per_bucket)
    once = bool(used.max() == 1 and used.sum() == wanted)
    ids = np.concatenate(ids_in_order[:-1]).astype(float)
    first = np.array([step[0] for step in ids_in_order], dtype=float)
    result = {
        "samples": wanted,
        "once": once,
        "neighbouring ids": correlation(ids[1:], ids[:-1]),
        "first ids of neighbouring steps": correlation(first[1:], first[:-1]),
        "costs of neighbouring steps": correlation(np.array(step_costs[1:]), np.array(step_costs[:-1])),
        "position and id": correlation(np.arange(len(first)), first),
        "run length": mean_run(main_rows),
        "run length of a shuffle": mean_run(np.random.default_rng(0).permutation(main_rows)),
        "rows of the table per step": float(np.mean(kinds)),
    }
    print(f"{name}: {wanted} samples in {len(first)} steps, each once: {once}")
    noise = 1 / math.sqrt(len(first))
    print(f"  correlations, noise {noise:.3f} (ids: {1 / math.sqrt(len(ids)):.4f}):", end="")
    print(
        "; ".join(
            f" {key} {value:+.4f}" for key, value in result.items() if "ids" in key or " and " in key or "costs" in key
        )
    )
    runs = f"{result['run length']:.3f}, of a shuffle {result['run length of a shuffle']:.3f}"
    print(f"  steps in a row with the same main row: {runs}; rows per step: {result['rows of the table per step']:.1f}")
    return result


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def mean_run(values: Any) -> float:
    values = np.asarray(values)
    return len(values) / (1 + np.count_nonzero(values[1:] != values[:-1]))


if __name__ == "__main__":
    main()
