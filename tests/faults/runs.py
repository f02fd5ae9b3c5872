"""Runs with something wrong in them, and what became of them."""

import hashlib
import os
import re
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from acceleration.checkpoint import contents, newest
from acceleration.sharding.fsdp import local
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.train import loop, setup
from opensora.train.health.anomaly_guard import TrainingDiverged
from opensora.train.run import Run
from opensora.train.setup import Interrupted, start_run
from opensora.utils import signal_handler
from opensora.utils.metrics_log import read_metrics

ALWAYS = 10**9


@dataclass(frozen=True)
class Fault:
    """``kind`` at update ``step`` of process ``rank`` (-1: all), the first ``times`` times that update is made.

    Kinds that end in ``soon`` count steps from where the run starts, and come ``value`` seconds later.
    """

    kind: str
    step: int = -1
    rank: int = 0
    times: int = 1
    value: float = float("nan")


@dataclass(frozen=True)
class Outcome:
    """What one process saw."""

    end: str  # finished | interrupted | hopeless: ... | before the first step
    step: int = 0
    left_out: int = 0
    judged: tuple[tuple[int, bool], ...] = ()  # (step, made) of every update


def run_with(config: Path, overrides: list[str], faults: tuple[Fault, ...] = ()) -> Outcome:
    """What scripts/diffusion/train.py does, with faults; called on every process."""
    signal_handler.install()
    try:
        for fault in _mine(faults, before_start=True):
            _BEFORE[fault.kind](fault)
        with start_run(load_config(RunConfig, config, overrides)) as run:
            judged: list[tuple[int, bool]] = []
            _note_updates(run, judged)
            for fault in _mine(faults, before_start=False):
                _install(run, fault)
            try:
                end = "finished" if loop.train(run) else "interrupted"
            except TrainingDiverged as error:
                end = f"hopeless: {error}"
            return Outcome(end, run.step, run.guard.skipped, tuple(judged))
    except Interrupted:
        return Outcome("before the first step")
    finally:
        signal_handler.install()  # one that comes after the end must not look like a failure


def digest(folder: Path) -> str:
    """Of every bit of the newest checkpoint: weights, moments, average, and the step."""
    path = newest(folder / "checkpoints")
    assert path is not None
    found = hashlib.sha256(path.name.encode())
    for name, value in sorted(contents(path).items()):
        raw = value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
        found.update(name.encode() + raw)
    return found.hexdigest()


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    """Events of this name in the run's metrics."""
    return [event for event in read_metrics(folder / "metrics.jsonl")[1] if event["event"] == name]


def descendants(pid: int) -> list[int]:
    """All processes that a process started, and they."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def alive(pid: int) -> bool:
    """Whether the process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _mine(faults: tuple[Fault, ...], *, before_start: bool) -> list[Fault]:
    rank = int(os.environ.get("RANK", 0))
    return [fault for fault in faults if fault.rank in (rank, -1) and (fault.kind in _BEFORE) == before_start]


def _note_updates(run: Run, judged: list[tuple[int, bool]]) -> None:
    step = run.engine.step

    def noting(number: int, accept: Any = None) -> Any:
        def asked(norm: Any) -> bool:
            judged.append((number, accept(norm)))
            return judged[-1][1]

        return step(number, asked)

    run.engine.step = noting  # type: ignore[method-assign]


def _install(run: Run, fault: Fault) -> None:
    left = [fault.times]
    wanted = fault.step + (run.step if fault.kind.endswith("soon") else 0)

    def due() -> bool:
        left[0] -= run.step == wanted
        return run.step == wanted and left[0] >= 0

    prepare, backward, sample, zero_loss = run.prepare, run.engine.backward, loop.validate, run.zero_loss
    save = run.checkpoints.save

    class Preparing:
        """A run's Preparation that does something after it."""

        def __call__(self, batch: Any, step: int) -> Any:
            tokens = prepare(batch, step)
            if fault.kind == "slow":
                time.sleep(fault.value)
            elif fault.kind in _AT_A_STEP and due():
                _AT_A_STEP[fault.kind](run, fault, tokens)
            return tokens

        def __getattr__(self, name: str) -> Any:
            return getattr(prepare, name)

    def going_back(share: Any, *, last_microbatch: bool) -> None:
        backward(share, last_microbatch=last_microbatch)
        if fault.kind == "gradient" and last_microbatch and due():
            _first_held(run.engine.trained.values(), grad=True).fill_(fault.value)  # type: ignore[attr-defined]

    def starting_loss() -> Any:
        return zero_loss() + (fault.value if fault.kind == "loss" and due() else 0.0)

    def saving(*args: Any) -> None:
        if fault.kind == "term in save" and due():
            os.kill(os.getpid(), signal.SIGTERM)
        save(*args)

    def sampling(run: Run) -> None:
        sample(run)
        if fault.kind == "term in samples" and due():
            os.kill(os.getpid(), signal.SIGTERM)

    run.prepare, run.engine.backward, run.zero_loss = Preparing(), going_back, starting_loss  # type: ignore
    run.checkpoints.save, loop.validate = saving, sampling  # type: ignore


def _first_held(parameters: Any, *, grad: bool = False) -> torch.Tensor:
    """Something this process holds."""
    held = (local(p.grad if grad else p.detach()) for p in parameters if p.grad is not None or not grad)
    return next(x for x in held if x.numel())


def _nan_target(run: Run, fault: Fault, tokens: Any) -> None:
    for target in tokens.targets.values():
        target.fill_(fault.value)


def _nan_weight(run: Run, fault: Fault, tokens: Any) -> None:
    _first_held(p for _, p in run.engine.master_params()).view(-1)[0] = fault.value


def _flip_a_bit(run: Run, fault: Fault, tokens: Any) -> None:
    weight = _first_held(p for _, p in run.engine.master_params())
    weight.view(-1)[:1].view(torch.int64).bitwise_xor_(1 << int(fault.value))


def _hang_in_mismatch(run: Run, fault: Fault, tokens: Any) -> None:
    if dist.get_rank() == 0:
        dist.recv(torch.zeros(1), src=1, tag=7)
    else:
        dist.all_reduce(torch.zeros(1))


_AT_A_STEP: dict[str, Any] = {
    "target": _nan_target,
    "weight": _nan_weight,
    "bit": _flip_a_bit,
    "sleep": lambda run, fault, tokens: time.sleep(1000),
    "lock": lambda run, fault, tokens: re.match("(a+)+$", "a" * 60 + "b"),  # for ever, with the interpreter's lock
    "stop": lambda run, fault, tokens: os.kill(os.getpid(), signal.SIGSTOP),
    "mismatch": _hang_in_mismatch,
    "term soon": lambda run, fault, tokens: _later(signal.SIGTERM, fault),
    "kill soon": lambda run, fault, tokens: _later(signal.SIGKILL, fault),
}


def _later(number: int, fault: Fault) -> None:
    timer = threading.Timer(fault.value, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def _in_resume(action: Any) -> Any:
    def install(fault: Fault) -> None:
        resume = setup.resume

        def resuming(*args: Any) -> Any:
            action()
            return resume(*args)

        setup.resume = resuming

    return install


_BEFORE: dict[str, Any] = {
    "term later": lambda fault: _later(signal.SIGTERM, fault),
    "kill later": lambda fault: _later(signal.SIGKILL, fault),
    "term in load": _in_resume(lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "slow load": _in_resume(lambda: time.sleep(1000)),
}
