"""umT5 as Wan uses it: the last hidden state of a prompt's own tokens, and zeros behind them.

The zeros are no padding that a mask hides: the denoiser makes a constant of them and attends to it, as it was trained.
Prompts are cleaned as the published pipeline does it, in training too. No prompt is the prompt "".
"""

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from opensora.models.base import TextFeatures
from opensora.models.text.caption_cleaning import plain_unicode
from opensora.models.text.folder import load_tokenizer
from opensora.models.text.placement import TokensConfig, limits_of, own_keys_first
from opensora.models.text.prompt_cache import Row
from opensora.models.text.transformers_encoder import TransformersEncoder, copied, masked_ids
from opensora.models.text.weights import EncoderFile, open_umt5
from opensora.utils.limits import Limits


@own_keys_first
@dataclass(frozen=True, kw_only=True)
class UMT5Config(TokensConfig):
    """``umt5_path``: umT5 XXL, which gives 4096 dims: a folder of transformers, or of a diffusers pipeline of Wan."""

    kind: Literal["umt5"] = "umt5"
    umt5_path: str = ""  # folder of transformers or of the whole pipeline, or the file of weights in it
    max_tokens: int = 512  # of a prompt

    LIMITS: ClassVar[Limits] = limits_of("umT5")


class UMT5TextEncoder(TransformersEncoder):
    """Prompt -> umT5 rows. With ``peers``, ``encode`` is collective; prompts may differ."""

    cfg: UMT5Config
    vec_dim = 0

    def _opened(self) -> Sequence[EncoderFile]:
        from transformers import AutoTokenizer

        self._tokenizer = load_tokenizer("umt5_path", self.cfg.umt5_path, AutoTokenizer)
        file = open_umt5("umt5_path", self.cfg.umt5_path)
        self.context_dim = file.module.config.d_model  # type: ignore[union-attr, assignment]
        return [file]

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextFeatures:
        """txt (B, max_tokens, context_dim), y_vec (B, 0); longer prompts are cut, equal ones encoded once."""
        rows = self._rows([published_prompt(prompt) for prompt in prompts], self.cfg.max_tokens)
        txt = torch.stack([row[0] for row in rows])
        return TextFeatures(txt=txt, y_vec=txt.new_zeros(len(rows), 0))

    def tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and which of them are real, (B, max_tokens) each."""
        return masked_ids(self._tokenizer, prompts, self.cfg.max_tokens)

    def _encoded(self, prompts: list[str], length: int) -> Iterator[Row]:
        ids, mask = (x.to(self._work_device) for x in self.tokens(prompts))
        (umt5,) = self._modules
        found = umt5(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return copied(torch.where(mask[..., None], found, 0.0).to(self._device))


def published_prompt(text: str) -> str:
    """A prompt as Wan's own pipeline cleans it: plain Unicode, no HTML entities, single spaces. Comma and stop of
    Chinese become plain ones, as ftfy makes them there."""
    text = html.unescape(html.unescape(plain_unicode(text)))
    return re.sub(r"\s+", " ", text).strip()
