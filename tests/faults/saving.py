"""Processes that save, one of which meets a fault at a chosen file system call, by strace.

Each process is forked from a server that has imported torch, saves steps 1, 2 and 3, and has the tracer attached for
step 2 only. What is in the folder is judged from outside, by reading every byte of it.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist

from acceleration.checkpoint import CheckpointManager, atomic_dir, contents, tensor_shards
from acceleration.checkpoint.listing import candidates

# Every call that makes, fills, flushes, renames or removes a file, or could be refused for want of space.
CALLS = (
    "openat",
    "mkdir",
    "rename",
    "unlink",
    "unlinkat",
    "rmdir",
    "write",
    "fsync",
    "ftruncate",
    "memfd_create",
    "close",
)
Where: TypeAlias = Literal["training", "writing"]  # the process that trains, or the one that writes for it
PATIENCE_S = 60.0
PRELOAD = ["torch", "torch.distributed", "tests.faults.saving"]
ROWS, COLUMNS = 7, 5


@dataclass(frozen=True, kw_only=True)
class Fault:
    """``what`` happens the ``number``-th time (from 1) that one process makes ``call`` while it saves."""

    what: str  # in strace's words: "signal=KILL", "error=ENOSPC"
    call: str
    number: int
    where: Where = "training"
    rank: int = 0


NO_FAULT = Fault(what="error=EIO", call="write", number=65535)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of three saves."""

    fired: bool  # False: there are fewer such calls
    killed: bool  # the training process did not live to tell
    newest: tuple[int, ...]  # the newest good step after saves 2 and 3; if killed, what was there afterwards
    said: tuple[str, ...]


@cache
def why_not_here() -> str:
    """Why calls cannot be tampered with on this machine; empty if they can."""
    if sys.platform != "linux" or shutil.which("strace") is None:
        return "needs strace"
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if os.getuid() and scope.is_file() and scope.read_text().strip() != "0":
        return "needs leave to trace (kernel.yama.ptrace_scope=0)"
    done = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True)
    return "" if done.returncode == 0 else "needs leave to trace"


def values(step: int) -> dict[str, Any]:
    """What a checkpoint of ``step`` holds, whole."""
    count = ROWS * COLUMNS
    weight = torch.arange(count, dtype=torch.float64).view(ROWS, COLUMNS) / 7 + step
    return {
        "model.weight": weight,
        "model.bias": torch.full((3,), float(step), dtype=torch.bfloat16),
        "optimizer.state.weight.exp_avg": weight**2,
        "optimizer.state.weight.step": torch.tensor(float(step)),
        "optimizer.param_groups.weight.lr": 0.1 * step,
    }


def state(step: int, rank: int, world: int) -> dict[str, dict[str, Any]]:
    """The same as one process holds it: matrices are cut in runs of elements, all else is the same everywhere."""
    sections: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}}
    for key, value in values(step).items():
        section, _, name = key.partition(".")
        if isinstance(value, torch.Tensor) and value.dim() == 2:
            size = -(-value.numel() // world)
            mine = value.flatten()[rank * size : (rank + 1) * size].clone()
            value = tensor_shards.run(mine, value.shape, rank * size)
        sections[section][name] = value
    return sections


def newest_good(folder: Path) -> int:
    """The newest step that holds what was saved as it, bit for bit.

    Raises:
        AssertionError: something is called a checkpoint and is none, or holds anything else than its step.
    """
    steps = candidates(folder)
    for path in steps:
        manifest = atomic_dir.read_manifest(path)
        assert manifest is not None, f"{path} is not whole"
        assert atomic_dir.damaged(path, manifest["files"]) is None, f"{path} is damaged"
        found, wanted = contents(path), values(manifest["step"])
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value)), f"{path}: {key}"
        assert path.name == f"step-{manifest['step']:08d}"
    return int(steps[-1].name[-8:])


