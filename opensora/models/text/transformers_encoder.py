"""What encoders of transformers have in common: where their weights are, and features of the last prompts.

They come from local folders in the layout of transformers; nothing is fetched. T5 v1.1 XXL is 4.8 billion parameters,
LLaVA's Llama 7, so where they are is a matter of choice: whole on every device, cut over all processes, in CPU memory
between uses, or on the CPU for good. None of it changes a bit of the features.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from opensora.models.text.placement import Placement
from opensora.models.text.prompt_cache import PromptCache, Row
from opensora.models.text.row_by_row import row_by_row
from opensora.models.text.weights import EncoderFile
from opensora.utils.console import announce

TOGETHER = 8  # prompts for which sharded weights are gathered once
CLIP_TOKENS = 77


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

    cfg: Any  # of its own kind
    context_dim: int
    vec_dim: int

    def __init__(
        self,
        cfg: Placement,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        peers: Peers | None = None,
        visits: "Callable[[Sequence[nn.Module], torch.device], Visits] | None" = None,
    ) -> None:
        """See ``PlacedModules``."""
        self.cfg = cfg
        super().__init__(cfg, self._opened(), device, dtype, peers, visits)
        self._cache = PromptCache(cfg.cache_mib * 2**20)

    @abstractmethod
    def _opened(self) -> Sequence[EncoderFile]:
        """The files of ``_modules``, in this order; what else is needed of the folders is kept: tokenizers and widths.

        Raises:
            UserError: a folder is not there, or holds no such model.
        """

    @abstractmethod
    def _encoded(self, prompts: list[str], length: int) -> Iterator[Row]:
        """Features of each prompt, on the run's device, padded to so many tokens, as ``copied`` gives them."""

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


def masked_ids(tokenizer: Any, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Token ids and which of them are real, (B, length) each; longer prompts are cut."""
    batch = token_ids(tokenizer, prompts, length)
    return batch["input_ids"], batch["attention_mask"].bool()


def copied(*columns: Tensor) -> Iterator[Row]:
    """(B, ...) each -> the features of each prompt. A view would keep the whole chunk in memory as long as one of its
    prompts is kept."""
    return iter([tuple(column[row].clone() for column in columns) for row in range(len(columns[0]))])
