"""How long a save holds training up, how fast bytes are verified, how long a resume takes; DCP beside it, in one run.

    python -m benchmarks.checkpoint [--gib 1.0] [--processes 2] [--saves 4] [--folder DIR]

The state is that of a run with AdamW and an average: four fp32 tensors per parameter, rows shared out over gloo
processes. ``stall`` is the time that a save holds the training loop up: in the background the copy, after which the
state may change, and at its end the commit. ``poll`` is what every step in between pays to see that it has not ended,
processes agreeing. ``durable`` is when the checkpoint is complete on the disk. Meanwhile each process multiplies
matrices, as training would; ``slowed`` is how much longer that takes while a save is written beside it. The first save
of each kind, which allocates memory and starts processes, is a row of its own. Ours reads every file back and compares
digests before it counts; DCP (torch.distributed.checkpoint: save, and async_save by a thread) does not.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from acceleration.checkpoint import CheckpointManager
from tests.dist.harness import run_distributed

Row = dict[str, float]
COLUMNS = 2048
PARAMETERS = 32
STEP_S = 0.02  # about how long a step of the pretended training takes
KINDS = ("ours, at once", "ours, in the background", "DCP, at once", "DCP, in the background")


def state_of(gib: float) -> dict[str, dict[str, Tensor]]:
    """``gib`` over all processes: weights, two moments and the average of equal matrices."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = int(gib * 2**30 / (4 * 4 * COLUMNS * PARAMETERS * dist.get_world_size()))

    def sections(kind: str) -> dict[str, Tensor]:
        return {
            f"block.{index}.{kind}": DTensor.from_local(torch.randn(rows, COLUMNS), mesh, [Shard(0)], run_check=False)
            for index in range(PARAMETERS)
        }

    moments = {**sections("exp_avg"), **sections("exp_avg_sq")}
    return {"model": sections("weight"), "optimizer": moments, "ema": sections("weight")}


class Work:
    """What a training step would do, of about ``STEP_S``; how long it took on average."""

    def __init__(self) -> None:
        self.matrix, self.turns = torch.randn(256, 256), 1
        while self._agreed(self.step() < STEP_S):
            self.turns *= 2

    def _agreed(self, value: bool) -> bool:
        mine = torch.tensor(int(value))
        dist.broadcast(mine, src=0)
        return bool(mine)

    def step(self) -> float:
        """Ends on all processes at once, as the reduction of gradients makes it."""
        start = time.monotonic()
        for _ in range(self.turns):
            self.matrix @ self.matrix
        dist.barrier()
        return time.monotonic() - start


def measure(gib: float, folder: Path, saves: int) -> dict[str, Any]:
    """One process's view; rank 0's is reported. Every kind saves the same state."""
    state, work = state_of(gib), Work()
    alone = median(work.step() for _ in range(50))
    table: dict[str, list[Row]] = {}
    for kind in KINDS:
        place = folder / kind.replace(", ", "-").replace(" ", "-")
        save, poll, close = saver(kind, place, state)
        table[kind] = []
        for number in range(saves):
            change(state)
            dist.barrier()
            start = time.monotonic()
            save(number)
            stall = time.monotonic() - start
            steps, polls = [], []
            while True:
                before = time.monotonic()
                done = poll()
                polls.append(time.monotonic() - before)
                if done:
                    break
                steps.append(work.step())
            row = {"stall_s": stall + polls[-1], "durable_s": time.monotonic() - start}
            if steps:
                row |= {"poll_s": median(polls[:-1]), "slowed": median(steps) / alone}
            table[kind].append(row)
        close()
    return {"rows": table, "reading": reading(state, folder), "bytes": total(state)}


