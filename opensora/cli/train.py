"""Train: ``torchrun --nproc_per_node N scripts/diffusion/train.py CONFIG.yaml [section.key=value ...]``."""

from opensora.utils import signal_handler

if __name__ == "__main__":
    signal_handler.install()  # before torch is imported, which takes long enough to be interrupted in

import logging

from opensora.cli.main import run_cli
from opensora.config.load import config_from_argv
from opensora.config.run import RunConfig
from opensora.train.health.anomaly_guard import TrainingDiverged
from opensora.train.loop import train
from opensora.train.run import Run
from opensora.train.setup import Interrupted, SaveError, start_run
from opensora.train.state.run_lock import finished, write_done
from opensora.utils.console import announce

INTERRUPTED = 75  # the state is on disk: start the same command again


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 when the run is finished (before, or now), 75 when it was stopped and can be resumed, 1
    when checkpoints could not be saved any more or numbers stay wrong. A hang ends the process with 70
    (acceleration/diagnostics/watchdog.py)."""
    cfg = config_from_argv(RunConfig, argv, "Train a video diffusion transformer.")
    if finished(cfg):
        announce(f"{cfg.folder} is finished; for more raise train.steps={cfg.train.steps}, or give another name")
        return 0
    try:
        with start_run(cfg) as run:
            if not train(run):
                return _interrupted(run)
            if run.runtime.is_main:
                write_done(cfg)
            return 0
    except Interrupted:
        announce("stopped before the first step: nothing was trained, nothing is lost; the same command goes on")
        return INTERRUPTED
    except (SaveError, TrainingDiverged) as error:
        announce(f"error: {error}", level=logging.ERROR)
        return 1


def _interrupted(run: Run) -> int:
    where = run.where_stopped()
    if where is None:
        announce(
            f"error: stopped, and step {run.step} could not be saved (see above): the same command goes on from the "
            f"newest checkpoint in {run.checkpoints.folder}",
            level=logging.ERROR,
        )
        return 1
    announce(where)
    return INTERRUPTED


if __name__ == "__main__":
    try:
        run_cli(main)
    except SystemExit as end:
        if end.code in (0, INTERRUPTED):  # the state is on disk
            signal_handler.end_process(end.code)
        raise
