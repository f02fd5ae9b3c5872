"""torch's flex_attention: key masks at no cost but the blocks they leave. On the CPU torch has no backward of it.

Not run on a GPU yet.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from acceleration.attention.kernels.base import by_autograd, heads_first


def _run(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    blocks = None
    if key_mask is not None:

        def attended(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key_mask[batch, key]

        blocks = create_block_mask(attended, len(key_mask), None, q.shape[1], k.shape[1], device=q.device)
    attend = _compiled() if q.is_cuda else _plain
    queries, keys, values = (x.contiguous() for x in heads_first(q, k, v))
    out, extra = attend(queries, keys, values, block_mask=blocks, return_aux=AuxRequest(lse=True))
    return out.transpose(1, 2), extra.lse


_plain: Any = flex_attention  # as torch declares it, type checkers find no function that can be called


@functools.cache
def _compiled() -> Any:
    """Only the compiled function is fused; lengths vary from bucket to bucket."""
    return torch.compile(_plain, dynamic=True)


FLEX = by_autograd(_run)
