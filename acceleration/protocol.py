"""How a model says what it is made of, and how names with ``*`` find modules in it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

# (kind, parts), see tensor_parallel.py; a part is (size, unit): it is cut at multiples of unit, as of a head.
LayerPlan: TypeAlias = tuple[str, tuple[tuple[int, int], ...]]
SHARE_INPUT = ("column", "gather")  # kinds of layers that read the same on every process, each for outputs of its own


AttentionAxis: TypeAlias = Literal["joint", "space", "time", "window", "cross"]
TokenAxis: TypeAlias = Literal["space", "time"]


@runtime_checkable
class Parallelizable(Protocol):
    """A model that states its structure as data; nothing is inherited and nothing imported.

    Its tokens are one sequence (B, N, D), cut over processes along N; or frames x places (B, T, S, D), cut along S but
    for what runs between two axis switches, which may be cut along T.
    """

    block_lists: tuple[str | tuple[str, ...], ...]
    # attributes that are ModuleLists: sharded, recomputed, compiled block by block, in the order in which they run;
    # lists in a tuple of their own run in turns: ("spatial", "temporal") is spatial.0, temporal.0, spatial.1, ...

    attention_cores: Mapping[str, AttentionAxis]
    # pattern of attention slots, such as "double_blocks.*.core" -> what attention runs along:
    #   joint  the whole sequence, queries and keys alike
    #   space  the places of a frame, (B * frames, places, H, Dh); behind a switch to space
    #   time   the frames of a place, (B * places, frames, H, Dh)
    #   window places that lie together, over frames: (B, frames, places, H, Dh), and ``grid``, its tokens along (t, h,
    #          w). What is in the slot gathers them for its own ``core``, and says by ``keys(frames)`` how many meet
    #   cross  queries are tokens, keys and values are of something that every process holds whole, such as text

    axis_switches: Mapping[str, TokenAxis]
    # pattern of identity modules, called with (x, context), x (B, frames, places, ...) -> the axis that is whole on
    # this process behind it. Tokens enter the model with time whole, and leave it so

    tensor_shared: tuple[str, ...]  # parameters of one head that every head uses, such as "double_blocks.*.scale"

    def tensor_plan(self) -> dict[str, LayerPlan]:
        """Pattern of linear layers, and of norms over all heads -> how tensor parallelism cuts them."""

    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill the full value of one parameter in place."""


def block_lists(model: nn.Module) -> tuple[str, ...]:
    """Names of the model's lists of blocks."""
    return tuple(name for names in _turns(model) for name in names)


def block_names(model: nn.Module) -> list[str]:
    """Of every block of every block list, in the order in which they run."""
    found = []
    for names in _turns(model):
        columns = [[f"{name}.{key}" for key, _ in model.get_submodule(name).named_children()] for name in names]
        turns = zip_longest(*columns)
        found += [name for turn in turns for name in turn if name is not None]
    return found


def blocks(model: nn.Module) -> list[nn.Module]:
    """Every block of every block list, in the order in which they run."""
    return [model.get_submodule(name) for name in block_names(model)]


def block_numbers(model: nn.Module) -> dict[int, int]:
    """Identity of every module of a block -> the block's number."""
    return {id(module): index for index, block in enumerate(blocks(model)) for module in block.modules()}


def _turns(model: nn.Module) -> Iterator[tuple[str, ...]]:
    stated: tuple[str | tuple[str, ...], ...] = model.block_lists  # type: ignore[assignment]
    return ((names,) if isinstance(names, str) else names for names in stated)


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) for everything that training changes; what is frozen has no gradient and no state."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def slots(
    model: nn.Module, patterns: Iterable[str], of: type[nn.Module] = nn.Module
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
class RMSNorm(Protocol):
    """A module that computes x / sqrt(mean(x^2) + eps) * gain over the last dim."""

    eps: float

    @property
    def gain(self) -> Tensor:
        """(dim,)"""


@runtime_checkable
class PartialSource(Protocol):
    """A source of values that can give a part of a parameter without the rest, as a file can."""

    def __call__(self, name: str, tensor: Tensor) -> None:
        """Write the full value of one parameter into ``tensor``."""

    def read_part(self, name: str, start: tuple[int, ...], part: Tensor) -> bool:
        """Write the full parameter's values from index ``start`` on into ``part``; False: ask for all of it instead."""


ParameterSource: TypeAlias = Callable[[str, Tensor], None] | PartialSource
