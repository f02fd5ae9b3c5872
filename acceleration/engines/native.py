"""The native engine: FSDP2 and torch optimizers."""

from collections.abc import Iterator
from contextlib import contextmanager
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

from acceleration import lora, nvidia_apex, protocol
from acceleration.checkpoint import tensor_shards
from acceleration.config import OptimConfig, ParallelConfig
from acceleration.distributed import collectives
from acceleration.distributed.mesh import Mesh
from acceleration.engines.base import Accept, Weights
from acceleration.optim.cpu_optimizer import HostOptimizer
from acceleration.optim.ema import EMA
from acceleration.optim.optimizers import build_optimizer, ema_decay_at
from acceleration.sharding import fsdp, tensor_parallel


class NativeEngine:
    """Runs a model that ``parallelize`` has spread over a mesh. See ``engines.base`` for the contract."""

    def __init__(self, model: nn.Module, parallel: ParallelConfig, optim: OptimConfig, mesh: Mesh) -> None:
        self.model = model
        self.mesh = mesh
        self.zero = parallel.zero
        self.optim = optim
        self.trained = dict(protocol.trainable(model))
        # What is frozen is a part of the weights, saved as it is; beside adapters it is another file's.
        has_adapters = any(lora.is_adapter(name) for name in self.trained)
        self.frozen = {} if has_adapters else {n: p for n, p in model.named_parameters() if not p.requires_grad}
        self.saved = StateDictOptions(ignore_frozen_params=not self.frozen, strict=False)
        self.host = HostOptimizer(model, optim) if parallel.offload == "optimizer" else None
        self.optimizer = self.host.optimizer if self.host else self._optimizer()
        self.ema = EMA(self.master_params()) if optim.ema_decay else None

    def _optimizer(self) -> torch.optim.Optimizer:
        """Over what is sharded; apex's where ``optim.kernel`` chooses it, for masters of a type that it knows."""
        choice, parameters = self.optim.kernel, list(self.trained.values())
        fits = all(nvidia_apex.chosen(choice, "adam", p.device.type) for p in parameters)
        if choice == "auto" and any(p.dtype not in nvidia_apex.ADAM_DTYPES for p in parameters):
            fits = False
        return build_optimizer(parameters, self.optim, by_apex=fits)

    def backward(self, loss_share: Tensor, *, last_microbatch: bool) -> None:
        fsdp.begin_backward(self.model, self.zero, last_microbatch=last_microbatch)
        loss_share.backward()
        if last_microbatch:
            tensor_parallel.sum_shared_gradients(self.model, self.mesh["tensor"], self.mesh.device_type)

    def step(self, step: int, accept: Accept | None = None) -> Tensor:
        norm = self._gradient_norm()
        if accept is None or accept(norm):
            self._update(step, norm)
        for parameter in self.trained.values():
            parameter.grad = None
        return norm

    def _update(self, step: int, norm: Tensor) -> None:
        if self.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.trained.values(), self.optim.clip_norm, norm)
        (self.host or self.optimizer).step()
        if self.ema:
            self.ema.update(self.master_params(), ema_decay_at(step, self.optim))

    def _gradient_norm(self) -> Tensor:
        """Of all gradients; those of layers that are cut over the tensor axis are summed over it, others held alike."""
        named = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
        cuts = tensor_parallel.cuts(self.model)
        alike = self._norm([grad for name, grad in named.items() if name not in cuts])
        if not cuts:
            return alike
        own = self._norm([grad for name, grad in named.items() if name in cuts])
        return (alike**2 + collectives.all_reduce_(own**2, self.mesh["tensor"])).sqrt()

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        if not gradients:  # torch's answer to no gradients is on the CPU
            return torch.zeros((), device=self.mesh.device_type)
        return fsdp.full(torch.nn.utils.get_total_norm(gradients))

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def master_params(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.host.masters.items() if self.host else self.trained.items())

    def held(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.master_params():
            yield name, fsdp.local(parameter.detach())
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{name}.{key}", fsdp.local(value)
        if self.ema:
            yield from ((f"{name}.ema", fsdp.local(shadow)) for name, shadow in self.ema.shadow.items())

    def full_weights(self, which: Weights = "live") -> Iterator[tuple[str, Tensor]]:
        if which == "ema" and self.ema is None:
            raise ValueError("this run keeps no moving average: set optim.ema_decay, or export the live weights")
        trained = self.ema.shadow if which == "ema" and self.ema else self.trained
        for name, weight in (trained | self.frozen).items():
            whole = fsdp.full(weight.detach())
            yield name, tensor_parallel.full(name, whole, self.model, self.mesh["tensor"]).cpu()

    @contextmanager
    def averaged(self) -> Iterator[bool]:
        """Weights and average change places, a tensor at a time: no memory but for one of them."""
        if self.ema is None:
            yield False
            return
        self._exchange(back=False)
        try:
            yield True
        finally:
            self._exchange(back=True)

    @torch.no_grad()
    def _exchange(self, *, back: bool) -> None:
        assert self.ema is not None
        fsdp.release(self.model)  # what was gathered is of the other weights
        for name, parameter in self.trained.items():
            weight, average = fsdp.local(parameter.detach()), fsdp.local(self.ema.shadow[name])
            if self.host:  # on the CPU masters and average stay where they are
                weight.copy_(fsdp.local(self.host.masters[name].detach()) if back else average)
                continue
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        if self.host:
            optimizer = self.host.state_dict()
        else:
            optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=_FLAT)
        state: dict[str, Any] = {"model": get_model_state_dict(self.model, options=self.saved), "optimizer": optimizer}
        if self.ema:
            state["ema"] = dict(self.ema.shadow)
        first = self.mesh["tensor"].rank == 0
        return {section: tensor_shards.wrap(self.model, values, first_copy=first) for section, values in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.model, tensor_shards.unwrap(state["model"]), options=self.saved)
        # What has no call was read in place, into the tensors that state_dict handed out.
        if self.host:
            self.host.follow_weights()
        else:
            settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
            set_optimizer_state_dict(
                self.model, self.optimizer, tensor_shards.unwrap(state["optimizer"]), options=_FLAT
            )
            for group, configured in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(configured)  # a run goes on with the decay, say, that its configuration now has


# One entry per (parameter, quantity): names in the checkpoint do not depend on parameter groups.
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
