"""How evenly a mixed training run loads its processes: the time each computes per step, on real clips and stills.

    python -m benchmarks.step_times --media FOLDER [--steps 120] [--processes 2]

Trains a small model on the clips and images under FOLDER (indexed first) at three resolutions, as stills and at three
lengths, twice: with the cost of micro-batches as it is by default, and as ``calibrate`` finds it in the first run.
Time is that of the training thread on its processor, which does not count while it waits for a peer or another program;
decoding is in processes of its own. Figures are medians over steps with all their micro-batches, after ten to warm up.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from opensora.cli.main import run_cli
from opensora.config.load import load_config, to_yaml
from opensora.config.run import RunConfig
from opensora.planner.cost_fit import calibrate
from opensora.train.loop import train
from opensora.train.setup import start_run
from opensora.train.step_data import open_data

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 10
# A third of what fits goes to each resolution, and of the clips there a third to each length.
BUCKETS = """
48px: {1: [1.0, 20], 5: [1.0, 10], 9: [[1.0, 0.5], 6], 17: [[1.0, 0.33], 3]}
64px: {1: [0.5, 12], 5: [0.5, 6], 9: [[0.5, 0.5], 4], 17: [[0.5, 0.33], 2]}
96px: {1: [0.33, 5], 5: [0.33, 3], 9: [[0.33, 0.5], 2], 17: [[0.33, 0.33], 1]}
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--media", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--copies", type=int, default=40, help="times each file is in the table")
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps}: must be more than the {WARM_UP} that warm up")
    if args.worker:
        run_cli(lambda _: work(load_config(RunConfig, args.worker[0], args.worker[1:])))
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


def compare(args: argparse.Namespace, folder: Path) -> None:
    table = folder / "clips.csv"
    command([sys.executable, "-m", "data_pipeline.index", args.media, "--out", table])
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *rows * args.copies]) + "\n")
    config = folder / "config.yaml"
    config.write_text(
        f"include: [{ROOT / 'configs/train/demo.yaml'}]\noutput: {folder}\n"
        f"data: {{table: {table}, micro_batches: {4 * args.processes}, balance_group: 4, probability: accept}}\n"
        f"parallel: {{zero: 1, mesh: {{ulysses: 1}}, recompute: {{kind: none}}}}\n"
        f"train: {{steps: {args.steps}, log_every: 1, checkpoint_every: 100000, export: false}}\n"
    )
    buckets = f"data.buckets={{{', '.join(BUCKETS.split(chr(10))[1:-1])}}}"
    first = run(config, args.processes, [buckets, "name=plain"])
    cfg = load_config(RunConfig, config, [buckets, "name=plain"])
    _, plan = open_data(cfg)
    cost, error = calibrate(plan, cfg.folder / "metrics.jsonl", args.processes)
    print(f"calibrated: {to_yaml(cost).strip()} ({100 * error:.1f} % off on average)".replace("\n", ", "))
    terms = ", ".join(f"{name}: {value}" for name, value in vars(cost).items())
    second = run(config, args.processes, [buckets, "name=calibrated", f"data.cost={{{terms}}}"])
    found = {"default cost": report("default cost", first), "calibrated": report("calibrated", second)}
    print(json.dumps({"benchmark": "step_times", "processes": args.processes, "steps": args.steps, **found}))


def run(config: Path, processes: int, overrides: list[str]) -> dict[str, Any]:
    worker = [Path(__file__), "--media", ".", "--worker", config, *overrides]
    command(["bash", ROOT / "launch/torchrun.sh", processes, *worker])
    name = next(word.removeprefix("name=") for word in overrides if word.startswith("name="))
    found: dict[str, Any] = json.loads((config.parent / name / "step_times.json").read_text())
    return found


def command(words: list[object]) -> None:
    subprocess.run([str(word) for word in words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def work(cfg: RunConfig) -> None:
    """In every process: train, and note how long this process computed in each step."""
    seconds: list[float] = []
    with start_run(cfg) as running:
        step, last = running.engine.step, time.thread_time()

        def timed(*args: Any) -> Any:
            nonlocal last
            found = step(*args)
            now = time.thread_time()
            seconds.append(now - last)
            last = now
            return found

        running.engine.step = timed  # type: ignore[method-assign]
        train(running)
        every: list[Any] = [None] * running.runtime.world_size
        dist.all_gather_object(every, seconds)
        if running.runtime.is_main:
            plan = running.data.plan
            full = [len(plan.step(number)) == cfg.data.micro_batches for number in range(cfg.train.steps)]
            buckets = {str(bucket) for number in range(cfg.train.steps) for bucket in plan.shapes(number)}
            content = {"seconds": every, "full": full, "buckets": sorted(buckets)}
            (cfg.folder / "step_times.json").write_text(json.dumps(content))


def report(title: str, found: dict[str, Any]) -> dict[str, float]:
    """Print what one run showed."""
    seconds = np.array(found["seconds"])[:, WARM_UP:]  # (processes, steps)
    seconds = seconds[:, np.array(found["full"])[WARM_UP:]]
    medians = np.median(seconds, axis=1)
    apart = float(medians.max() / medians.min() - 1)
    per_step = float(np.median(seconds.max(axis=0) / seconds.mean(axis=0) - 1))
    spread = float(np.percentile(seconds.mean(axis=0), 95) / np.percentile(seconds.mean(axis=0), 5) - 1)
    print(
        f"{title:<14} {seconds.shape[1]} steps of {len(found['buckets'])} buckets: median seconds per process "
        f"{', '.join(f'{x:.3f}' for x in medians)}, {100 * apart:.1f} % apart; slowest above the mean in a step "
        f"{100 * per_step:.1f} % (median); steps differ by {100 * spread:.0f} % (5th to 95th percentile)"
    )
    return {"medians_apart": apart, "slowest_above_mean": per_step, "steps_differ": spread}


if __name__ == "__main__":
    main()
