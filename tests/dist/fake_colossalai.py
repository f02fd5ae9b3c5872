"""Stands in for the two plugins of colossalai 0.5.0 that refuse a CPU: what colossalai_engine.py calls.

Names, signatures and arithmetic are those of the release (booster/plugin/{low_level_zero,gemini}_plugin.py,
zero/low_level/low_level_optim.py, zero/gemini/{gemini_ddp,gemini_optimizer}.py): masters cut over all processes,
gradients divided by their number, every tensor argument cast by Gemini.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acceleration.engines import colossalai_engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def install() -> None:
    """Make ``import colossalai`` find this, in this process."""
    contents = {
        "colossalai": {},
        "colossalai.accelerator": {
            "get_accelerator": lambda: SimpleNamespace(get_current_device=lambda: torch.device("cpu"))
        },
        "colossalai.booster": {"Booster": Booster},
        "colossalai.booster.plugin": {
            "LowLevelZeroPlugin": LowLevelZeroPlugin,
            "GeminiPlugin": GeminiPlugin,
            "TorchDDPPlugin": None,  # runs on a CPU: not stood in for
        },
        "colossalai.nn": {},
        "colossalai.nn.optimizer": {"HybridAdam": HybridAdam},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        module.__dict__.update(values)
        sys.modules[name] = module
    colossalai_engine.check = lambda parallel: None


class Booster:
    def __init__(self, device: Any = None, mixed_precision: Any = None, plugin: Any = None) -> None:
        self.plugin = plugin

    def boost(self, model: nn.Module, optimizer: Any = None) -> tuple[Any, ...]:
        return (*self.plugin.configure(model, optimizer), None, None, None)

    def backward(self, loss: Tensor, optimizer: Any) -> None:
        optimizer.backward(loss)

    def no_sync(self, model: Any = None, optimizer: Any = None) -> Any:
        assert self.plugin.stage == 1
        return optimizer.no_sync()


class LowLevelZeroPlugin:
    def __init__(
        self,
        stage: int = 1,
        precision: str = "fp16",
        max_norm: float = 0.0,
        communication_dtype: Any = None,
        cpu_offload: bool = False,
        cast_inputs: bool = True,
    ) -> None:
        assert stage in (1, 2) and not cast_inputs
        self.stage, self.dtype, self.max_norm = stage, DTYPES[precision], max_norm

    def configure(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        model.to(self.dtype)
        return model, LowLevelZeroOptimizer(optimizer, self.stage, self.max_norm)


class Zero:
    """What both optimizers do with the gradients of one update."""

    optim: Any
    max_norm: float
    norm: float

    def get_grad_norm(self) -> float:
        return self.norm

    def clip(self, parts: list[Tensor]) -> None:
        square = torch.stack([part.double().square().sum() for part in parts]).sum()
        dist.all_reduce(square)
        self.norm = math.sqrt(square.item())
        factor = (self.norm + 1e-6) / self.max_norm if self.max_norm else 0.0
        for part in parts:
            part.div_(max(factor, 1.0))


class LowLevelZeroOptimizer(Zero):
    def __init__(self, optim: Any, stage: int, max_norm: float) -> None:
        self.optim, self.stage, self.max_norm = optim, stage, max_norm
        self.working: list[nn.Parameter] = optim.param_groups[0]["params"]
        self.masters = [self.part(p.detach()).float() for p in self.working]
        self.grads: list[Tensor | None] = [None] * len(self.working)
        self.sync = True
        optim.param_groups[0]["params"] = self.masters

    def part(self, whole: Tensor) -> Tensor:
        """This process's, with padding."""
        world = dist.get_world_size()
        flat = torch.nn.functional.pad(whole.reshape(-1), (0, -whole.numel() % world))
        return flat.chunk(world)[dist.get_rank()].clone()

    def get_working_to_master_map(self) -> dict[int, Tensor]:
        return {id(p): master for p, master in zip(self.working, self.masters, strict=True)}

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.sync = False
        yield
        self.sync = True

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        if not self.sync:
            return
        for index, p in enumerate(self.working):
            assert p.grad is not None
            mean = p.grad / dist.get_world_size()
            dist.all_reduce(mean)
            before = self.grads[index]
            self.grads[index] = self.part(mean) if before is None else before + self.part(mean)
            p.grad = None

    def step(self) -> None:
        for master, grad in zip(self.masters, self.grads, strict=True):
            assert grad is not None
            master.grad = grad.float()
        self.clip([master.grad for master in self.masters])  # type: ignore[misc]
        self.optim.step()
        for p, master in zip(self.working, self.masters, strict=True):
            parts = [torch.empty_like(master) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, master)
            p.data.copy_(torch.cat(parts)[: p.numel()].view_as(p))

    def zero_grad(self) -> None:
        self.grads = [None] * len(self.working)


