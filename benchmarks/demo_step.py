"""Where the time of a training step goes: seconds per phase, mean over steps, on the slowest and the mean process.

    bash launch/torchrun.sh 2 benchmarks/demo_step.py configs/train/demo.yaml data.table=.../train.csv [overrides]

Runs ``--steps`` updates of the given configuration in a temporary output folder and saves nothing. Communication is
measured inside the phases it belongs to (the time spent in torch.distributed calls), so it is a part of them.
"""

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from opensora.config import RunConfig, config_from_argv, run_cli
from opensora.train.run import Run
from opensora.train.setup import start_run
from opensora.train.step import loss_share

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


def main(argv: list[str]) -> int:
    steps = 20
    if "--steps" in argv:
        at = argv.index("--steps")
        steps = int(argv[at + 1])
        argv = argv[:at] + argv[at + 2 :]
    with tempfile.TemporaryDirectory() as folder:
        quiet = [f"output={folder}", f"train.steps={steps + WARMUP}", "train.resume=none", "optim.warmup_steps=0"]
        with start_run(config_from_argv(RunConfig, [*argv, *quiet], __doc__ or "")) as run:
            clock = Clock(run.runtime.device)
            time_communication(clock)
            for _ in range(WARMUP):
                one_step(run, clock)
            clock.seconds.clear()
            tokens = sum(run.tokens(run.step + i) for i in range(steps))
            started = time.perf_counter()
            for _ in range(steps):
                one_step(run, clock)
            wall = (time.perf_counter() - started) / steps
            every: list[Any] = [None] * run.runtime.world_size
            dist.all_gather_object(every, {phase: clock.seconds[phase] / steps for phase in PHASES})
            if run.runtime.is_main:
                report(every, wall, tokens / steps, run)
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
    run_cli(main)
