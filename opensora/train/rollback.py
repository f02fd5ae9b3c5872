"""Going back to an older checkpoint within a run."""

from pathlib import Path

import torch.distributed as dist

from acceleration.checkpoint import atomic_dir, steps_in
from acceleration.diagnostics.replica_check import is_finite
from opensora.train.health.anomaly_guard import AnomalyGuard, Rollback, TrainingDiverged
from opensora.train.run import Run
from opensora.train.state.resume import load
from opensora.train.step_data import open_batches
from opensora.utils.console import announce


def roll_back(run: Run, to: Rollback) -> None:
    """Load the newest good checkpoint of at most ``to.before`` updates, and go on from there. Collective.

    Newer checkpoints are removed: a later start would take the way that led into the trouble.

    Raises:
        TrainingDiverged: there is no such checkpoint.
    """
    run.enter("return")
    run.checkpoints.wait()
    for path in _candidates(run, to.before):
        try:
            path = run.checkpoints.named(path)
            load(run.engine, run.checkpoints, path)
        except ValueError as error:
            announce(f"going back: {error}")
            continue
        if is_finite(run.engine, run.mesh):
            break
        announce(f"going back: {path} holds values that are not finite")
    else:
        raise TrainingDiverged(
            f"{to.why}, and no checkpoint of {to.before} steps or fewer to go back to: start anew, change optim.lr"
        )
    manifest = run.checkpoints.manifest(path)
    came_from, loaded = run.step, int(manifest["step"])
    run.step = max(loaded, to.skip_to or 0)
    run.guard = run.guard.rolled_back(AnomalyGuard(run.cfg.guard, loaded, manifest.get("guard")))
    dist.barrier()  # all have read what is removed now
    if run.runtime.is_main:
        for newer in steps_in(run.checkpoints.folder):
            if _step(newer) > loaded:
                atomic_dir.remove(newer)
    run.data.close()
    run.data = open_batches(run.cfg, run.data.index, run.data.plan, run.mesh, run.step)
    run.garbage.collect(everything=True)
    run.begin_record()
    run.metrics.rewind(run.step)
    leap = f", without the samples up to step {run.step}" if to.skip_to else ""
    announce(f"step {came_from}: {to.why}: back to {path.name}{leap}")
    run.metrics.log_event("went_back", run.step, came_from=came_from, checkpoint=path.name, why=to.why)


def _candidates(run: Run, most: int) -> list[Path]:
    """Complete checkpoints of at most so many updates, newest first, as the main process sees them."""
    found = [p for p in steps_in(run.checkpoints.folder) if _step(p) <= most] if run.runtime.is_main else []
    box = [found[::-1]]
    dist.broadcast_object_list(box, src=0, group=run.checkpoints.group)
    return box[0]


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
