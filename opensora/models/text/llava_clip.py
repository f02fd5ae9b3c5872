"""LLaVA's Llama and CLIP as HunyuanVideo uses them: hidden states third from the end, and CLIP's pooled text.

Llama reads a prompt within an instruction that asks for what a video shows. The rows of the instruction are cut off; it
was attended to. Rows behind the prompt are padding, which the mask tells.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from opensora.models.base import TextFeatures
from opensora.models.text.folder import check_folder, load_tokenizer
from opensora.models.text.placement import TokensConfig, limits_of, own_keys_first
from opensora.models.text.prompt_cache import Row
from opensora.models.text.transformers_encoder import CLIP_TOKENS, TransformersEncoder, copied, masked_ids, token_ids
from opensora.models.text.weights import EncoderFile, open_clip, open_llama
from opensora.utils.limits import Limits

TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
CROP = 95  # tokens before the prompt, as LLaVA-Llama-3's tokenizer cuts the template


@own_keys_first
@dataclass(frozen=True, kw_only=True)
class LlavaClipConfig(TokensConfig):
    """LLaVA-Llama-3-8B gives 4096 dims, CLIP ViT-L/14 768: folders of transformers, or both the folder of a diffusers
    pipeline of HunyuanVideo."""

    kind: Literal["llava_clip"] = "llava_clip"
    llava_path: str = ""  # folder of the LLaVA, of its Llama alone, or of the whole pipeline, or the file of weights
    clip_path: str = ""  # likewise
    max_tokens: int = 256  # of a prompt, behind those of the instruction

    LIMITS: ClassVar[Limits] = limits_of("Llama")


class LlavaClipTextEncoder(TransformersEncoder):
    """Prompt -> Llama rows, a mask and a CLIP vector. With ``peers``, ``encode`` is collective; prompts may differ."""

    cfg: LlavaClipConfig

    def _opened(self) -> Sequence[EncoderFile]:
        from transformers import AutoTokenizer, CLIPTokenizer

        llava, clip = self.cfg.llava_path, self.cfg.clip_path
        check_folder("llava_path", llava)
        check_folder("clip_path", clip)
        self._llama_tokenizer = load_tokenizer("llava_path", llava, AutoTokenizer)
        self._llama_tokenizer.padding_side = "right"  # what is cut off in front is the instruction
        self._clip_tokenizer = load_tokenizer("clip_path", clip, CLIPTokenizer)
        files = open_llama("llava_path", llava), open_clip("clip_path", clip)
        self.context_dim = files[0].module.config.hidden_size  # type: ignore[union-attr, assignment]
        self.vec_dim = files[1].module.config.hidden_size  # type: ignore[union-attr, assignment]
        return files

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextFeatures:
        """txt (B, max_tokens, context_dim), y_vec (B, vec_dim), mask; longer prompts are cut, equal ones encoded
        once."""
        rows = self._rows(prompts, self.cfg.max_tokens)
        txt, mask, vec = (torch.stack(column) for column in zip(*rows, strict=True))
        return TextFeatures(txt=txt, y_vec=vec, mask=mask)

    def tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids for Llama, with those of the instruction, and which of them are real, (B, 95 + max_tokens) each;
        token ids for CLIP, which reads the prompt alone, (B, 77)."""
        told = [TEMPLATE.format(prompt) for prompt in prompts]
        clip: Tensor = token_ids(self._clip_tokenizer, prompts, CLIP_TOKENS)["input_ids"]
        return *masked_ids(self._llama_tokenizer, told, CROP + self.cfg.max_tokens), clip

    def _encoded(self, prompts: list[str], length: int) -> Iterator[Row]:
        ids, mask, clip_ids = (x.to(self._work_device) for x in self.tokens(prompts))
        llama, clip = self._modules
        seen = llama(input_ids=ids, attention_mask=_causal(mask, self._dtype), use_cache=False)
        txt = seen.last_hidden_state[:, CROP:].to(self._device)
        mask = mask[:, CROP:].to(self._device)
        return copied(txt, mask, clip(input_ids=clip_ids).pooler_output.to(self._device))


def _causal(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, L, L) added to scores: a token sees itself and those before that are real. Stated in full, so that a
    prompt without padding takes the same kernel as one beside it that has some."""
    length = mask.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    seen = mask[:, None, None] & earlier
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, torch.finfo(dtype).min)
