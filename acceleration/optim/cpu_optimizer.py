"""An optimizer in CPU memory, for weights on a GPU (ZeRO-Offload, arXiv:2101.06840).

The CPU keeps this process's pieces of the masters, once more, with their moments and their average. A step copies
gradients there, updates there, and copies the masters back: with AdamW in fp32 the GPU holds 4 of 12 bytes per
parameter between steps and 8 of 16 within one, and 4 bytes pass in either direction. The update is that of the same
optimizer, to the rounding of its kernels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from acceleration import protocol
from acceleration.config import OptimConfig
from acceleration.optim.optimizers import build_optimizer
from acceleration.sharding.fsdp import local


class HostOptimizer:
    """Steps the parameters of a model that was sharded, from the CPU."""

    def __init__(self, model: nn.Module, cfg: OptimConfig) -> None:
        self.weights: dict[str, nn.Parameter] = dict(protocol.trainable(model))
        self.masters = {name: nn.Parameter(_on_host(weight.detach())) for name, weight in self.weights.items()}
        self.optimizer = build_optimizer(self.masters.values(), cfg)

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights by their gradients, which are freed on the way."""
        for name, master in self.masters.items():
            grad, self.weights[name].grad = self.weights[name].grad, None
            master.grad = None if grad is None else grad.to("cpu")
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, master in self.masters.items():
            local(self.weights[name]).copy_(local(master), non_blocking=True)

    @torch.no_grad()
    def follow_weights(self) -> None:
        """Take the weights as they are, after somebody else has set them."""
        for name, master in self.masters.items():
            local(master).copy_(local(self.weights[name]))

    def state_dict(self) -> dict[str, Any]:
        """As torch's ``get_optimizer_state_dict`` with flat names; its tensors are the state itself, not copies."""
        if not self.optimizer.state:
            self._start_state()
        settings = {key: value for key, value in self.optimizer.param_groups[0].items() if key != "params"}
        flat: dict[str, Any] = {}
        for name, master in self.masters.items():
            flat |= {f"state.{name}.{key}": value for key, value in self.optimizer.state[master].items()}
            flat |= {f"param_groups.{name}.{key}": value for key, value in settings.items()}
        return flat

    @torch.no_grad()
    def _start_state(self) -> None:
        """What the first step would make, before the first step: a step that changes nothing, taken back."""
        lr = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for group, was in zip(self.optimizer.param_groups, lr, strict=True):
            group["lr"] = was
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()


def _on_host(piece: Tensor) -> Tensor:
    """A copy in CPU memory, from which a GPU can fetch while it computes."""
    copy = torch.empty_like(piece, device="cpu", pin_memory=piece.device.type == "cuda")
    local(copy).copy_(local(piece))
    return copy
