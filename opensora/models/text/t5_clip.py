"""T5 and CLIP as Open-Sora 2 and Flux use them: T5's last hidden state as txt, CLIP's pooled text as y_vec.

T5 is padded to ``max_tokens`` and its padding is attended, by T5 itself and by the denoiser.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from opensora.models.base import TextFeatures, Width
from opensora.models.text.folder import check_folder, load_tokenizer, stated_width
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
from opensora.models.text.weights import open_clip, open_t5
from opensora.utils.limits import Limits


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

    PLACEMENT: ClassVar[tuple[str, ...]] = PLACEMENT
    LIMITS: ClassVar[Limits] = {"max_tokens": (65536, "T5 attends to all pairs of them"), **PLACEMENT_LIMITS}

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: must be an integer >= 1")
        check_placement(self)


class T5ClipTextEncoder(TransformersEncoder):
    """Prompt -> T5 rows and a CLIP vector. With ``peers``, ``encode`` is collective; prompts may differ."""

    def __init__(
        self,
        cfg: T5ClipConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        peers: Peers | None = None,
        visits: "Callable[[Sequence[nn.Module], torch.device], Visits] | None" = None,
    ) -> None:
        """See ``TransformersEncoder``."""
        from transformers import AutoTokenizer, CLIPTokenizer

        self.cfg = cfg
        check_folder("t5_path", cfg.t5_path)
        check_folder("clip_path", cfg.clip_path)
        self._t5_tokenizer = load_tokenizer("t5_path", cfg.t5_path, AutoTokenizer)
        self._clip_tokenizer = load_tokenizer("clip_path", cfg.clip_path, CLIPTokenizer)
        files = open_t5("t5_path", cfg.t5_path), open_clip("clip_path", cfg.clip_path)
        super().__init__(cfg, files, device, dtype, peers, visits)
        self._t5, self._clip = self._modules
        self.context_dim: int = files[0].module.config.d_model  # type: ignore[union-attr, assignment]
        self.vec_dim: int = files[1].module.config.hidden_size  # type: ignore[union-attr, assignment]

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

    def _encoded(self, prompts: list[str], length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens, pooled) of each prompt, on the run's device."""
        t5_ids, clip_ids = (ids.to(self._work_device) for ids in self.tokens(prompts, length))
        txt = self._t5(input_ids=t5_ids).last_hidden_state.to(self._device)
        vec = self._clip(input_ids=clip_ids).pooler_output.to(self._device)
        # Copies: a view would keep the whole chunk in memory as long as one of its prompts is kept.
        return iter([(txt[row].clone(), vec[row].clone()) for row in range(len(prompts))])


def _ids(tokenizer: Any, prompts: list[str], length: int) -> Tensor:
    ids: Tensor = token_ids(tokenizer, prompts, length)["input_ids"]
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
    check_moves(cfg)
    return Width(t5, f"text.t5_path={cfg.t5_path}"), Width(clip, f"text.clip_path={cfg.clip_path}")


def check_files(cfg: T5ClipConfig) -> None:
    """That the files hold the two models of their config.json, by names and shapes; reads headers only.

    Raises:
        UserError: they do not, with everything that is missing, unexpected or of another shape.
    """
    open_t5("t5_path", cfg.t5_path)
    open_clip("clip_path", cfg.clip_path)
