"""A two-stream toy that is Parallelizable: acceleration must work for any model that states its structure."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Core(nn.Module):
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, context: Any = None
    ) -> Tensor:
        mask = None if key_mask is None else key_mask[:, None, None, :]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.core = Core()

    def forward(self, x: Tensor, vec: Tensor, key_mask: Tensor | None, context: Any) -> Tensor:
        q, k, v = self.qkv(x + vec[:, None]).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        return x + self.out(self.core(q, k, v, key_mask=key_mask, context=context).flatten(2))


class Toy(nn.Module):
    block_lists = ("blocks",)
    attention_cores: ClassVar[dict[str, str]] = {"blocks.*.core": "joint"}
    axis_switches: ClassVar[dict[str, str]] = {}
    tensor_shared = ()

    def __init__(self, width: int = 24, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.inp, self.vec = nn.Linear(5, width), nn.Linear(3, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final = nn.Linear(width, 5)

    def forward(self, x: Tensor, vec: Tensor, *, key_mask: Tensor | None = None, context: Any = None) -> Tensor:
        dtype = self.inp.weight.dtype
        x, vec = self.inp(x.to(dtype)), self.vec(vec.to(dtype))
        for block in self.blocks:
            x = block(x, vec, key_mask, context)
        return self.final(x)

    def tensor_plan(self) -> dict[str, tuple[str, tuple[tuple[int, int], ...]]]:
        heads = (self.width, self.width // self.heads)
        return {"blocks.*.qkv": ("column", (heads, heads, heads)), "blocks.*.out": ("row", (heads,))}

    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0, 0.2, generator=generator)
