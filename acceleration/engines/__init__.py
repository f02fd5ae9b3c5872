"""Engines by name, behind one contract."""

from torch import nn

from acceleration.config import OptimConfig, ParallelConfig
from acceleration.engines.base import Engine, Weights
from acceleration.engines.native import NativeEngine

ENGINES = {"native": NativeEngine}


def build_engine(model: nn.Module, parallel: ParallelConfig, optim: OptimConfig) -> Engine:
    """The engine that ``parallel.engine`` names, around a parallelized model."""
    return ENGINES[parallel.engine](model, parallel, optim)


__all__ = ["ENGINES", "Engine", "Weights", "build_engine"]
