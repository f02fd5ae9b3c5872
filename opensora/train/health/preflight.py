"""Before a run is built: acceleration/diagnostics/preflight.py, with this run's code, configuration and disk."""

import logging
from collections.abc import Mapping
from dataclasses import replace

from acceleration.diagnostics.preflight import PreflightError, preflight
from acceleration.distributed import runtime as runtimes
from acceleration.distributed.runtime import Runtime
from opensora.config.load import config_hash
from opensora.config.run import RunConfig
from opensora.utils.code_digest import code_digest
from opensora.utils.console import announce
from opensora.utils.errors import UserError

BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


def check_processes(cfg: RunConfig, runtime: Runtime, content: Mapping[str, str] | None = None) -> None:
    """That all processes are of one run; says what connects them. Collective.

    Args:
        content: digests of what else must be the same everywhere, by a name that a person understands.

    Raises:
        UserError: code, configuration or torch differ, or a device is shared; names the ranks.
    """
    common = replace(
        cfg, parallel=replace(cfg.parallel, interface="")
    )  # interfaces may be called otherwise on each host
    try:
        report = preflight(runtime, {"code": code_digest(), "configuration": config_hash(common), **(content or {})})
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
    parallel = cfg.parallel
    runtime = runtimes.start(parallel.timeout_s, mesh=parallel.mesh, interface=parallel.interface)
    check_processes(cfg, runtime)
    runtimes.stop()
