"""What is looked at before a run is built: acceleration/preflight.py, with this run's code, configuration and disk."""

import logging
import shutil

from torch import nn

from acceleration import runtime as runtimes
from acceleration.preflight import PreflightError, preflight
from acceleration.runtime import Runtime
from opensora.config import RunConfig, config_hash
from opensora.utils.errors import UserError
from opensora.utils.logging import announce
from opensora.utils.version import code_digest

BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


def check_processes(cfg: RunConfig, runtime: Runtime) -> None:
    """That all processes are of one run; says what connects them. Collective.

    Raises:
        UserError: code, configuration or torch differ, or a device is shared; names the ranks.
    """
    try:
        report = preflight(runtime, {"code": code_digest(), "configuration": config_hash(cfg)})
    except PreflightError as error:
        raise UserError(str(error)) from None
    announce(report.summary)
    for warning in report.warnings:
        announce(f"preflight: {warning}", level=logging.WARNING)


def check_alone(cfg: RunConfig) -> None:
    """``check_processes`` in a process group of its own. Collective.

    Raises:
        StartError: a process did not come, or the port is in use.
        UserError: as ``check_processes``.
    """
    runtime = runtimes.start(cfg.parallel.timeout_s)
    check_processes(cfg, runtime)
    runtimes.stop()


def check_disk(cfg: RunConfig, model: nn.Module) -> None:
    """That the next checkpoint has room, and whether all that are kept have. ``model`` is on the meta device.

    Raises:
        UserError: not even one fits.
    """
    size = checkpoint_bytes(cfg, model)
    free = shutil.disk_usage(cfg.folder).free
    room = f"{cfg.folder} has {free / 1e9:.1f} GB left, a checkpoint takes {size / 1e9:.1f}"
    if free < size:
        raise UserError(f"output={cfg.output}: {room}; make room, or choose another folder")
    saves = -(-cfg.train.steps // cfg.train.checkpoint_every)
    # The newest is complete before the oldest goes.
    kept = min(cfg.train.checkpoint_keep + 1, saves) if cfg.train.checkpoint_keep else saves
    if free < kept * size:
        announce(f"preflight: {room}, and up to {kept} are there at a time", level=logging.WARNING)


def checkpoint_bytes(cfg: RunConfig, model: nn.Module) -> int:
    """Bytes of what is trained, with the optimizer's moments and the moving average, in a checkpoint."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    copies = 1 + (2 if cfg.optim.kind == "adamw" else 0) + (1 if cfg.optim.ema_decay else 0)
    return trained * copies * BYTES[cfg.parallel.precision.master]
