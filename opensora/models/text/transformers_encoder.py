"""What encoders of transformers have in common: where their weights are, and features of the last prompts.

They come from local folders in the layout of transformers; nothing is fetched. T5 v1.1 XXL is 4.8 billion parameters,
LLaVA's Llama 7, so where they are is a matter of choice: whole on every device, cut over all processes, in CPU memory
between uses, or on the CPU for good. None of it changes a bit of the features.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import nn

from opensora.models.text.prompt_cache import PromptCache, Row
from opensora.models.text.row_by_row import row_by_row
from opensora.models.text.weights import EncoderFile
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.limits import Limits

TOGETHER = 8  # prompts for which sharded weights are gathered once
CLIP_TOKENS = 77
# Fields of configurations that say where the weights are, and nothing of the features.
PLACEMENT = ("device", "shard", "offload", "cache_mib")
PLACEMENT_LIMITS: Limits = {"cache_mib": (2**24, "that is 16 TiB of memory")}


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


class Peers(Protocol):
    """The processes over which the weights are cut (``opensora/assembly/sharded_text.py``)."""

    def place(self, file: EncoderFile, dtype: torch.dtype, *, offload: bool) -> None:
        """Cut a module on the meta device over all of them, and read this process's pieces. Collective."""

    def most(self, count: int) -> int:
        """The largest of everyone's counts. Collective."""


class Visits(Protocol):
    """Weights in CPU memory that visit the device (``acceleration/blocks/module_offload.py``)."""

    def here(self) -> AbstractContextManager[None]:
        """With the weights on the device."""


class PlacedModules:
    """Modules of transformers where the configuration wants their weights."""

    section = "text"  # of the configuration, for messages

    def __init__(
        self,
        cfg: Placement,
        files: Sequence[EncoderFile],
        device: torch.device | str,
        dtype: torch.dtype,
        peers: Peers | None,
        visits: "Callable[[Sequence[nn.Module], torch.device], Visits] | None",
    ) -> None:
        """``visits``: what makes modules be on the device only while they are used; needed with ``offload``."""
        self._placement = cfg
        self._device, self._dtype = torch.device(device), dtype
        self._work_device = torch.device("cpu") if cfg.device == "cpu" else self._device
        self._peers = peers if cfg.shard else None
        if cfg.shard and peers is None:
            announce(f"{self.section}.shard=true: this process works by itself, and holds its models whole")
        self._modules = [self._load(file) for file in files]
        self._moved = None
        if self._moves:
            assert visits is not None, "offload=true: given by opensora/assembly/sharded_text.py"
            self._moved = visits(self._modules, self._work_device)

    @property
    def _moves(self) -> bool:
        """Whether weights go to the device for encoding; sharded ones come with each gather."""
        return self._placement.offload and self._peers is None and self._work_device.type != "cpu"

    def _load(self, file: EncoderFile) -> nn.Module:
        row_by_row(file.module.get_submodule(file.module.block_lists[0]).children())  # type: ignore[index, arg-type]
        if self._peers is not None:
            self._peers.place(file, self._dtype, offload=self._placement.offload)
        else:
            file.fill("cpu" if self._moves else self._work_device, self._dtype)
        return file.module

    @contextmanager
    def _at_work(self, turns: int) -> Iterator[None]:
        """With the weights where they are used, if there is something to encode."""
        if self._moved is None or not turns:
            yield
            return
        with self._moved.here():
            yield


class TransformersEncoder(PlacedModules, ABC):
    """Prompt -> rows of features. With ``peers``, encoding is collective; prompts may differ."""

    def __init__(
        self,
        cfg: Placement,
        files: Sequence[EncoderFile],
        device: torch.device | str,
        dtype: torch.dtype,
        peers: Peers | None,
        visits: "Callable[[Sequence[nn.Module], torch.device], Visits] | None",
    ) -> None:
        """See ``PlacedModules``."""
        super().__init__(cfg, files, device, dtype, peers, visits)
        self._cache = PromptCache(cfg.cache_mib * 2**20)

    @abstractmethod
    def _encoded(self, prompts: list[str], length: int) -> Iterator[Row]:
        """Features of each prompt, on the run's device, padded to so many tokens. Copies: a view would keep the whole
        chunk in memory as long as one of its prompts is kept."""

    @torch.no_grad()
    def _rows(self, prompts: list[str], length: int) -> list[Row]:
        """Features of all prompts; those that are not kept are made, equal ones once."""
        rows = {prompt: self._cache.get((prompt, length)) for prompt in prompts}
        missing = [prompt for prompt, row in rows.items() if row is None]
        turns = math.ceil(len(missing) / TOGETHER)
        if self._peers is not None:  # weights are gathered by all, also for one that needs nothing
            turns = self._peers.most(turns)
        with self._at_work(turns):
            for turn in range(turns):
                chosen = missing[turn * TOGETHER : (turn + 1) * TOGETHER]
                for prompt, made in zip(chosen, self._encoded(chosen or [""], length), strict=False):
                    rows[prompt] = made
                    self._cache.put((prompt, length), made)
        return [row for prompt in prompts if (row := rows[prompt]) is not None]


def token_ids(tokenizer: Any, prompts: list[str], length: int) -> Any:
    """``input_ids`` and ``attention_mask`` (B, length); longer prompts are cut."""
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
