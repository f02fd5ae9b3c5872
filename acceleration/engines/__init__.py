"""Engines by name, behind one contract."""

from torch import nn

from acceleration.config import OptimConfig, ParallelConfig
from acceleration.engines.base import Engine, Weights
from acceleration.engines.native import NativeEngine
from acceleration.mesh import Mesh

ENGINES = {"native": NativeEngine}


def build_engine(model: nn.Module, parallel: ParallelConfig, optim: OptimConfig, mesh: Mesh) -> Engine:
    """The engine that ``parallel.engine`` names, around a parallelized model."""
    return ENGINES[parallel.engine](model, parallel, optim, mesh)


__all__ = ["ENGINES", "Engine", "Weights", "build_engine"]