def run(place: Path, world: int, in_background: bool, fault: Fault, keep: int = 1) -> Outcome:
    """Save three times in ``place``/checkpoints on ``world`` processes with one fault in the second."""
    place.mkdir(exist_ok=True)
    (place / "store").unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    processes = [
        context.Process(target=_rank, args=(rank, world, place, in_background, fault, keep)) for rank in range(world)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE_S)
            assert process.exitcode is not None, f"still there after {PATIENCE_S} s: {fault}"
    finally:
        for process in processes:
            process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    if codes[fault.rank] == -signal.SIGKILL:
        return Outcome(fired=True, killed=True, newest=(newest_good(place / "checkpoints"),), said=())
    error = place / "error"
    assert codes == [0] * world, f"{fault}: {codes} {error.read_text() if error.is_file() else ''}"
    log = (place / "trace").read_text()
    fired = "INJECTED" in log or "killed by SIGKILL" in log
    told = json.loads((place / "told").read_text())
    return Outcome(fired=fired, killed=False, newest=tuple(told["newest"]), said=tuple(told["said"]))


def every_call(
    folder: Path, what: str, *, world: int = 1, in_background: bool = False, where: Where = "training", rank: int = 0
) -> Iterator[tuple[Fault, Outcome, Path]]:
    """The fault at every call of a save, one run each; with the run's folder."""
    for call in CALLS:
        for number in count(1):
            fault = Fault(what=what, call=call, number=number, where=where, rank=rank)
            place = folder / f"{call}-{number}"
            outcome = run(place, world, in_background, fault)
            if not outcome.fired:
                assert outcome.newest == (2, 3), outcome
                break
            yield fault, outcome, place


def _rank(rank: int, world: int, place: Path, in_background: bool, fault: Fault, keep: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{place}/store", rank=rank, world_size=world, timeout=timedelta(seconds=20)
        )
        _save_three(rank, world, place, in_background, fault, keep)
        dist.barrier()
    except BaseException as error:  # a peer was killed: to leave the group in order can hang
        with (place / "error").open("a") as file:
            file.write(f"rank {rank}: {error!r}\n")
        os._exit(1)
    os._exit(0)


def _save_three(rank: int, world: int, place: Path, in_background: bool, fault: Fault, keep: int) -> None:
    folder, said, found = place / "checkpoints", [], []
    manager = CheckpointManager(folder, keep=keep, in_background=in_background, report=said.append)
    for step in (1, 2, 3):
        tracer = _attach(fault, place / "trace") if step == 2 and rank == fault.rank else None
        manager.save(step, state(step, rank, world), {})
        manager.wait()
        if tracer:
            tracer.terminate()
            tracer.wait()
        found.append(newest_good(folder) if rank == 0 else 0)
        dist.barrier()  # nobody writes while rank 0 looks
    manager.close()
    if rank == 0:
        (place / "told").write_text(json.dumps({"newest": found[1:], "said": said}))


def _attach(fault: Fault, log: Path) -> "subprocess.Popen[str]":
    """A tracer of this process, or of its only child, that is at work when this returns."""
    target = os.getpid()
    children = Path(f"/proc/self/task/{target}/children").read_text().split()
    (log.parent / "writers").write_text(" ".join(children))
    if fault.where == "writing":
        target = int(children[0])
    inject = f"inject={fault.call}:{fault.what}:when={fault.number}"
    words = ["strace", "-p", str(target), "-o", str(log), "-e", f"trace={fault.call}", "-e", inject]
    # It attaches when told: before, starting it closes pipes here, and on a busy machine these calls would be counted.
    tracer = subprocess.Popen(
        ["sh", "-c", 'read go; exec "$@"', "sh", *words], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert tracer.stdin is not None and tracer.stderr is not None
    tracer.stdin.write("go\n")
    tracer.stdin.flush()
    attached = tracer.stderr.readline()
    assert "attached" in attached, attached
    return tracer
