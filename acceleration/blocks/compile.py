"""torch.compile, block by block: blocks of one kind share a graph, and every bucket of token counts does too.

What talks to other processes is left out (``torch.compiler.disable`` on the attention slots' fillings and on the
exchanges of tensor parallelism): it counts bytes, waits and chooses kernels, which no graph can hold. A block is then a
graph before attention and one after it, and attention a kernel that nothing could be fused with anyway.

The forward is compiled inside recomputation, not around it. ``torch.compile`` around ``torch.utils.checkpoint`` needs
the whole block in one graph, and where it is not, compiles nothing without a word.
"""

import torch
from torch import nn

from acceleration import protocol
from acceleration.config import CompileConfig


def apply(model: nn.Module, cfg: CompileConfig) -> None:
    """Compile the forward of every block, in place; it happens at the first call."""
    if not cfg.enabled:
        return
    for block in protocol.blocks(model):
        # The forward is replaced, not the module wrapped: parameter names stay what checkpoints say.
        block.forward = torch.compile(block.forward, backend=cfg.backend, dynamic=cfg.dynamic)
