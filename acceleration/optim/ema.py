"""A moving average of the weights, sharded as the weights are."""

from collections.abc import Iterable

import torch
from torch import Tensor

from acceleration.sharding.fsdp import local


class EMA:
    """``shadow`` <- decay * shadow + (1 - decay) * weights, in master precision, without communication."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Starts at a copy of the parameters as they are."""
        self.shadow: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters}

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, Tensor]], decay: float) -> None:
        """Move towards the parameters by ``1 - decay``."""
        current = dict(parameters)
        shadows = [local(s) for s in self.shadow.values()]
        torch._foreach_lerp_(shadows, [local(current[name]) for name in self.shadow], 1 - decay)
