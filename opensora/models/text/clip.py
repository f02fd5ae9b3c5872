"""CLIP's pooled text as one token, as DiT and Latte of Open-Sora 1.0 read it; no mask, and no prompt is an embedding of
the denoiser's own."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from opensora.models.base import TextFeatures, Width
from opensora.models.text.caption_cleaning import Cleaning, cleaned
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
from opensora.models.text.weights import open_clip
from opensora.utils.limits import Limits


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """``clip_path``: the folder of openai/clip-vit-base-patch32, which gives 512 dims, or of any CLIP."""

    kind: Literal["clip"] = "clip"
    clip_path: str = ""  # folder of transformers, or the file of weights in it
    clean: Cleaning = "never"  # captions: never, as Open-Sora 1.0; in sampling alone; or always
    device: Literal["auto", "cpu"] = "auto"  # where prompts are encoded: on the run's device, or on the CPU
    shard: bool = False  # weights are cut over all processes (of a copy of the model's), each block gathered for use
    offload: bool = False  # weights are in CPU memory, and on the GPU only while prompts are encoded
    cache_mib: int = 64  # features of the last prompts that a process keeps

    PLACEMENT: ClassVar[tuple[str, ...]] = PLACEMENT
    LIMITS: ClassVar[Limits] = PLACEMENT_LIMITS

    def __post_init__(self) -> None:
        check_placement(self)


class ClipTextEncoder(TransformersEncoder):
    """Prompt -> a row, which is also its vector. With ``peers``, ``encode`` is collective; prompts may differ."""

    def __init__(
        self,
        cfg: ClipConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        peers: Peers | None = None,
        visits: "Callable[[Sequence[nn.Module], torch.device], Visits] | None" = None,
    ) -> None:
        """See ``TransformersEncoder``."""
        from transformers import CLIPTokenizer

        self.cfg = cfg
        check_folder("clip_path", cfg.clip_path)
        self._tokenizer = load_tokenizer("clip_path", cfg.clip_path, CLIPTokenizer)
        file = open_clip("clip_path", cfg.clip_path)
        super().__init__(cfg, [file], device, dtype, peers, visits)
        self._clip = self._modules[0]
        self.context_dim = self.vec_dim = int(file.module.config.hidden_size)  # type: ignore[union-attr, arg-type]

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
        pooled = self._clip(input_ids=ids).pooler_output.to(self._device)
        return iter([(pooled[row].clone(),) for row in range(len(prompts))])


def stated_clip_width(cfg: ClipConfig) -> tuple[Width, Width]:
    """Width of the token and of the vector, by the config.json of the folder; None: it does not say.

    Raises:
        UserError: as ``stated_width``; or weights that are to be moved to a GPU, and there is none.
    """
    width = Width(stated_width("clip_path", cfg.clip_path, "hidden_size"), f"text.clip_path={cfg.clip_path}")
    check_moves(cfg)
    return width, width


def check_clip_files(cfg: ClipConfig) -> None:
    """That the files hold the model of their config.json, by names and shapes; reads headers only.

    Raises:
        UserError: they do not, with everything that is missing, unexpected or of another shape.
    """
    open_clip("clip_path", cfg.clip_path)
