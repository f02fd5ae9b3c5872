"""T5 and CLIP as Open-Sora 2 and Flux use them: T5's last hidden state as txt, CLIP's pooled text as y_vec.

Both come from local folders in the layout of transformers; nothing is fetched. T5 is padded to ``max_tokens`` and its
padding is attended, by T5 itself and by the denoiser. T5 v1.1 XXL is 4.8 billion parameters, so where they are is a
matter of choice: whole on every device, cut over all processes, in CPU memory between uses, or on the CPU for good.
None of it changes a bit of the features.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from opensora.models.base import TextFeatures, Width
from opensora.models.text.folder import check_folder, load_tokenizer, stated_width
from opensora.models.text.prompt_cache import PromptCache
from opensora.models.text.row_by_row import row_by_row
from opensora.models.text.weights import EncoderFile, open_clip, open_t5
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.limits import Limits

CLIP_TOKENS = 77
TOGETHER = 8  # prompts for which sharded weights are gathered once


@dataclass(frozen=True, kw_only=True)
class T5ClipConfig:
    """Folders of the two models. T5 v1.1 XXL gives 4096 dims, CLIP ViT-L/14 768."""

    kind: Literal["t5_clip"] = "t5_clip"
    t5_path: str = ""  # folder of transformers, or the file of weights in it
    clip_path: str = ""  # likewise
    max_tokens: int = 512
    device: Literal["auto", "cpu"] = "auto"  # where prompts are encoded: on the run's device, or on the CPU
    shard: bool = False  # weights are cut over all processes (of a copy of the model's), each block gathered for use
    offload: bool = False  # weights are in CPU memory, and on the GPU only while prompts are encoded
    cache_mib: int = 64  # features of the last prompts that a process keeps

    # What says where the weights are, and nothing of the features.
    PLACEMENT: ClassVar[tuple[str, ...]] = ("device", "shard", "offload", "cache_mib")
    LIMITS: ClassVar[Limits] = {
        "max_tokens": (65536, "T5 attends to all pairs of them"),
        "cache_mib": (2**24, "that is 16 TiB of memory"),
    }

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: must be an integer >= 1")
        if self.cache_mib < 0:
            raise ValueError(f"cache_mib={self.cache_mib}: must be an integer >= 0; 0 keeps the empty prompt only")
        for name in ("shard", "offload"):
            if self.device == "cpu" and getattr(self, name):
                raise ValueError(f"{name}=true: with device=cpu must be false; the weights are not on the GPU")


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


class T5ClipTextEncoder:
    """Prompt -> T5 rows and a CLIP vector. With ``peers``, ``encode`` is collective; prompts may differ."""

    def __init__(
        self,
        cfg: T5ClipConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        peers: Peers | None = None,
        visits: "Callable[[Sequence[nn.Module], torch.device], Visits] | None" = None,
    ) -> None:
        """``visits``: what makes modules be on the device only while they are used; needed with ``offload``."""
        from transformers import AutoTokenizer, CLIPTokenizer

        self.cfg = cfg
        self._device, self._dtype = torch.device(device), dtype
        self._work_device = torch.device("cpu") if cfg.device == "cpu" else self._device
        self._peers = peers if cfg.shard else None
        check_folder("t5_path", cfg.t5_path)
        check_folder("clip_path", cfg.clip_path)
        self._t5_tokenizer = load_tokenizer("t5_path", cfg.t5_path, AutoTokenizer)
        self._clip_tokenizer = load_tokenizer("clip_path", cfg.clip_path, CLIPTokenizer)
        if cfg.shard and peers is None:
            announce("text.shard=true: this process works by itself, and holds T5 and CLIP whole")
        files = open_t5("t5_path", cfg.t5_path), open_clip("clip_path", cfg.clip_path)
        self._t5, self._clip = self._load(files[0]), self._load(files[1])
        self.context_dim: int = files[0].module.config.d_model  # type: ignore[union-attr, assignment]
        self.vec_dim: int = files[1].module.config.hidden_size  # type: ignore[union-attr, assignment]
        self._cache = PromptCache(cfg.cache_mib * 2**20)
        self._moved = None
        if self._moves:
            assert visits is not None, "text.offload=true: given by opensora/assembly/sharded_text.py"
            self._moved = visits((self._t5, self._clip), self._work_device)

    @property
    def _moves(self) -> bool:
        """Whether weights go to the device for encoding; sharded ones come with each gather."""
        return self.cfg.offload and self._peers is None and self._work_device.type != "cpu"

    def _load(self, file: EncoderFile) -> nn.Module:
        row_by_row(file.module.get_submodule(file.module.block_lists[0]).children())  # type: ignore[index, arg-type]
        if self._peers is not None:
            self._peers.place(file, self._dtype, offload=self.cfg.offload)
        else:
            file.fill("cpu" if self._moves else self._work_device, self._dtype)
        return file.module

    @torch.no_grad()
    def encode(self, prompts: list[str], *, added_tokens: int = 0, seq_align: int = 1) -> TextFeatures:
        """txt (B, max_tokens, context_dim), y_vec (B, vec_dim); longer prompts are cut, equal ones encoded once.

        ``seq_align``: T5 gets more padding, until its tokens and ``added_tokens`` together are a multiple of this.
        """
        length = self.cfg.max_tokens
        length += -(length + added_tokens) % seq_align
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
        found = [row for prompt in prompts if (row := rows[prompt]) is not None]
        return TextFeatures(txt=torch.stack([txt for txt, _ in found]), y_vec=torch.stack([vec for _, vec in found]))

    def tokens(self, prompts: list[str], length: int | None = None) -> tuple[Tensor, Tensor]:
        """Token ids for T5 (B, length) and CLIP (B, 77).

        ``length``: None: ``max_tokens``; what is beyond that is padding.
        """
        t5 = self._ids(self._t5_tokenizer, prompts, self.cfg.max_tokens)
        more = (length or self.cfg.max_tokens) - self.cfg.max_tokens
        if more:
            t5 = nn.functional.pad(t5, (0, more), value=self._t5_tokenizer.pad_token_id)
        # CLIP tokenizers built from bare vocabulary files claim an unlimited length, so it is stated here.
        return t5, self._ids(self._clip_tokenizer, prompts, CLIP_TOKENS)

    def _encoded(self, prompts: list[str], length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens, pooled) of each prompt, on the run's device."""
        t5_ids, clip_ids = (ids.to(self._work_device) for ids in self.tokens(prompts, length))
        txt = self._t5(input_ids=t5_ids).last_hidden_state.to(self._device)
        vec = self._clip(input_ids=clip_ids).pooler_output.to(self._device)
        # Copies: a view would keep the whole chunk in memory as long as one of its prompts is kept.
        return iter([(txt[row].clone(), vec[row].clone()) for row in range(len(prompts))])

    @contextmanager
    def _at_work(self, turns: int) -> Iterator[None]:
        """With the weights where prompts are encoded, if there is something to encode."""
        if self._moved is None or not turns:
            yield
            return
        with self._moved.here():
            yield

    @staticmethod
    def _ids(tokenizer: Any, prompts: list[str], length: int) -> Tensor:
        batch = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids: Tensor = batch["input_ids"]
        return ids


def stated_widths(cfg: T5ClipConfig) -> tuple[Width, Width]:
    """Widths of T5's tokens and of CLIP's vector, by the config.json of their folders; None: it does not say.

    Raises:
        UserError: as ``stated_width``; or weights that are to be moved to a GPU, and there is none.
    """
    t5, clip = (
        stated_width("t5_path", cfg.t5_path, "d_model"),
        stated_width("clip_path", cfg.clip_path, "hidden_size"),
    )
    if cfg.offload and not torch.cuda.is_available():
        raise UserError("text.offload=true: must be false without a GPU; the weights are in CPU memory as it is")
    return Width(t5, f"text.t5_path={cfg.t5_path}"), Width(clip, f"text.clip_path={cfg.clip_path}")


def check_files(cfg: T5ClipConfig) -> None:
    """That the files hold the two models of their config.json, by names and shapes; reads headers only.

    Raises:
        UserError: they do not, with everything that is missing, unexpected or of another shape.
    """
    open_t5("t5_path", cfg.t5_path)
    open_clip("clip_path", cfg.clip_path)
