"""How a model says what it is made of, and how names with ``*`` find modules in it."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Shardable(Protocol):
    """A model that states its structure as data; nothing is inherited and nothing imported."""

    block_lists: tuple[str, ...]  # attributes that are ModuleLists: sharded, recomputed, compiled block by block
    attention_cores: tuple[str, ...]  # patterns of the attention slots, such as "double_blocks.*.core"

    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill the full value of one parameter in place."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """Every block of every block list, in order."""
    lists = (model.get_submodule(name) for name in model.block_lists)  # type: ignore[union-attr]
    return [block for blocks in lists for block in blocks.children()]


def slots(model: nn.Module, patterns: tuple[str, ...]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, attribute, module) for every module that a pattern names; ``*`` stands for one path component.

    Raises:
        ValueError: a pattern that matches nothing, unless its block list is empty.
    """
    names = dict(model.named_modules())
    for pattern in patterns:
        parts = pattern.split(".")
        found = [n for n in names if _matches(n.split("."), parts)]
        root = names.get(parts[0])
        if not found and not (isinstance(root, nn.ModuleList) and len(root) == 0):
            raise ValueError(f"slot pattern {pattern!r} matches no module of {type(model).__name__}")
        for name in found:
            parent, _, attribute = name.rpartition(".")
            yield names[parent], attribute, names[name]


def _matches(name: list[str], pattern: list[str]) -> bool:
    return len(name) == len(pattern) and all(p in ("*", n) for n, p in zip(name, pattern, strict=True))