def saver(
    kind: str, place: Path, state: dict[str, dict[str, Tensor]]
) -> tuple[Callable[[int], Any], Callable[[], bool], Callable[[], None]]:
    """(begin a save, see whether it is complete, end)."""
    if kind.startswith("ours"):
        manager = CheckpointManager(place, keep=1, in_background=kind.endswith("background"))

        def complete() -> bool:
            manager.poll()
            return manager._pending is None

        return lambda number: manager.save(number, state, {}), complete, manager.close
    if kind.endswith("at once"):
        return lambda number: dcp.save(state, checkpoint_id=place / str(number)), lambda: True, lambda: None
    running: list[Any] = []
    group = dist.new_group(backend="gloo")  # its thread must not meet the main one's calls

    def begin(number: int) -> None:
        running[:] = [dcp.async_save(state, checkpoint_id=place / str(number), process_group=group)]

    def finished() -> bool:
        done = torch.tensor(int(running[0].done()))
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return bool(done)

    return begin, finished, lambda: None


def reading(state: dict[str, dict[str, Tensor]], folder: Path) -> Row:
    """Seconds to find the newest good checkpoint by its digests, and to load it; DCP's load beside it."""
    place = folder / "ours-in-the-background"
    manager = CheckpointManager(place, keep=1)
    times: dict[str, float] = {}
    start = time.monotonic()
    path = manager.latest()
    times["verify_s"] = time.monotonic() - start
    assert path is not None
    expected = state["model"]["block.0.weight"].to_local().clone()  # type: ignore[attr-defined]
    state["model"]["block.0.weight"].zero_()
    start = time.monotonic()
    manager.load(path, state)  # type: ignore[arg-type]
    times["load_s"] = time.monotonic() - start
    assert not torch.equal(expected, torch.zeros_like(expected))
    newest = max((folder / "DCP-at-once").iterdir(), key=lambda path: int(path.name))
    dist.barrier()
    start = time.monotonic()
    dcp.load(state, checkpoint_id=newest)
    times["dcp_load_s"] = time.monotonic() - start
    return times


def change(state: dict[str, dict[str, Tensor]]) -> None:
    """As an update would."""
    for section in state.values():
        for tensor in section.values():
            tensor.to_local().add_(1e-3)  # type: ignore[attr-defined]


def total(state: dict[str, dict[str, Tensor]]) -> int:
    return sum(t.numel() * t.element_size() for section in state.values() for t in section.values())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument(
        "--folder", type=Path, help="where to save, on the disk to be measured; a folder of its own in it"
    )
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(dir=args.folder, prefix="checkpoints-"))
    try:
        result = run_distributed(measure, args.processes, args.gib, folder, args.saves, timeout=1800)[0]
    finally:
        shutil.rmtree(folder)
    size = result["bytes"]
    print(f"{size / 1e9:.2f} GB over {args.processes} processes, on {folder.parent}\n")
    print(f"{'':34}{'stall s':>9}{'durable s':>11}{'poll ms':>9}{'slowed':>8}")
    later: dict[str, Row] = {}
    for kind, rows in result["rows"].items():
        later[kind] = {name: median(row[name] for row in rows[1:] if name in row) for name in rows[-1]}
        for when, row in (("first", rows[0]), ("later", later[kind])):
            beside = f"{row['poll_s'] * 1e3:>9.1f}{row['slowed']:>7.2f}x" if "slowed" in row else ""
            print(f"{kind:26}{when:8}{row['stall_s']:>9.3f}{row['durable_s']:>11.3f}{beside}")
    ours, at_once, plain, thread = (later[kind]["stall_s"] for kind in KINDS[1::-1] + KINDS[2:])
    read = result["reading"]
    print(
        f"\nin the background holds training up {at_once / ours:.1f} times less than at once, {plain / ours:.1f} times "
        f"less than DCP's save, {thread / ours:.1f} times less than its async_save"
    )
    print(
        f"verified {size / read['verify_s'] / 1e9:.2f} GB/s; resume: {read['verify_s']:.2f} s to verify, "
        f"{read['load_s']:.2f} s to load (DCP: {read['dcp_load_s']:.2f} s, unverified)"
    )
    print(json.dumps({"bytes": size, "processes": args.processes, "later": later, **read}))


if __name__ == "__main__":
    main()
