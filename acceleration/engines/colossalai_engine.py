"""ColossalAI's Booster behind the contract: torch's DDP for ZeRO 0, LowLevelZero for ZeRO 1 and 2, Gemini for ZeRO 3.

Written against colossalai 0.5.0, beside this project's torch by requirements-colossalai.txt. ZeRO 0 is tested on CPU
over gloo. The other two plugins refuse a CPU: they are tested against a stand-in, and were **not run on a GPU yet**.

ZeRO 0 computes and keeps everything in one type, fp32 or fp64. Otherwise masters and moments are fp32, and gradients
are accumulated in the compute type (bf16), which the other engines do in fp32.
"""

import logging
import math
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acceleration.config import OptimConfig, ParallelConfig
from acceleration.distributed.mesh import Mesh
from acceleration.engines.base import Accept
from acceleration.engines.flat import MOMENTS, FlatEngine, Run
from acceleration.optim.optimizers import build_optimizer
from acceleration.sharding.precision import DTYPES

INSTALL = "pip install --no-deps -r requirements-colossalai.txt"
NEEDS = ("colossalai", "galore_torch", "bitsandbytes", "peft", "accelerate", "psutil")  # modules of that file
PLUGINS = ("TorchDDP", "LowLevelZero", "LowLevelZero", "Gemini")  # by ZeRO stage


def check(parallel: ParallelConfig) -> None:
    """That this engine can run here.

    Raises:
        ValueError: it is not installed, or not all of it, or there is no GPU and the stage needs one.
    """
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise ValueError(f"engine=colossalai: {', '.join(missing)} not installed; {INSTALL}, or use engine=native")
    if parallel.zero and not torch.cuda.is_available():
        raise ValueError(
            f"zero={parallel.zero}: with engine=colossalai this is {PLUGINS[parallel.zero]}, which needs a GPU, and "
            "here is none; use zero=0 with precision.compute=fp32, or engine=native or deepspeed"
        )