class GeminiPlugin:
    def __init__(
        self,
        placement_policy: str = "static",
        enable_gradient_accumulation: bool = False,
        shard_param_frac: float = 1.0,
        offload_optim_frac: float = 0.0,
        precision: str = "fp16",
        pin_memory: bool = False,
        max_norm: float = 0.0,
    ) -> None:
        assert enable_gradient_accumulation and precision == "bf16" and max_norm > 0
        self.stage, self.max_norm = 3, max_norm

    def configure(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        assert type(optimizer) is HybridAdam
        gemini = GeminiOptimizer(optimizer, list(model.parameters()), self.max_norm)
        return GeminiDDP(model.to(torch.bfloat16)), gemini


class GeminiDDP(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*self.cast(args), **self.cast(kwargs))

    def cast(self, x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.to(torch.bfloat16)
        if isinstance(x, tuple):
            return tuple(self.cast(item) for item in x)
        return {key: self.cast(item) for key, item in x.items()} if isinstance(x, dict) else x


class HybridAdam(torch.optim.Optimizer):
    """Counts are numbers here, where torch has tensors."""

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        adamw_mode: bool = True,
    ) -> None:
        super().__init__(model_params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        (one, two), lr = group["betas"], group["lr"]
        for p in group["params"]:
            state, grad = self.state[p], p.grad
            state["step"] += 1
            assert isinstance(state["step"], int)
            p.data.mul_(1 - lr * group["weight_decay"])
            state["exp_avg"].lerp_(grad, 1 - one)
            state["exp_avg_sq"].mul_(two).addcmul_(grad, grad, value=1 - two)
            scale = (state["exp_avg_sq"] / (1 - two ** state["step"])).sqrt_().add_(group["eps"])
            p.data.addcdiv_(state["exp_avg"], scale, value=-lr / (1 - one ** state["step"]))


class GeminiOptimizer(Zero):
    """One chunk with all parameters, cut over all processes."""

    def __init__(self, optim: Any, params: list[nn.Parameter], max_norm: float) -> None:
        self.optim, self.params, self.max_norm = optim, params, max_norm
        world, rank = dist.get_world_size(), dist.get_rank()
        flat = torch.cat([p.detach().reshape(-1).float() for p in params])
        size = -(-len(flat) // world)
        self.low, self.size = rank * size, size
        self.grad: Tensor | None = None
        payload = torch.nn.functional.pad(flat, (0, size * world - len(flat)))[self.low : self.low + size].clone()
        chunk = SimpleNamespace(paired_chunk=SimpleNamespace(payload=payload), optim_update=self.update)
        self.chunk16_set, self.payload = {id(chunk): chunk}.values(), payload
        self.id_to_fake_params: dict[int, nn.Parameter] = {}
        self.param_to_chunk16: dict[Any, Any] = {}
        self.ranges: dict[int, tuple[int, int]] = {}
        self.offsets: list[int] = []
        offset = 0
        for index, p in enumerate(params):
            self.offsets.append(offset)
            begin, end = max(0, offset - self.low), min(size, offset + p.numel() - self.low)
            offset += p.numel()
            if begin < end:
                fake = self.id_to_fake_params[index] = nn.Parameter(torch.empty(0))
                self.param_to_chunk16[fake] = chunk
                self.ranges[index] = (begin, end)
        optim.param_groups[0]["params"] = list(self.id_to_fake_params.values())

    def get_offsets(self, param_id: int) -> tuple[int, int, int]:
        if param_id not in self.ranges:
            return -1, -1, -1
        begin, end = self.ranges[param_id]
        return begin, begin + self.low - self.offsets[param_id], end - begin

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        mean = torch.cat([p.grad.reshape(-1).float() for p in self.params])  # type: ignore[union-attr]
        mean = torch.nn.functional.pad(mean, (0, self.size * dist.get_world_size() - len(mean))) / dist.get_world_size()
        dist.all_reduce(mean)
        part = mean[self.low : self.low + self.size]
        self.grad = part if self.grad is None else self.grad + part
        for p in self.params:
            p.grad = None

    def step(self) -> None:
        assert self.grad is not None
        self.clip([self.grad])
        for index, fake in self.id_to_fake_params.items():
            begin, end = self.ranges[index]
            fake.data, fake.grad = self.payload[begin:end], self.grad[begin:end]
        self.optim.step()
        for fake in self.id_to_fake_params.values():
            fake.grad, fake.data = None, torch.empty(0)
        self.update()

    def update(self) -> None:
        parts = [torch.empty_like(self.payload) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, self.payload)
        whole = torch.cat(parts)
        for p, start in zip(self.params, self.offsets, strict=True):
            p.data.copy_(whole[start : start + p.numel()].view_as(p))

    def zero_grad(self) -> None:
        self.grad = None
