"""Training objectives and solvers by kind. A new one is a file, and a line of a table."""

from collections.abc import Callable
from typing import Any, TypeAlias

from opensora.schedulers.base import Objective, Solver, SolverOptions
from opensora.schedulers.ddpm import ddim, ddpm
from opensora.schedulers.dpm_solver import dpm_solver
from opensora.schedulers.euler import euler
from opensora.schedulers.flow_multistep import flow_dpm_solver, unipc
from opensora.schedulers.iddpm import IDDPM, IDDPMConfig
from opensora.schedulers.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from opensora.schedulers.rectified_flow_v1 import RectifiedFlowV1, RectifiedFlowV1Config
from opensora.utils.tokens import Grid

ObjectiveConfig: TypeAlias = RectifiedFlowConfig | RectifiedFlowV1Config | IDDPMConfig

OBJECTIVES: dict[str, tuple[type, Callable[[Any], Objective]]] = {
    "rectified_flow": (RectifiedFlowConfig, RectifiedFlow),
    "rectified_flow_v1": (RectifiedFlowV1Config, RectifiedFlowV1),
    "iddpm": (IDDPMConfig, IDDPM),
}
OBJECTIVE_CONFIGS: dict[str, type] = {kind: config for kind, (config, _) in OBJECTIVES.items()}

SOLVERS: dict[str, Callable[[Any, SolverOptions, Grid], Solver]] = {
    "euler": euler,
    "unipc": unipc,
    "dpm++": flow_dpm_solver,
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm_solver": dpm_solver,
}


def build_objective(cfg: ObjectiveConfig) -> Objective:
    """The objective of ``cfg.kind``."""
    build: Callable[[Any], Objective] = OBJECTIVES[cfg.kind][1]
    return build(cfg)


def build_solver(kind: str, objective: ObjectiveConfig, options: SolverOptions, grid: Grid) -> Solver:
    """A solver for clips of this size, of a model that ``objective`` trained."""
    return SOLVERS[kind](objective, options, grid)


def register_objective(kind: str, config: type, build: Callable[[Any], Objective]) -> None:
    """One more objective, kept outside this package; before a configuration that names it is loaded."""
    OBJECTIVES[kind], OBJECTIVE_CONFIGS[kind] = (config, build), config
