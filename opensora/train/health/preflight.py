"""Before a run is built: acceleration/diagnostics/preflight.py, with this run's code, configuration and disk."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from acceleration.diagnostics.preflight import PreflightError, preflight
from acceleration.distributed import launcher_variables
from acceleration.distributed import mesh as meshes
from acceleration.distributed import runtime as runtimes
from acceleration.distributed.runtime import Runtime
from opensora.config.load import config_hash
from opensora.config.run import RunConfig
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files.code_digest import code_digest

BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


def check_processes(
    cfg: RunConfig, runtime: Runtime, content: Mapping[str, str] | None = None, links: Path | None = None
) -> None:
    """That all processes are of one run; says what connects them. Collective.

    Args:
        content: digests of what else must be the same everywhere, by a name that a person understands.
        links: where the main process writes the rates that were measured, for the planner; None: nowhere.

    Raises:
        UserError: code, configuration or torch differ, or a device is shared; names the ranks.
    """
    # Interfaces may be called otherwise on each host.
    common = replace(cfg, parallel=replace(cfg.parallel, interface=""))
    try:
        report = preflight(runtime, {"code": code_digest(), "configuration": config_hash(common), **(content or {})})
    except PreflightError as error:
        raise UserError(str(error)) from None
    announce(report.summary)
    for warning in report.warnings:
        announce(f"preflight: {warning}", level=logging.WARNING)
    if links and runtime.is_main and not report.links:
        announce(f"preflight: {links}: not written, one process has no links")
    elif links and report.links and runtime.is_main:
        try:
            report.links.write(links)
        except OSError as error:  # the planner will lack it, the run will not
            announce(f"preflight: {links}: not written, {error.strerror or error}", level=logging.WARNING)


def check_alone(cfg: RunConfig, links: Path | None = None) -> None:
    """``check_processes`` in a process group of its own. Collective.

    Raises:
        StartError: a process did not come, or the port is in use.
        UserError: as ``check_processes``.
    """
    parallel, mesh = cfg.parallel, None
    try:
        meshes.resolve(parallel.mesh, launcher_variables.ranks_from_environment().world_size)
        mesh = parallel.mesh
    except ValueError as error:  # some machines of those that a run will have
        announce(f"ranks are the launcher's: parallel.mesh: {error}")
    runtime = runtimes.start(parallel.timeout_s, mesh=mesh, interface=parallel.interface)
    check_processes(cfg, runtime, links=links)
    runtimes.stop()
