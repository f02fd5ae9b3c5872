"""Engines by name, behind one contract."""

from collections.abc import Callable

from torch import nn

from acceleration.config import OptimConfig, ParallelConfig
from acceleration.distributed.mesh import Mesh
from acceleration.engines import colossalai_engine, deepspeed_engine
from acceleration.engines.base import Engine, Weights
from acceleration.engines.colossalai_engine import ColossalAIEngine
from acceleration.engines.deepspeed_engine import DeepSpeedEngine
from acceleration.engines.native import NativeEngine

ENGINES: dict[str, Callable[[nn.Module, ParallelConfig, OptimConfig, Mesh], Engine]] = {
    "native": NativeEngine,
    "deepspeed": DeepSpeedEngine,
    "colossalai": ColossalAIEngine,
}
CHECKS: dict[str, Callable[[ParallelConfig], None]] = {
    "deepspeed": deepspeed_engine.check,
    "colossalai": colossalai_engine.check,
}


def check_engine(parallel: ParallelConfig) -> None:
    """That the engine that ``parallel.engine`` names can run on this machine; imports nothing of it.

    Raises:
        ValueError: what is missing, and how to get it.
    """
    if parallel.engine in CHECKS:
        CHECKS[parallel.engine](parallel)


def build_engine(model: nn.Module, parallel: ParallelConfig, optim: OptimConfig, mesh: Mesh) -> Engine:
    """The engine that ``parallel.engine`` names, around a parallelized model. Collective."""
    return ENGINES[parallel.engine](model, parallel, optim, mesh)


__all__ = ["ENGINES", "Engine", "Weights", "build_engine", "check_engine"]
