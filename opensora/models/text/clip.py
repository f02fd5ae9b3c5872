"""CLIP's pooled text as one token, as DiT and Latte of Open-Sora 1.0 read it; no mask, and no prompt is an embedding of
the denoiser's own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from opensora.models.base import TextFeatures
from opensora.models.text.caption_cleaning import Cleaning, cleaned
from opensora.models.text.folder import load_tokenizer
from opensora.models.text.placement import PlacedConfig, own_keys_first
from opensora.models.text.prompt_cache import Row
from opensora.models.text.transformers_encoder import CLIP_TOKENS, TransformersEncoder, copied, token_ids
from opensora.models.text.weights import EncoderFile, open_clip


@own_keys_first
@dataclass(frozen=True, kw_only=True)
class ClipConfig(PlacedConfig):
    """``clip_path``: the folder of openai/clip-vit-base-patch32, which gives 512 dims, or of any CLIP."""

    kind: Literal["clip"] = "clip"
    clip_path: str = ""  # folder of transformers, or the file of weights in it
    clean: Cleaning = "never"  # captions: never, as Open-Sora 1.0; in sampling alone; or always


class ClipTextEncoder(TransformersEncoder):
    """Prompt -> a row, which is also its vector. With ``peers``, ``encode`` is collective; prompts may differ."""

    cfg: ClipConfig

    def _opened(self) -> Sequence[EncoderFile]:
        from transformers import CLIPTokenizer

        self._tokenizer = load_tokenizer("clip_path", self.cfg.clip_path, CLIPTokenizer)
        file = open_clip("clip_path", self.cfg.clip_path)
        self.context_dim = self.vec_dim = int(file.module.config.hidden_size)  # type: ignore[union-attr, arg-type]
        return [file]

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextFeatures:
        """txt (B, 1, context_dim), y_vec (B, context_dim): the same; equal prompts are encoded once."""
        rows = self._rows([cleaned(prompt, self.cfg.clean == "always") for prompt in prompts], CLIP_TOKENS)
        pooled = torch.stack([row[0] for row in rows])
        return TextFeatures(txt=pooled[:, None], y_vec=pooled)

    def for_sampling(self, prompt: str) -> str:
        """A prompt as it is to be encoded in sampling."""
        return cleaned(prompt, self.cfg.clean == "sampling")

    def _encoded(self, prompts: list[str], length: int) -> Iterator[Row]:
        # CLIP tokenizers built from bare vocabulary files claim an unlimited length, so it is stated here.
        ids = token_ids(self._tokenizer, prompts, length)["input_ids"].to(self._work_device)
        (clip,) = self._modules
        return copied(clip(input_ids=ids).pooler_output.to(self._device))
