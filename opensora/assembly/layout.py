"""That a layout of processes fits the model, this machine and the way of sampling."""

import torch

from acceleration import nvidia_apex
from acceleration.attention import kernels
from acceleration.config import MeshConfig, OptimConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.sharding import tensor_parallel
from opensora.models.base import ModelConfig
from opensora.models.families import build_model, describe
from opensora.sampling.guidance import passes_per_step
from opensora.sampling.options import SamplingOption
from opensora.utils.console import announce
from opensora.utils.errors import UserError


def check_layout(mesh: MeshConfig, world_size: int, model: ModelConfig) -> None:
    """That this many processes can be arranged as asked, and can share the model's heads.

    Raises:
        UserError: the key to change, and what would work.
    """
    try:
        degrees = meshes.resolve(mesh, world_size)
    except ValueError as error:
        raise UserError(f"parallel.mesh: {error}") from None
    tensor, ulysses, ring = degrees["tensor"], degrees["ulysses"], degrees["ring"]
    all_heads = describe(model).heads
    if tensor > 1:
        try:
            with torch.device("meta"):
                tensor_parallel.check(build_model(model), tensor)
        except ValueError as error:
            allowed = ", ".join(str(d) for d in range(1, all_heads + 1) if all_heads % d == 0)
            raise UserError(f"parallel.mesh.{error}; divisors of the model's heads are {allowed}") from None
    if ring * ulysses > 1 and not describe(model).cuts_tokens:
        key, degree = ("ulysses", ulysses) if ulysses > 1 else ("ring", ring)
        raise UserError(
            f"parallel.mesh.{key}={degree}: blocks of model.kind={model.kind} thin out neighbouring keys "
            "(kv_compress_layer), so a process must have all tokens of a clip; must be 1, use shard and tensor"
        )
    heads = all_heads // tensor
    if describe(model).token_axes == "factored":  # exchanges frames for places: any number of heads will do
        return
    if ulysses > heads:
        best = max(d for d in range(1, heads + 1) if (ring * ulysses) % d == 0)
        raise UserError(
            f"parallel.mesh.ulysses={ulysses}: more than the {heads} heads that each process holds; "
            f"use ulysses={best} with ring={ring * ulysses // best}"
        )
    if heads % ulysses:
        announce(
            f"parallel.mesh.ulysses={ulysses} does not divide {heads} heads: some processes attend with "
            f"{-(-heads // ulysses)} heads, others with {heads // ulysses}"
        )


def check_kernels(parallel: ParallelConfig, optim: OptimConfig | None = None) -> None:
    """That this machine has the kernels that a configuration names; where torch's stand in for others, it is said.

    Raises:
        UserError: what is missing, and what would work.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kernels.check_kernel(parallel.attention, device)
    except ValueError as error:
        raise UserError(f"parallel.{error}") from None
    choices: list[nvidia_apex.Asked] = []
    if not parallel.compile.enabled:
        choices.append(nvidia_apex.Asked("parallel.norm_kernel", parallel.norm_kernel, "norms", device))
    if optim is not None and optim.kind == "adamw":
        on_device = parallel.engine == "native" and parallel.offload == "none"
        choices.append(nvidia_apex.Asked("optim.kernel", optim.kernel, "adam", device if on_device else "cpu"))
    try:
        stands_in = nvidia_apex.check(choices)
    except ValueError as error:
        raise UserError(str(error)) from None
    if stands_in:
        announce(stands_in)


def check_guidance(mesh: MeshConfig, world_size: int, option: SamplingOption, *, references: bool = False) -> None:
    """That every process along the cfg axis has a pass of guidance to compute.

    Args:
        references: some clips have known frames.

    Raises:
        UserError: the key to change, and what would work.
    """
    degree, passes = meshes.resolve(mesh, world_size)["cfg"], passes_per_step(option, references=references)
    if degree <= passes:
        return
    if references and passes > 1:
        why = f"clips with references are guided by {passes} passes per step"
    elif passes > 1:
        why = f"text to video is guided by {passes} passes per step (a third needs references)"
    elif option.method == "distill":
        why = "sampling.method=distill makes one pass per step"
    else:
        why = f"sampling.guidance={option.guidance:g} is off, one pass per step"
    raise UserError(
        f"parallel.mesh.cfg={degree}: {why}; set parallel.mesh.cfg={passes}, and ring, ulysses or shard=-1 for the rest"
    )
