"""Where the weights of an encoder of transformers are: what its configuration says of it, and what must hold."""

import inspect
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeVar

import torch

from opensora.utils.errors import UserError
from opensora.utils.limits import Limits

# Fields of configurations that say where the weights are, and nothing of the features.
PLACEMENT = ("device", "shard", "offload", "cache_mib")
PLACEMENT_LIMITS: Limits = {"cache_mib": (2**24, "that is 16 TiB of memory")}
Class = TypeVar("Class", bound=type)


class Placement(Protocol):
    """What a configuration says of where the weights are."""

    @property
    def device(self) -> Literal["auto", "cpu"]: ...
    @property
    def shard(self) -> bool: ...
    @property
    def offload(self) -> bool: ...
    @property
    def cache_mib(self) -> int: ...


def check_placement(cfg: Placement) -> None:
    """
    Raises:
        ValueError: ``field=value: what is allowed``.
    """
    if cfg.cache_mib < 0:
        raise ValueError(f"cache_mib={cfg.cache_mib}: must be an integer >= 0; 0 keeps the empty prompt only")
    for name in ("shard", "offload"):
        if cfg.device == "cpu" and getattr(cfg, name):
            raise ValueError(f"{name}=true: with device=cpu must be false; the weights are not on the GPU")


def check_moves(cfg: Placement, section: str = "text") -> None:
    """That there is a device to move weights to.

    Raises:
        UserError: there is none.
    """
    if cfg.offload and not torch.cuda.is_available():
        raise UserError(f"{section}.offload=true: must be false without a GPU; the weights are in CPU memory as it is")


@dataclass(frozen=True, kw_only=True)
class PlacedConfig:
    """Keys of every text encoder that transformers makes; ``own_keys_first`` goes above the class of a kind."""

    device: Literal["auto", "cpu"] = "auto"  # where prompts are encoded: on the run's device, or on the CPU
    shard: bool = False  # weights are cut over all processes (of a copy of the model's), each block gathered for use
    offload: bool = False  # weights are in CPU memory, and on the GPU only while prompts are encoded
    cache_mib: int = 64  # features of the last prompts that a process keeps

    PLACEMENT: ClassVar[tuple[str, ...]] = PLACEMENT
    LIMITS: ClassVar[Limits] = PLACEMENT_LIMITS

    def __post_init__(self) -> None:
        check_placement(self)


@dataclass(frozen=True, kw_only=True)
class TokensConfig(PlacedConfig):
    """Of a kind that gives as many rows as it is told."""

    max_tokens: int = 512

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: must be an integer >= 1")
        super().__post_init__()


def limits_of(reader: str) -> Limits:
    """``LIMITS`` of a kind whose ``max_tokens`` a model of this name reads."""
    return {"max_tokens": (65536, f"{reader} attends to all pairs of them"), **PLACEMENT_LIMITS}


def own_keys_first(cls: Class) -> Class:
    """A dataclass whose keys come as its body has them, then those that it inherits, which dataclasses put in front: in
    files that are written, in the docs and in messages."""
    fields = vars(cls)["__dataclass_fields__"]
    own = [name for name in inspect.get_annotations(cls) if name in fields]
    inherited = [name for name in fields if name not in own]
    for name in (*own, *inherited):
        fields[name] = fields.pop(name)
    return cls
