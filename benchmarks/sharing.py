"""What does it save to cut long clips over all processes of the ulysses axis, and to give short ones out whole?

    python -m benchmarks.sharing [--rows 1000000] [--steps 100]

By the cost model (``buckets/cost.py``) of the 11B model, with and without ``parallel.mesh.dynamic``: a round
of micro-batches lasts as long as its longest on any process, a step as long as its rounds. Everything is in image
tokens on one process, 78 us on an H100 at half its peak. Cases:

    exchange    what moving a token takes: 0.1 within a node (NVLink), 1.0 where the axis spans nodes (50 GB/s each)
    start       what four exchanges per layer take to start: 100 tokens
    encode      T5-XXL on every process that has a part of a sample: 130 tokens, or 0 with stored features
    overhead    of every micro-batch on every process, however small: gathered weights, launches

Tables are configs/data/*.yaml on synthetic clips (lognormal durations, a fifth images), 224 processes, 4 micro-batches
per data-parallel rank and step, data.balance_group=1. ``even`` has the largest powers of two up to the table's
batch sizes: samples are given out whole where they divide.
Prints one line per case and one JSON line.
"""

import argparse
import json
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from benchmarks.clip_columns import clip_columns
from opensora.datasets.buckets.cost import CostConfig
from opensora.datasets.config import DataConfig
from opensora.datasets.plan.balance import deal
from opensora.datasets.plan.batch_plan import BatchPlan
from opensora.datasets.plan.dynamic_sp import SequenceSharing
from opensora.datasets.table.manifest import ClipTable, TextsInMemory

PROCESSES, EACH = 224, 4
TEXT_TOKENS = 512
MULTIPLE = 16
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "data"
# (exchange, encode_tokens, overhead)
COSTS = ((0.1, 0, 0), (0.1, 0, 1000), (0.1, 130, 0), (1.0, 0, 0), (1.0, 130, 1000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=100, help="steps to average over, spread over the epoch")
    args = parser.parse_args()
    nothing = pa.chunked_array([[""]])
    table = ClipTable(
        **clip_columns(args.rows, 0),
        texts=TextsInMemory(nothing, nothing),
        folders=("",),
        first_rows=np.zeros(1, np.int64),
    )
    heads = f"{'table':<12}{'ulysses':>8}{'exchange':>9}{'encode':>7}{'overhead':>9}"
    print(f"{heads}{'saved':>8}{'best':>9}  samples by processes that cut them")
    found = []
    for name, ulysses, (exchange, encode, overhead) in product(("stage1", "stage2", "stage2 even"), (4, 8), COSTS):
        # The unit of the cost is a token on all processes of the axis: on one it takes as many times longer.
        cost = CostConfig(per_batch=overhead * ulysses, exchange=exchange, encode_tokens=encode)
        plan = BatchPlan(table, config(name, PROCESSES // ulysses * EACH, cost), MULTIPLE, 0)
        case = {"table": name, "ulysses": ulysses, "exchange": exchange, "encode": encode, "overhead": overhead}
        found.append(case | saved(plan, PROCESSES // ulysses, ulysses, args.steps))
        print(line(found[-1]), flush=True)
    print(json.dumps({"benchmark": "sharing", "rows": args.rows, "steps": args.steps, "results": found}))


def config(name: str, micro_batches: int, cost: CostConfig) -> DataConfig:
    """A table as published, or with batch sizes that are powers of two."""
    name, *even = name.split()
    buckets = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["data"]["buckets"]
    if even:
        buckets = {
            size: {n: [p, 2 ** (b.bit_length() - 1)] for n, (p, b) in rows.items()} for size, rows in buckets.items()
        }
    return DataConfig(
        buckets=buckets,
        micro_batches=micro_batches,
        unused_rows="report",
        cost=cost,
    )


def saved(plan: BatchPlan, ranks: int, ulysses: int, steps: int) -> dict[str, Any]:
    """The share of the time that the choice saves on average and in the best step, and what was chosen."""
    choice = SequenceSharing(degree=ulysses, text_tokens=TEXT_TOKENS)
    full = plan.steps_in_epoch(0) - 1
    times = []
    degrees: Counter[int] = Counter()
    for step in np.unique(np.linspace(0, full - 1, min(steps, full)).astype(int)).tolist():
        whole, buckets = plan._step(step), plan._buckets
        features = buckets.features(whole.bucket, whole.sizes)
        without = buckets._cfg.cost.shared(features, ulysses, ulysses)
        chosen, with_it = buckets.shared(whole.bucket, whole.sizes, choice)
        times.append((duration(without, ranks), duration(with_it, ranks)))
        for degree, samples in zip(chosen.tolist(), whole.sizes.tolist(), strict=True):
            degrees[degree] += samples
    both = np.array(times)
    return {
        "saved": round(1 - float(both[:, 1].sum() / both[:, 0].sum()), 4),
        "most": round(float((1 - both[:, 1] / both[:, 0]).max()), 4),
        "degrees": {degree: round(degrees[degree] / degrees.total(), 3) for degree in sorted(degrees)},
    }


def duration(times: np.ndarray, ranks: int) -> float:
    """Of a step: every rank does its longest first, and all wait for each other in every round."""
    owners, each = deal(times, ranks)
    rounds = np.zeros((ranks, each))
    for rank in range(ranks):
        mine = np.sort(times[owners == rank])[::-1]
        rounds[rank, : len(mine)] = mine
    return float(rounds.max(axis=0).sum())


def line(case: dict[str, Any]) -> str:
    degrees = ", ".join(f"{degree}: {100 * share:.0f} %" for degree, share in case["degrees"].items())
    return (
        f"{case['table']:<12}{case['ulysses']:>8}{case['exchange']:>9.1f}{case['encode']:>7}{case['overhead']:>9}"
        f"{100 * case['saved']:>7.1f}%{100 * case['most']:>8.1f}%  {degrees}"
    )


if __name__ == "__main__":
    main()
