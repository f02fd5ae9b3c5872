"""Where the time of a training step goes: seconds per phase, mean over steps, on the slowest and the mean process.

    python -m benchmarks.demo_step configs/train/demo.yaml data.table=TABLE [--processes 2] [--steps 20] [overrides]

Runs a few updates of the given configuration in a temporary output folder and keeps nothing. Communication is
measured inside the phases it belongs to (the time spent in torch.distributed calls), so it is a part of them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opensora.cli.main import run_cli
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.train.preparation import loss_share
from opensora.train.run import Run
from opensora.train.setup import start_run

ROOT = Path(__file__).resolve().parent.parent
WARMUP = 3
PHASES = ("data", "prepare", "forward", "backward", "optimizer", "communication")
EXCHANGES = ("all_to_all_single", "all_gather", "all_gather_single", "all_gather_into_tensor", "all_reduce")
REDUCTIONS = ("reduce_scatter_tensor", "reduce_scatter_single")


class Clock:
    """Adds up seconds by phase; waits for the device before it reads the time."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device

    def measure(self, phase: str, call: Callable[[], Any]) -> Any:
        started = self._now()
        result = call()
        self.seconds[phase] += self._now() - started
        return result

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def time_communication(clock: Clock) -> None:
    """Wrap what FSDP2 and our own exchanges call."""
    for name in (*EXCHANGES, *REDUCTIONS):
        original = getattr(dist, name, None)
        if original is not None:

            def timed(*args: Any, _original: Callable[..., Any] = original, **kwargs: Any) -> Any:
                return clock.measure("communication", lambda: _original(*args, **kwargs))

            setattr(dist, name, timed)


def one_step(run: Run, clock: Clock) -> None:
    """The body of opensora/train/loop.py with a clock around every line."""
    step = run.step
    run.engine.set_lr(run.lr_at(step))
    elements = run.data.global_elements(step)
    batches = run.data.microbatches(step)
    while True:
        item = clock.measure("data", lambda: next(batches, None))
        if item is None:
            break
        batch, is_last = item
        tokens = clock.measure("prepare", lambda batch=batch: run.prepare(batch, step))
        share = clock.measure("forward", lambda tokens=tokens: loss_share(run.engine.model, tokens, elements))
        clock.measure("backward", lambda share=share, last=is_last: run.engine.backward(share, last_microbatch=last))
    clock.measure("optimizer", lambda: run.engine.step(step))
    run.step += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of a training run")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help=f"updates to measure, after {WARMUP} to warm up")
    parser.add_argument("--output", help=argparse.SUPPRESS)  # given to the processes that measure
    args = parser.parse_intermixed_args()
    if args.steps < 1 or args.processes < 1:
        parser.error("--steps and --processes must be integers >= 1")
    if args.output:
        run_cli(lambda _: measure(args))
    with tempfile.TemporaryDirectory() as folder:
        words = ["launch/torchrun.sh", args.processes, Path(__file__), "--output", folder, "--steps", args.steps]
        return subprocess.run(["bash", *map(str, words), args.config, *args.overrides], cwd=ROOT).returncode


def measure(args: argparse.Namespace) -> int:
    """One of the processes. The folder comes from their parent, so that it is the same for all."""
    quiet = [f"output={args.output}", f"train.steps={args.steps + WARMUP}", "train.resume=none", "optim.warmup_steps=0"]
    with start_run(load_config(RunConfig, args.config, [*args.overrides, *quiet])) as run:
        clock = Clock(run.runtime.device)
        time_communication(clock)
        for _ in range(WARMUP):
            one_step(run, clock)
        clock.seconds.clear()
        tokens = sum(run.tokens(run.step + i) for i in range(args.steps))
        started = time.perf_counter()
        for _ in range(args.steps):
            one_step(run, clock)
        wall = (time.perf_counter() - started) / args.steps
        every: list[Any] = [None] * run.runtime.world_size
        dist.all_gather_object(every, {phase: clock.seconds[phase] / args.steps for phase in PHASES})
        if run.runtime.is_main:
            report(every, wall, tokens / args.steps, run)
    return 0


def report(every: list[dict[str, float]], wall: float, tokens: float, run: Run) -> None:
    """The table, and one line for machines."""
    print(f"\n{wall:.3f} s a step, {tokens / wall:.0f} image tokens/s, {run.runtime.world_size} processes")
    print(f"{'phase':<16}{'mean s':>10}{'max s':>10}{'share':>9}")
    for phase in PHASES:
        values = [seconds[phase] for seconds in every]
        mean = sum(values) / len(values)
        label = f"({phase})" if phase == "communication" else phase
        print(f"{label:<16}{mean:>10.4f}{max(values):>10.4f}{mean / wall:>9.1%}")
    means = {phase: sum(seconds[phase] for seconds in every) / len(every) for phase in PHASES}
    print(json.dumps({"benchmark": "demo_step", "step_s": wall, "tokens_per_s": tokens / wall, **means}))


if __name__ == "__main__":
    sys.exit(main())
