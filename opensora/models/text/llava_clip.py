"""LLaVA's Llama and CLIP as HunyuanVideo uses them: hidden states third from the end, and CLIP's pooled text.

Llama reads a prompt within an instruction that asks for what a video shows. The rows of the instruction are cut off; it
was attended to. Rows behind the prompt are padding, which the mask tells.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from opensora.models.base import TextFeatures, Width
from opensora.models.text.folder import check_folder, load_tokenizer, stated_width
from opensora.models.text.prompt_cache import Row
from opensora.models.text.transformers_encoder import (
    CLIP_TOKENS,
    PLACEMENT,
    PLACEMENT_LIMITS,
    Peers,
    TransformersEncoder,
    Visits,
    check_moves,
    check_placement,
    token_ids,
)
from opensora.models.text.weights import open_clip, open_llama
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


@dataclass(frozen=True, kw_only=True)
class LlavaClipConfig:
    """LLaVA-Llama-3-8B gives 4096 dims, CLIP ViT-L/14 768: folders of transformers, or both the folder of a diffusers
    pipeline of HunyuanVideo."""

    kind: Literal["llava_clip"] = "llava_clip"
    llava_path: str = ""  # folder of the LLaVA, of its Llama alone, or of the whole pipeline, or the file of weights
    clip_path: str = ""  # likewise
    max_tokens: int = 256  # of a prompt, behind those of the instruction
    device: Literal["auto", "cpu"] = "auto"  # where prompts are encoded: on the run's device, or on the CPU
    shard: bool = False  # weights are cut over all processes (of a copy of the model's), each block gathered for use
    offload: bool = False  # weights are in CPU memory, and on the GPU only while prompts are encoded
    cache_mib: int = 64  # features of the last prompts that a process keeps

    PLACEMENT: ClassVar[tuple[str, ...]] = PLACEMENT
    LIMITS: ClassVar[Limits] = {"max_tokens": (65536, "Llama attends to all pairs of them"), **PLACEMENT_LIMITS}

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: must be an integer >= 1")
        check_placement(self)


class LlavaClipTextEncoder(TransformersEncoder):
    """Prompt -> Llama rows, a mask and a CLIP vector. With ``peers``, ``encode`` is collective; prompts may differ."""

    def __init__(
        self,
        cfg: LlavaClipConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        peers: Peers | None = None,
        visits: "Callable[[Sequence[nn.Module], torch.device], Visits] | None" = None,
    ) -> None:
        """See ``TransformersEncoder``."""
        from transformers import AutoTokenizer, CLIPTokenizer

        self.cfg = cfg
        check_folder("llava_path", cfg.llava_path)
        check_folder("clip_path", cfg.clip_path)
        self._llama_tokenizer = load_tokenizer("llava_path", cfg.llava_path, AutoTokenizer)
        self._llama_tokenizer.padding_side = "right"  # what is cut off in front is the instruction
        self._clip_tokenizer = load_tokenizer("clip_path", cfg.clip_path, CLIPTokenizer)
        files = open_llama("llava_path", cfg.llava_path), open_clip("clip_path", cfg.clip_path)
        super().__init__(cfg, files, device, dtype, peers, visits)
        self._llama, self._clip = self._modules
        self.context_dim: int = files[0].module.config.hidden_size  # type: ignore[union-attr, assignment]
        self.vec_dim: int = files[1].module.config.hidden_size  # type: ignore[union-attr, assignment]

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
        llama = token_ids(self._llama_tokenizer, told, CROP + self.cfg.max_tokens)
        clip: Tensor = token_ids(self._clip_tokenizer, prompts, CLIP_TOKENS)["input_ids"]
        return llama["input_ids"], llama["attention_mask"].bool(), clip

    def _encoded(self, prompts: list[str], length: int) -> Iterator[Row]:
        ids, mask, clip_ids = (x.to(self._work_device) for x in self.tokens(prompts))
        seen = self._llama(input_ids=ids, attention_mask=_causal(mask, self._dtype), use_cache=False)
        txt = seen.last_hidden_state[:, CROP:].to(self._device)
        mask = mask[:, CROP:].to(self._device)
        vec = self._clip(input_ids=clip_ids).pooler_output.to(self._device)
        return iter([(txt[row].clone(), mask[row].clone(), vec[row].clone()) for row in range(len(prompts))])


def _causal(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, L, L) added to scores: a token sees itself and those before that are real. Stated in full, so that a
    prompt without padding takes the same kernel as one beside it that has some."""
    length = mask.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    seen = mask[:, None, None] & earlier
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, torch.finfo(dtype).min)


def stated_llava_widths(cfg: LlavaClipConfig) -> tuple[Width, Width]:
    """Widths of Llama's tokens and of CLIP's vector, by the config.json of their folders; None: it does not say.

    Raises:
        UserError: as ``stated_width``; or weights that are to be moved to a GPU, and there is none.
    """
    llama = stated_width("llava_path", cfg.llava_path, "hidden_size")
    clip = stated_width("clip_path", cfg.clip_path, "hidden_size")
    check_moves(cfg)
    return Width(llama, f"text.llava_path={cfg.llava_path}"), Width(clip, f"text.clip_path={cfg.clip_path}")


def check_llava_files(cfg: LlavaClipConfig) -> None:
    """That the files hold the two models of their config.json, by names and shapes; reads headers only.

    Raises:
        UserError: they do not, with everything that is missing, unexpected or of another shape.
    """
    open_llama("llava_path", cfg.llava_path)
    open_clip("clip_path", cfg.clip_path)
