"""T5 alone, as Open-Sora 1.x and PixArt use it: its last hidden state, and which tokens are real.

Padding is attended neither by T5 nor by the denoiser. There is no pooled vector, and no prompt is an embedding of the
denoiser's own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from opensora.models.base import TextFeatures
from opensora.models.text.caption_cleaning import Cleaning, cleaned
from opensora.models.text.folder import load_tokenizer
from opensora.models.text.placement import TokensConfig, limits_of, own_keys_first
from opensora.models.text.prompt_cache import Row
from opensora.models.text.transformers_encoder import TransformersEncoder, copied, masked_ids
from opensora.models.text.weights import EncoderFile, open_t5
from opensora.utils.limits import Limits


@own_keys_first
@dataclass(frozen=True, kw_only=True)
class T5Config(TokensConfig):
    """``t5_path``: the folder of T5 v1.1 XXL, which gives 4096 dims, or of any T5."""

    kind: Literal["t5"] = "t5"
    t5_path: str = ""  # folder of transformers, or the file of weights in it
    max_tokens: int = 300  # of a prompt: 120 in Open-Sora 1.0, 200 in 1.1, 300 in 1.2 and 1.3
    clean: Cleaning = "sampling"  # captions: in sampling alone, as Open-Sora 1.1 to 1.3; always, as 1.0; or never

    LIMITS: ClassVar[Limits] = limits_of("T5")


class T5TextEncoder(TransformersEncoder):
    """Prompt -> T5 rows and a mask. With ``peers``, ``encode`` is collective; prompts may differ."""

    cfg: T5Config
    vec_dim = 0

    def _opened(self) -> Sequence[EncoderFile]:
        from transformers import AutoTokenizer

        self._tokenizer = load_tokenizer("t5_path", self.cfg.t5_path, AutoTokenizer)
        file = open_t5("t5_path", self.cfg.t5_path)
        self.context_dim = file.module.config.d_model  # type: ignore[union-attr, assignment]
        return [file]

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextFeatures:
        """txt (B, max_tokens, context_dim), y_vec (B, 0), mask; longer prompts are cut, equal ones encoded once."""
        rows = self._rows([cleaned(prompt, self.cfg.clean == "always") for prompt in prompts], self.cfg.max_tokens)
        txt = torch.stack([txt for txt, _ in rows])
        return TextFeatures(txt=txt, y_vec=txt.new_zeros(len(rows), 0), mask=torch.stack([mask for _, mask in rows]))

    def for_sampling(self, prompt: str) -> str:
        """A prompt as it is to be encoded in sampling."""
        return cleaned(prompt, self.cfg.clean == "sampling")

    def tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and which of them are real, (B, max_tokens) each."""
        return masked_ids(self._tokenizer, prompts, self.cfg.max_tokens)

    def _encoded(self, prompts: list[str], length: int) -> Iterator[Row]:
        ids, mask = (x.to(self._work_device) for x in self.tokens(prompts))
        (t5,) = self._modules
        txt = t5(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return copied(txt.to(self._device), mask.to(self._device))
