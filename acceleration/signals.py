"""A polite stop: signals set a flag, all processes agree on it at a step boundary."""

import signal

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)  # SLURM and torchrun, a terminal, SLURM's early warning


class StopRequest:
    """Remembers that this process was asked to stop; installing it replaces the signals' default of dying."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        # CPU tensors: agreeing must not wait for the GPU to finish the step.
        self._group = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None

    def _remember(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name

    def agreed(self) -> bool:
        """True on every process as soon as one was asked. Collective."""
        flag = torch.tensor(int(self.name is not None))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def release(self) -> None:
        """Signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
