"""DeepSpeed's engine behind the contract: ZeRO 0 to 3, optimizer offloading.

DeepSpeed cuts state over all processes (replicate included: it averages over all alike). Masters are fp32, and it knows
no fp64. Tested with 0.19.8 on CPU over gloo; not run on a GPU.
"""

import logging
import os
import warnings
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acceleration.config import OptimConfig, ParallelConfig
from acceleration.distributed.launcher_variables import ranks_from_environment
from acceleration.distributed.mesh import Mesh
from acceleration.engines.base import Accept
from acceleration.engines.flat import MOMENTS, FlatEngine, Run
from acceleration.optim.optimizers import build_optimizer

INSTALL = 'pip install "deepspeed>=0.19"'


def check(parallel: ParallelConfig) -> None:
    """That this engine can run here.

    Raises:
        ValueError: it is not installed.
    """
    if find_spec("deepspeed") is None:
        raise ValueError(f"engine=deepspeed: not installed; {INSTALL}, or use engine=native")


class DeepSpeedEngine(FlatEngine):
    """Runs a model that ``parallelize`` has left whole, on the CPU. See ``engines.base`` for the contract."""

    def __init__(self, model: nn.Module, parallel: ParallelConfig, optim: OptimConfig, mesh: Mesh) -> None:
        check(parallel)
        deepspeed = _import(mesh.device_type)
        self.mesh = mesh
        self.zero = parallel.zero
        self.replicated = parallel.zero == 0
        self.optim = optim
        settings = _settings(parallel, optim, mesh)
        masters = {name: p.detach() for name, p in model.named_parameters()}  # deepspeed replaces p.data, not these
        if self.zero == 3:
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)  # one by one: never whole on the GPU
        self.optimizer = build_optimizer(model.parameters(), optim)
        self.vendor: Any = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=settings, dist_init_required=False
        )[0]
        self.model = self.vendor
        self.device = torch.device(self.vendor.device)
        self._make_moments()
        self._runs = _find_runs(self.vendor, self.optimizer, self.zero)
        if parallel.precision.compute != "fp32":  # deepspeed made its masters from rounded weights
            for name, run in self._runs.items():
                run.values.copy_(masters[name].view(-1)[run.start : run.start + len(run.values)])
        self.start_average()

    def backward(self, loss_share: Tensor, *, last_microbatch: bool) -> None:
        self.vendor.set_gradient_accumulation_boundary(last_microbatch)
        # Deepspeed divides by the number of processes, we sum: the factor undoes it. Nor may it divide by a number of
        # micro-batches, which differs from step to step.
        self.vendor.backward(loss_share * self.mesh.world_size, scale_wrt_gas=False)

    def step(self, step: int, accept: Accept | None = None) -> Tensor:
        norm = self._clip_whole() if self.zero == 0 else None
        self.vendor.step()
        self.update_average(step)
        norm = self.vendor.get_global_grad_norm() if norm is None else norm
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)

    def _clip_whole(self) -> Tensor:
        """ZeRO 0 leaves gradients where torch has them, and does not tell their norm."""
        parameters = list(self.vendor.module.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.optim.clip_norm, norm)
        return norm

    def runs(self) -> dict[str, Run]:
        return self._runs

    def updates(self) -> Tensor:
        return next(iter(self.optimizer.state.values()))["step"]

    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Masters, moments and average were read in place: what is left are the weights that compute."""
        for moments in self.optimizer.state.values():
            moments["step"].copy_(self.updates())  # one was read, those of other flat tensors follow
        if self.zero in (1, 2):
            self.vendor.optimizer.update_lp_params()
        if self.zero == 3:
            for name, p in self.vendor.module.named_parameters():
                values = self._runs[name].values
                p.ds_tensor.view(-1)[: len(values)].copy_(values)
            kept_whole = self.vendor.optimizer.persistent_parameters  # small ones
            if kept_whole:
                kept_whole[0].partition(kept_whole)
                kept_whole[0].all_gather(kept_whole)

    def _make_moments(self) -> None:
        """Torch's AdamW makes its moments at the first step; a checkpoint is read into them before."""
        if self.optim.kind != "adamw":
            return
        flats = getattr(self.vendor.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3 takes them in turn
        for flat in flats or self.optimizer.param_groups[0]["params"]:
            self.optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                **{key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS},
            }


def _import(device_type: str) -> Any:
    """The package, told what it would otherwise guess."""
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    os.environ.setdefault("LOCAL_RANK", str(ranks_from_environment().local_rank))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    # An exchange through shared memory that training never calls; on a CPU it would be compiled at the first start, for
    # minutes on a busy machine, and a compiler that is killed leaves a lock on which every later start waits for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)  # it warns of what we mean to do
    # It calls collectives by the names they had before torch 2.13.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    return deepspeed


def _settings(parallel: ParallelConfig, optim: OptimConfig, mesh: Mesh) -> dict[str, Any]:
    """Deepspeed's own configuration."""
    zero: dict[str, Any] = {"stage": parallel.zero}
    if parallel.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": mesh.device_type == "cuda"}
    return {
        # Micro-batches are counted by the caller.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip_norm if parallel.zero else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # any torch optimizer that treats every element by itself will do
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler
        "bf16": {"enabled": parallel.precision.compute == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": parallel.precision.reduce,
        "steps_per_print": None,
    }


def _find_runs(vendor: Any, optimizer: torch.optim.Optimizer, zero: int) -> dict[str, Run]:
    """Where deepspeed keeps each parameter. Its own getters copy; a checkpoint is read in place."""
    found = {}
    for name, p in vendor.module.named_parameters():
        shape, start, size, flat, offset = p.shape, 0, p.numel(), p, 0
        if zero == 3:
            stage = vendor.optimizer
            group, offset, part = stage.grad_position[stage.get_param_id(p)]
            flat = stage.fp32_partitioned_groups_flat[group]
            shape, start = p.ds_shape, min(dist.get_rank() * part, p.ds_numel)
            size = min(part, p.ds_numel - start)  # the last parts are padded
        elif zero:
            flat = optimizer.param_groups[0]["params"][0]
            size = 0
            if p._hp_mapping is not None:
                there, here = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
                start, size, offset = there.start, there.numel, here.start
        moments = {key: value for key, value in optimizer.state.get(flat, {}).items() if key in MOMENTS}
        found[name] = Run(
            shape,
            start,
            flat.detach().view(-1)[offset : offset + size],
            {key: value.view(-1)[offset : offset + size] for key, value in moments.items()},
        )
    return found
