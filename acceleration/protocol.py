"""How a model says what it is made of, and how names with ``*`` find modules in it."""

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

# (kind, parts), see tensor_parallel.py; a part is (size, unit): it is cut at multiples of unit, as of a head.
LayerPlan: TypeAlias = tuple[str, tuple[tuple[int, int], ...]]


@runtime_checkable
class Shardable(Protocol):
    """A model that states its structure as data; nothing is inherited and nothing imported."""

    block_lists: tuple[str, ...]  # attributes that are ModuleLists: sharded, recomputed, compiled block by block
    attention_cores: tuple[str, ...]  # patterns of the attention slots, such as "double_blocks.*.core"

    tensor_shared: tuple[str, ...]  # parameters of one head that every head uses, such as "double_blocks.*.scale"

    def tensor_plan(self) -> dict[str, LayerPlan]:
        """Pattern of linear layers -> how tensor parallelism cuts them."""

    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill the full value of one parameter in place."""


def block_lists(model: nn.Module) -> tuple[str, ...]:
    """Names of the model's lists of blocks."""
    return model.block_lists  # type: ignore[return-value]


def blocks(model: nn.Module) -> list[nn.Module]:
    """Every block of every block list, in order."""
    lists = (model.get_submodule(name) for name in block_lists(model))
    return [block for blocks in lists for block in blocks.children()]


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) for everything that training changes; what is frozen has no gradient and no state."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def slots(
    model: nn.Module, patterns: tuple[str, ...], of: type[nn.Module] = nn.Module
) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, attribute, module) for every module of a type that a pattern names; ``*``: one path component.

    Raises:
        ValueError: a pattern that matches nothing, unless its block list is empty.
    """
    names = dict(model.named_modules())
    for pattern in patterns:
        found = [n for n, module in names.items() if isinstance(module, of) and matches(n, pattern)]
        root = names.get(pattern.split(".")[0])
        if not found and not (isinstance(root, nn.ModuleList) and len(root) == 0):
            raise ValueError(f"slot pattern {pattern!r} matches no {of.__name__} of {type(model).__name__}")
        for name in found:
            parent, _, attribute = name.rpartition(".")
            yield names[parent], attribute, names[name]


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name fits a dotted pattern; ``*`` stands for anything within one component."""
    names, patterns = name.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(fnmatchcase(n, p) for n, p in zip(names, patterns, strict=True))


@runtime_checkable
class PartialSource(Protocol):
    """A source of values that can give a part of a parameter without the rest, as a file can."""

    def __call__(self, name: str, tensor: Tensor) -> None:
        """Write the full value of one parameter into ``tensor``."""

    def read_part(self, name: str, start: tuple[int, ...], part: Tensor) -> bool:
        """Write the full parameter's values from index ``start`` on into ``part``; False: ask for all of it instead."""


ParameterSource: TypeAlias = Callable[[str, Tensor], None] | PartialSource
