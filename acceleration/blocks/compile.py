"""torch.compile, block by block: blocks of one kind share a graph, and every bucket of token counts does too.

What talks to other processes is left out (``torch.compiler.disable`` on the attention slots' fillings and on the
exchanges of tensor parallelism): it counts bytes, waits and chooses kernels, which no graph can hold. A block is then a
graph before attention and one after it, and attention a kernel that nothing could be fused with anyway.

A graph holds for all token counts but for what a compiler cannot leave open: an axis of length 1 has a graph of its own
(one sample, one frame), and so has every combination of arguments that are there and are not. Two axes that happen to
be of one length in the first batch are not taken for the same, or every such coincidence would be a graph, too; and
constants stay constants.

The forward is compiled inside recomputation, not around it. ``torch.compile`` around ``torch.utils.checkpoint`` needs
the whole block in one graph, and where it is not, compiles nothing without a word.
"""

import torch
from torch import _dynamo, nn
from torch.fx.experimental import _config as shapes

from acceleration import protocol
from acceleration.config import CompileConfig

MOST_GRAPHS = 64  # of one block's code: its kinds, axes of length 1, arguments that are there or not


def apply(model: nn.Module, cfg: CompileConfig) -> None:
    """Compile the forward of every block, in place; it happens at the first call."""
    if not cfg.enabled:
        return
    if cfg.dynamic:
        shapes.use_duck_shape = False
        _dynamo.config.specialize_float = True
        # Kinds of block share their code, and with it this limit; what is beyond it would run as written, unsaid.
        _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, MOST_GRAPHS)
    for block in protocol.blocks(model):
        # The forward is replaced, not the module wrapped: parameter names stay what checkpoints say.
        block.forward = torch.compile(block.forward, backend=cfg.backend, dynamic=cfg.dynamic)
