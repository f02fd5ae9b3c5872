"""Layer norms and RMS norms of a model by another kernel than torch's: what they compute, and their names, stay.

Compilers fuse torch's norms with what is around them, and cannot look into these; so they are for blocks as written.
"""

from functools import partial

from torch import Tensor, nn

from acceleration import nvidia_apex, protocol
from acceleration.config import ParallelConfig


def apply(model: nn.Module, cfg: ParallelConfig, device_type: str) -> None:
    """Replace the forward of every norm, in place, if apex is chosen."""
    if cfg.compile.enabled or not nvidia_apex.chosen(cfg.norm_kernel, "norms", device_type):
        return
    for module in model.modules():
        if "forward" in vars(module):  # a norm over channels of which this process holds a part has its own
            continue
        # The forward is replaced, not the module: parameter names stay what checkpoints say.
        if isinstance(module, nn.LayerNorm):
            module.forward = partial(_layer_norm, module)  # type: ignore[method-assign]
        elif isinstance(module, protocol.RMSNorm):
            module.forward = partial(_rms_norm, module)


def _layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = (None if part is None else part.to(x.dtype) for part in (module.weight, module.bias))
    return nvidia_apex.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


def _rms_norm(module: protocol.RMSNorm, x: Tensor) -> Tensor:
    return nvidia_apex.rms_norm(x, module.gain.shape, module.gain, module.eps)
