"""Which numbers are kept in which type."""

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from acceleration.config import PrecisionConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def fsdp_policy(cfg: PrecisionConfig) -> MixedPrecisionPolicy:
    """Weights are cast to ``compute`` as they are gathered, gradients reduced in ``reduce``; masters stay as they are.

    Inputs are not cast: the model casts tokens to its weights' type itself and keeps timesteps, positions and RoPE
    tables in full precision, which a blanket cast would destroy.
    """
    return MixedPrecisionPolicy(
        param_dtype=None if cfg.compute == cfg.master else DTYPES[cfg.compute],
        reduce_dtype=None if cfg.reduce == cfg.compute == cfg.master else DTYPES[cfg.reduce],
        cast_forward_inputs=False,
    )
