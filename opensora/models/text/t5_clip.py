"""T5 and CLIP as Open-Sora 2 and Flux use them: T5's last hidden state as txt, CLIP's pooled text as y_vec.

T5 is padded to ``max_tokens`` and its padding is attended, by T5 itself and by the denoiser.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from opensora.models.base import TextFeatures
from opensora.models.text.folder import check_folder, load_tokenizer
from opensora.models.text.placement import TokensConfig, limits_of, own_keys_first
from opensora.models.text.prompt_cache import Row
from opensora.models.text.transformers_encoder import CLIP_TOKENS, TransformersEncoder, copied, token_ids
from opensora.models.text.weights import EncoderFile, open_clip, open_t5
from opensora.utils.limits import Limits


@own_keys_first
@dataclass(frozen=True, kw_only=True)
class T5ClipConfig(TokensConfig):
    """Folders of the two models. T5 v1.1 XXL gives 4096 dims, CLIP ViT-L/14 768."""

    kind: Literal["t5_clip"] = "t5_clip"
    t5_path: str = ""  # folder of transformers, or the file of weights in it
    clip_path: str = ""  # likewise
    max_tokens: int = 512

    LIMITS: ClassVar[Limits] = limits_of("T5")


class T5ClipTextEncoder(TransformersEncoder):
    """Prompt -> T5 rows and a CLIP vector. With ``peers``, ``encode`` is collective; prompts may differ."""

    cfg: T5ClipConfig

    def _opened(self) -> Sequence[EncoderFile]:
        from transformers import AutoTokenizer, CLIPTokenizer

        t5, clip = self.cfg.t5_path, self.cfg.clip_path
        check_folder("t5_path", t5)
        check_folder("clip_path", clip)
        self._t5_tokenizer = load_tokenizer("t5_path", t5, AutoTokenizer)
        self._clip_tokenizer = load_tokenizer("clip_path", clip, CLIPTokenizer)
        files = open_t5("t5_path", t5), open_clip("clip_path", clip)
        self.context_dim = files[0].module.config.d_model  # type: ignore[union-attr, assignment]
        self.vec_dim = files[1].module.config.hidden_size  # type: ignore[union-attr, assignment]
        return files

    @torch.no_grad()
    def encode(self, prompts: list[str], *, added_tokens: int = 0, seq_align: int = 1) -> TextFeatures:
        """txt (B, max_tokens, context_dim), y_vec (B, vec_dim); longer prompts are cut, equal ones encoded once.

        ``seq_align``: T5 gets more padding, until its tokens and ``added_tokens`` together are a multiple of this.
        """
        length = self.cfg.max_tokens
        length += -(length + added_tokens) % seq_align
        rows = self._rows(prompts, length)
        return TextFeatures(txt=torch.stack([txt for txt, _ in rows]), y_vec=torch.stack([vec for _, vec in rows]))

    def tokens(self, prompts: list[str], length: int | None = None) -> tuple[Tensor, Tensor]:
        """Token ids for T5 (B, length) and CLIP (B, 77).

        ``length``: None: ``max_tokens``; what is beyond that is padding.
        """
        t5 = _ids(self._t5_tokenizer, prompts, self.cfg.max_tokens)
        more = (length or self.cfg.max_tokens) - self.cfg.max_tokens
        if more:
            t5 = nn.functional.pad(t5, (0, more), value=self._t5_tokenizer.pad_token_id)
        # CLIP tokenizers built from bare vocabulary files claim an unlimited length, so it is stated here.
        return t5, _ids(self._clip_tokenizer, prompts, CLIP_TOKENS)

    def _encoded(self, prompts: list[str], length: int) -> Iterator[Row]:
        """(tokens, pooled) of each prompt, on the run's device."""
        t5_ids, clip_ids = (ids.to(self._work_device) for ids in self.tokens(prompts, length))
        t5, clip = self._modules
        txt = t5(input_ids=t5_ids).last_hidden_state.to(self._device)
        return copied(txt, clip(input_ids=clip_ids).pooler_output.to(self._device))


def _ids(tokenizer: Any, prompts: list[str], length: int) -> Tensor:
    ids: Tensor = token_ids(tokenizer, prompts, length)["input_ids"]
    return ids
