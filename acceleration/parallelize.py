"""The recipe: from a plain model to one that runs on a mesh. The order of the lines is the contract."""

import torch
from torch import nn

from acceleration import sequence
from acceleration.blocks import activation_checkpoint, block_streaming, compile, fused_norms
from acceleration.config import ParallelConfig
from acceleration.distributed.mesh import Mesh
from acceleration.protocol import Parallelizable, ParameterSource
from acceleration.sharding import fsdp, tensor_parallel


def parallelize(
    model: nn.Module,
    cfg: ParallelConfig,
    mesh: Mesh,
    device: torch.device,
    fill: ParameterSource,
    *,
    whole_on_host: bool = False,
    streams_frozen: bool = False,
) -> nn.Module:
    """Spread a model built on the meta device over ``mesh``, in place.

    Tensor parallelism first (it changes what a layer holds), then attention slots and norms (what fills them is what
    gets recomputed), then compilation (of what runs, and runs again), then recomputation, then sharding (which hooks
    the outside of a block), then memory and values: ``fill(name, tensor)`` gives the full value of one
    parameter, or parts of it, see ``sharding.materialize``. With ``whole_on_host`` nothing is sharded, and all of it is
    in CPU memory, for ``block_streaming``. With ``streams_frozen`` that is done here, to what is frozen in blocks, and
    what is trained is sharded.
    """
    assert isinstance(model, Parallelizable), type(model)
    tensor_parallel.apply(model, mesh["tensor"])
    sequence.fill_slots(model, mesh, cfg.attention, keeps=cfg.recompute.kind == "selective")
    fused_norms.apply(model, cfg, mesh.device_type)
    compile.apply(model, cfg.compile)
    activation_checkpoint.apply(model, cfg.recompute)
    on_host = cfg.offload == "parameters"
    if cfg.engine == "native" and not whole_on_host:
        fsdp.shard(
            model,
            cfg.zero,
            cfg.precision,
            mesh,
            offload=on_host,
            prefetch=cfg.prefetch,
            only_trained=streams_frozen,
        )
    else:  # shards by itself when it is built, from whole masters on the CPU
        on_host = True
    where = torch.device("cpu") if on_host else device
    if streams_frozen:
        fsdp.materialize(model, cfg.precision, where, fill, block_streaming.frozen)
        block_streaming.apply(model, device)
    else:
        fsdp.materialize(model, cfg.precision, where, fill)
    return model
