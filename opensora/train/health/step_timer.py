"""Where this process is and how long it takes there: for the watchdog, and to find the process that all wait for."""

import os
import time
from statistics import median_low

import torch
import torch.distributed as dist

from acceleration.diagnostics.watchdog import Watchdog
from acceleration.distributed.comm_timer import WAITING
from acceleration.distributed.mesh import Mesh
from acceleration.distributed.runtime import Runtime
from opensora.config.run import RunConfig
from opensora.utils.console import announce

STEP = ("data", "encode", "forward", "backward", "update", "agree", "record", "commit")
PAUSES = ("save", "validate", "sample", "export", "replicas", "return")
STARTING = ("start", "build", "load")
MEASURED = STEP[:5]
HANG_SHARE = 0.8  # of the time after which an exchange fails by itself, with less to say
LEAST_S = 0.01  # a process is not slow by less than this per step
IN_A_ROW = 2  # records in which a process is the slowest before it is named


def hang_s(cfg: RunConfig) -> float:
    """Longest that a part of a step, or an exchange, may take; 0: as long as it likes."""
    return HANG_SHARE * cfg.parallel.timeout_s if cfg.guard.hang_s is None else cfg.guard.hang_s


class StepTimer:
    """The current phase of this process. ``enter`` is called at the beginning of every phase."""

    def __init__(self, cfg: RunConfig, watchdog: Watchdog | None = None) -> None:
        guard = cfg.guard
        self._allowed = {**dict.fromkeys(STEP, hang_s(cfg)), **dict.fromkeys(PAUSES, guard.save_s)}
        self._start_s = guard.start_s
        self._started = False  # the first step has been made
        self._straggler = guard.straggler
        self._watchdog = watchdog
        self._name, self._since, self._waited = "start", time.monotonic(), WAITING.seconds
        self._spent = dict.fromkeys(MEASURED, 0.0)  # seconds since the last record, exchanges left out
        self._slow: tuple[int, int] = (-1, 0)  # process, records in a row in which it was the slowest
        if watchdog:
            WAITING.note = watchdog.exchange

    def enter(self, name: str, step: int) -> None:
        """``name`` begins, for update ``step``."""
        now, waited = time.monotonic(), WAITING.seconds
        if self._name in self._spent:
            self._spent[self._name] += now - self._since - (waited - self._waited)
        self._name, self._since, self._waited = name, now, waited
        self._started |= name == "agree"
        if self._watchdog:
            slow_start = not self._started and name not in PAUSES  # compilers and caches are at work
            self._watchdog.phase(name, step, self._start_s if slow_start else self._allowed[name])

    def due(self, mesh: Mesh, steps: int, step: int) -> dict[str, float]:
        """Values for the record of the last ``steps`` steps; announces a process that is slow. Collective.

        Times are those that processes are at work themselves, mean over all: what they wait for each other is not in
        them, where exchanges are waited for (not on GPUs).
        """
        local_times = torch.tensor([self._spent[name] / steps for name in MEASURED], dtype=torch.float64)
        local_times = local_times.to(torch.device(mesh.device_type))
        self._spent = dict.fromkeys(MEASURED, 0.0)
        gathered = [torch.empty_like(local_times) for _ in range(mesh.world_size)]
        dist.all_gather(gathered, local_times)
        times = torch.stack(gathered).cpu()  # (processes, phases)
        means = {f"time/{name}_s": value for name, value in zip(MEASURED, times.mean(0).tolist(), strict=True)}
        return means | self._slowest(times, step)

    def _slowest(self, times: torch.Tensor, step: int) -> dict[str, float]:
        totals = times.sum(1).tolist()
        usual, most = median_low(totals), max(totals)
        rank = totals.index(most)
        self._name_slow(rank, usual, times, step)
        return {"slowest/rank": rank, "slowest/factor": most / max(usual, 1e-9)}

    def _name_slow(self, rank: int, usual: float, times: torch.Tensor, step: int) -> None:
        most = float(times[rank].sum())
        if not self._straggler or most < self._straggler * usual or most - usual < LEAST_S:
            self._slow = (-1, 0)
            return
        self._slow = (rank, self._slow[1] + 1 if self._slow[0] == rank else 1)
        row = self._slow[1]
        if row >= IN_A_ROW and row & (row - 1) == 0:  # 2, 4, 8, ...: not in every record
            usual_times = times.sort(0).values[(len(times) - 1) // 2]
            phase = int((times[rank] - usual_times).argmax())
            announce(
                f"step {step}: rank {rank} is slow: {most:.3g} s of work per step, {most / max(usual, 1e-9):.1f} times "
                f"the median; most of it in {MEASURED[phase]} ({times[rank][phase]:.3g} s, "
                f"median {usual_times[phase]:.3g} s)"
            )

    def close(self) -> None:
        """End the process that watches."""
        WAITING.note = lambda text: None
        if self._watchdog:
            self._watchdog.close()


def start_timer(cfg: RunConfig, runtime: Runtime) -> StepTimer:
    """The account of times, and beside it what ends a run that stands still (see guard.hang_s). Collective."""
    if not hang_s(cfg):
        return StepTimer(cfg)
    name = [f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"]  # a hang of an earlier start must not end this one
    dist.broadcast_object_list(name, src=0)
    folder = (cfg.folder / "hangs" / name[0]).absolute()
    hosts = [peer.host for peer in runtime.peers]
    return StepTimer(cfg, Watchdog(folder, runtime.rank, runtime.world_size, hang_s(cfg), hosts))
