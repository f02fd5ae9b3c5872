"""The native engine: FSDP2 and torch optimizers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from acceleration import sharding
from acceleration.config import OptimConfig, ParallelConfig
from acceleration.ema import EMA
from acceleration.engines.base import Weights
from acceleration.optim import build_optimizer, ema_decay_at


class NativeEngine:
    """Runs a model that ``parallelize`` has spread over a mesh. See ``engines.base`` for the contract."""

    def __init__(self, model: nn.Module, parallel: ParallelConfig, optim: OptimConfig) -> None:
        self.model = model
        self.zero = parallel.zero
        self.optim = optim
        self.optimizer = build_optimizer(model.parameters(), optim)
        self.ema = EMA(model.named_parameters()) if optim.ema_decay else None

    def backward(self, loss_share: Tensor, *, last_microbatch: bool) -> None:
        sharding.begin_backward(self.model, self.zero, last_microbatch=last_microbatch)
        loss_share.backward()

    def step(self, step: int) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = sharding.full(torch.nn.utils.get_total_norm(gradients))
        if self.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.optim.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model.named_parameters(), ema_decay_at(step, self.optim))
        return norm

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def master_params(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.model.named_parameters())

    def full_weights(self, which: Weights = "live") -> Iterator[tuple[str, Tensor]]:
        if which == "ema" and self.ema is None:
            raise ValueError("this run keeps no moving average: set optim.ema_decay, or export the live weights")
        named = self.ema.shadow.items() if which == "ema" and self.ema else self.model.named_parameters()
        for name, weight in named:
            yield name, sharding.full(weight.detach()).cpu()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=_FLAT),
        }
        if self.ema:
            state["ema"] = dict(self.ema.shadow)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=_FLAT)
        # The average needs no call: a checkpoint is read in place into the tensors that state_dict handed out.


# One entry per (parameter, quantity): names in the checkpoint do not depend on parameter groups.
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
