"""umT5 as Wan uses it: the last hidden state of a prompt's own tokens, and zeros behind them.

The zeros are no padding that a mask hides: the denoiser makes a constant of them and attends to it, as it was trained.
Prompts are cleaned as the published pipeline does it, in training too. No prompt is the prompt "".
"""

import html
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from opensora.models.base import TextFeatures, Width
from opensora.models.text.caption_cleaning import plain_unicode
from opensora.models.text.folder import check_folder, load_tokenizer, stated_width
from opensora.models.text.prompt_cache import Row
from opensora.models.text.transformers_encoder import (
    PLACEMENT,
    PLACEMENT_LIMITS,
    Peers,
    TransformersEncoder,
    Visits,
    check_moves,
    check_placement,
    token_ids,
)
from opensora.models.text.weights import open_umt5
from opensora.utils.limits import Limits


@dataclass(frozen=True, kw_only=True)
class UMT5Config:
    """``umt5_path``: umT5 XXL, which gives 4096 dims: a folder of transformers, or of a diffusers pipeline of Wan."""

    kind: Literal["umt5"] = "umt5"
    umt5_path: str = ""  # folder of transformers or of the whole pipeline, or the file of weights in it
    max_tokens: int = 512  # of a prompt
    device: Literal["auto", "cpu"] = "auto"  # where prompts are encoded: on the run's device, or on the CPU
    shard: bool = False  # weights are cut over all processes (of a copy of the model's), each block gathered for use
    offload: bool = False  # weights are in CPU memory, and on the GPU only while prompts are encoded
    cache_mib: int = 64  # features of the last prompts that a process keeps

    PLACEMENT: ClassVar[tuple[str, ...]] = PLACEMENT
    LIMITS: ClassVar[Limits] = {"max_tokens": (65536, "umT5 attends to all pairs of them"), **PLACEMENT_LIMITS}

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: must be an integer >= 1")
        check_placement(self)


class UMT5TextEncoder(TransformersEncoder):
    """Prompt -> umT5 rows. With ``peers``, ``encode`` is collective; prompts may differ."""

    vec_dim = 0

    def __init__(
        self,
        cfg: UMT5Config,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        peers: Peers | None = None,
        visits: "Callable[[Sequence[nn.Module], torch.device], Visits] | None" = None,
    ) -> None:
        """See ``TransformersEncoder``."""
        from transformers import AutoTokenizer

        self.cfg = cfg
        check_folder("umt5_path", cfg.umt5_path)
        self._tokenizer = load_tokenizer("umt5_path", cfg.umt5_path, AutoTokenizer)
        file = open_umt5("umt5_path", cfg.umt5_path)
        super().__init__(cfg, [file], device, dtype, peers, visits)
        self._umt5 = self._modules[0]
        self.context_dim: int = file.module.config.d_model  # type: ignore[union-attr, assignment]

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextFeatures:
        """txt (B, max_tokens, context_dim), y_vec (B, 0); longer prompts are cut, equal ones encoded once."""
        rows = self._rows([published_prompt(prompt) for prompt in prompts], self.cfg.max_tokens)
        txt = torch.stack([row[0] for row in rows])
        return TextFeatures(txt=txt, y_vec=txt.new_zeros(len(rows), 0))

    def tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and which of them are real, (B, max_tokens) each."""
        batch = token_ids(self._tokenizer, prompts, self.cfg.max_tokens)
        return batch["input_ids"], batch["attention_mask"].bool()

    def _encoded(self, prompts: list[str], length: int) -> Iterator[Row]:
        ids, mask = (x.to(self._work_device) for x in self.tokens(prompts))
        found = self._umt5(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        txt = torch.where(mask[..., None], found, 0.0).to(self._device)
        return iter([(txt[row].clone(),) for row in range(len(prompts))])


def published_prompt(text: str) -> str:
    """A prompt as Wan's own pipeline cleans it: plain Unicode, no HTML entities, single spaces. Comma and stop of
    Chinese become plain ones, as ftfy makes them there."""
    text = html.unescape(html.unescape(plain_unicode(text)))
    return re.sub(r"\s+", " ", text).strip()


def stated_umt5_width(cfg: UMT5Config) -> tuple[Width, Width]:
    """Widths of umT5's tokens and of the pooled vector, by the config.json of its folder; None: it does not say.

    Raises:
        UserError: as ``stated_width``; or weights that are to be moved to a GPU, and there is none.
    """
    width = stated_width("umt5_path", cfg.umt5_path, "d_model")
    check_moves(cfg)
    return Width(width, f"text.umt5_path={cfg.umt5_path}"), Width(0, "text.kind=umt5")


def check_umt5_files(cfg: UMT5Config) -> None:
    """That the files hold the model of their config.json, by names and shapes; reads headers only.

    Raises:
        UserError: they do not, with everything that is missing, unexpected or of another shape.
    """
    open_umt5("umt5_path", cfg.umt5_path)