class ColossalAIEngine(FlatEngine):
    """Runs a model that ``parallelize`` has left whole, on the CPU. See ``engines.base`` for the contract."""

    def __init__(self, model: nn.Module, parallel: ParallelConfig, optim: OptimConfig, mesh: Mesh) -> None:
        check(parallel)
        self.booster, self.device = _booster(parallel, optim)
        self.optim = optim
        self.mesh = mesh
        self.zero = parallel.zero
        self.replicated = parallel.zero == 0
        masters = {name: p.detach() for name, p in model.named_parameters()}  # plugins replace p.data, not these
        optimizer: Any = (
            _adam_for_gemini(model, optim) if self.zero == 3 else build_optimizer(model.parameters(), optim)
        )
        self.parameters = list(model.named_parameters())
        self.shapes = {name: whole.shape for name, whole in masters.items()}
        boosted, self.vendor, *_ = self.booster.boost(_Unpack(model), optimizer)
        self.model = _Pack(boosted)
        self._count = torch.zeros(())
        self._make_moments()
        if self.zero:  # LowLevelZero made its masters from rounded weights
            for name, run in self.runs().items():
                run.values.copy_(masters[name].view(-1)[run.start : run.start + len(run.values)])
        self.start_average()

    def backward(self, loss_share: Tensor, *, last_microbatch: bool) -> None:
        # ZeRO 1 reduces once per step; 2 and 3 reduce, and keep a part of, every micro-batch. So does 0: DDP wants to
        # be told before the forward pass, where a mean of sums that are already equal does no harm.
        waits = self.zero == 1 and not last_microbatch
        with self.booster.no_sync(self.model, self.vendor) if waits else nullcontext():
            # All plugins divide by the number of processes, we sum: the factor undoes it.
            self.booster.backward(loss_share * self.mesh.world_size, self.vendor)

    def step(self, step: int, accept: Accept | None = None) -> Tensor:
        if self.zero:
            self.vendor.step()
            norm = self.vendor.get_grad_norm()
        else:
            norm = self.vendor.clip_grad_by_norm(self.optim.clip_norm or math.inf)
            if accept is not None and not accept(norm):
                self.vendor.zero_grad()
                return norm
            self.vendor.step()
        self.vendor.zero_grad()
        self._count += 1
        self.update_average(step)
        return torch.as_tensor(norm, device=self.device)

    def updates(self) -> Tensor:
        return self._count

    def param_groups(self) -> list[dict[str, Any]]:
        return self.vendor.optim.param_groups

    def runs(self) -> dict[str, Run]:
        held = (self._whole, self._in_parts, self._in_parts, self._in_chunks)[self.zero]
        return {name: held(index, p) for index, (name, p) in enumerate(self.parameters)}

    def _whole(self, index: int, p: nn.Parameter) -> Run:
        """DDP leaves parameters where they are."""
        moments = self.vendor.optim.state.get(p, {})
        return Run(p.shape, 0, p.detach().view(-1), {key: moments[key].view(-1) for key in MOMENTS if key in moments})

    def _in_parts(self, index: int, p: nn.Parameter) -> Run:
        """LowLevelZero cuts every parameter into equal runs, the last ones padded."""
        master = self.vendor.get_working_to_master_map()[id(p)]
        start = min(dist.get_rank() * master.numel(), p.numel())
        size = min(master.numel(), p.numel() - start)
        moments = self.vendor.optim.state.get(master, {})
        return Run(
            p.shape,
            start,
            master.detach().view(-1)[:size],
            {key: moments[key].view(-1)[:size] for key in MOMENTS if key in moments},
        )

    def _in_chunks(self, index: int, p: nn.Parameter) -> Run:
        """Gemini puts parameters into chunks and cuts those; a process may hold nothing of a parameter."""
        fake = self.vendor.id_to_fake_params.get(index)
        shape = self.shapes[self.parameters[index][0]]  # p itself may be empty now
        if fake is None:
            nothing = torch.empty(0, device=self.device)
            return Run(shape, 0, nothing, {key: nothing.clone() for key in MOMENTS})
        offset, start, size = self.vendor.get_offsets(index)
        payload = self.vendor.param_to_chunk16[fake].paired_chunk.payload
        moments = self.vendor.optim.state.get(fake, {})
        return Run(
            shape, start, payload[offset : offset + size], {key: moments[key] for key in MOMENTS if key in moments}
        )

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Masters, moments and average were read in place: what is left are counts, and the weights that compute."""
        for moments in self.vendor.optim.state.values():
            moments["step"] = int(self._count) if self.zero == 3 else self._count.to(moments["step"].device, copy=True)
        if self.zero == 3:
            for chunk in self.vendor.chunk16_set:
                chunk.optim_update()
        if self.zero in (0, 3):
            return
        for (name, p), whole in zip(self.parameters, self.full_weights(), strict=True):
            assert whole[0] == name
            p.copy_(whole[1])

    def _make_moments(self) -> None:
        """The optimizers make their moments at the first step; a checkpoint is read into them before."""
        if self.optim.kind != "adamw":
            return
        runs = self.runs()
        key: Tensor | None
        like: Tensor
        for index, (name, p) in enumerate(self.parameters):
            if self.zero == 0:
                key = like = p
            elif self.zero == 3:
                key, like = self.vendor.id_to_fake_params.get(index), runs[name].values
            else:
                key = like = self.vendor.get_working_to_master_map()[id(p)]
            if key is not None:
                self.vendor.optim.state[key] = {
                    "step": 0 if self.zero == 3 else torch.zeros((), device=like.device),
                    **{moment: torch.zeros_like(like) for moment in MOMENTS},
                }


def _booster(parallel: ParallelConfig, optim: OptimConfig) -> tuple[Any, torch.device]:
    """ColossalAI's driver with the plugin of the stage, and the device that it works on."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported by the way; nothing of it is used
    with warnings.catch_warnings():  # of packages that it could use and we do not: apex, TensorNVMe
        warnings.simplefilter("ignore")
        from colossalai.accelerator import get_accelerator
        from colossalai.booster import Booster
        from colossalai.booster.plugin import TorchDDPPlugin
    # Its DDP plugin calls torch's DDP by a keyword that has a new name since torch 2.13.
    warnings.filterwarnings("ignore", category=FutureWarning, module="colossalai")
    plugin: Any
    if parallel.zero == 0:
        plugin = TorchDDPPlugin()
    else:
        plugin = _gemini(parallel, optim) if parallel.zero == 3 else _low_level_zero(parallel, optim)
    return Booster(plugin=plugin), get_accelerator().get_current_device()


def _low_level_zero(parallel: ParallelConfig, optim: OptimConfig) -> Any:
    from colossalai.booster.plugin import LowLevelZeroPlugin

    return LowLevelZeroPlugin(
        stage=parallel.zero,
        precision=parallel.precision.compute,
        max_norm=optim.clip_norm,
        communication_dtype=DTYPES[parallel.precision.reduce],
        cpu_offload=parallel.offload == "optimizer",
        cast_inputs=False,  # timesteps and positions stay in full precision; the model casts its tokens
    )


def _gemini(parallel: ParallelConfig, optim: OptimConfig) -> Any:
    from colossalai.booster.plugin import GeminiPlugin

    return GeminiPlugin(
        placement_policy="static",
        shard_param_frac=1.0,
        offload_optim_frac=1.0 if parallel.offload == "optimizer" else 0.0,
        enable_gradient_accumulation=True,
        precision=parallel.precision.compute,
        max_norm=optim.clip_norm or float("inf"),  # it computes the norm only where there is a bound
        pin_memory=True,
    )


def _adam_for_gemini(model: nn.Module, optim: OptimConfig) -> Any:
    """Gemini steps with ColossalAI's own Adam only."""
    assert optim.kind == "adamw", optim.kind
    from colossalai.nn.optimizer import HybridAdam

    return HybridAdam(
        model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )


@dataclass(frozen=True)
class _Box:
    """Arguments that Gemini must not look into: it casts every tensor it finds to the compute type."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Pack(nn.Module):
    """Calls a boosted model as the model itself is called."""

    def __init__(self, boosted: nn.Module) -> None:
        super().__init__()
        self.boosted = boosted

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.boosted(_Box(args, kwargs))


class _Unpack(nn.Module):
    """The inside of a boosted model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, box: _Box) -> Any:
        return self.model(*box.args, **box.kwargs)
