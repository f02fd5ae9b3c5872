"""Optimizers by name, and the learning rate and EMA decay as functions of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from acceleration.config import OptimConfig
from acceleration.optim.fused_adamw import FusedAdamW


def build_optimizer(
    parameters: Iterable[nn.Parameter], cfg: OptimConfig, *, by_apex: bool = False
) -> torch.optim.Optimizer:
    """One parameter group; the engine sets the learning rate before every step.

    ``by_apex``: AdamW is apex's, whose state is torch's.
    """
    if cfg.kind == "adamw":
        create = FusedAdamW if by_apex else torch.optim.AdamW
        return create(parameters, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay, fused=True)
    return torch.optim.SGD(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay)


def lr_at(step: int, cfg: OptimConfig, total_steps: int) -> float:
    """Learning rate of update ``step`` (from 0) of ``total_steps``: linear warm-up, then constant or cosine."""
    if step < cfg.warmup_steps:
        if cfg.initial_lr is not None:
            return cfg.initial_lr + (cfg.lr - cfg.initial_lr) * (step + 1) / (cfg.warmup_steps + 1)
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    progress = (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def ema_decay_at(step: int, cfg: OptimConfig) -> float:
    """Weight of the old average after update ``step`` (from 0)."""
    return min(cfg.ema_decay, (1 + step) / (10 + step)) if cfg.ema_warmup else cfg.ema_decay
