"""T5 alone, as Open-Sora 1.x and PixArt use it: its last hidden state, and which tokens are real.

Padding is attended neither by T5 nor by the denoiser. There is no pooled vector, and no prompt is an embedding of the
denoiser's own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from opensora.models.base import TextFeatures, Width
from opensora.models.text.caption_cleaning import Cleaning, cleaned
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
from opensora.models.text.weights import open_t5
from opensora.utils.limits import Limits


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """``t5_path``: the folder of T5 v1.1 XXL, which gives 4096 dims, or of any T5."""

    kind: Literal["t5"] = "t5"
    t5_path: str = ""  # folder of transformers, or the file of weights in it
    max_tokens: int = 300  # of a prompt: 120 in Open-Sora 1.0, 200 in 1.1, 300 in 1.2 and 1.3
    clean: Cleaning = "sampling"  # captions: in sampling alone, as Open-Sora 1.1 to 1.3; always, as 1.0; or never
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


class T5TextEncoder(TransformersEncoder):
    """Prompt -> T5 rows and a mask. With ``peers``, ``encode`` is collective; prompts may differ."""

    vec_dim = 0

    def __init__(
        self,
        cfg: T5Config,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        peers: Peers | None = None,
        visits: "Callable[[Sequence[nn.Module], torch.device], Visits] | None" = None,
    ) -> None:
        """See ``TransformersEncoder``."""
        from transformers import AutoTokenizer

        self.cfg = cfg
        check_folder("t5_path", cfg.t5_path)
        self._tokenizer = load_tokenizer("t5_path", cfg.t5_path, AutoTokenizer)
        file = open_t5("t5_path", cfg.t5_path)
        super().__init__(cfg, [file], device, dtype, peers, visits)
        self._t5 = self._modules[0]
        self.context_dim: int = file.module.config.d_model  # type: ignore[union-attr, assignment]

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
        batch = token_ids(self._tokenizer, prompts, self.cfg.max_tokens)
        return batch["input_ids"], batch["attention_mask"].bool()

    def _encoded(self, prompts: list[str], length: int) -> Iterator[Row]:
        ids, mask = (x.to(self._work_device) for x in self.tokens(prompts))
        txt = self._t5(input_ids=ids, attention_mask=mask.long()).last_hidden_state.to(self._device)
        mask = mask.to(self._device)
        return iter([(txt[row].clone(), mask[row].clone()) for row in range(len(prompts))])


def stated_t5_width(cfg: T5Config) -> tuple[Width, Width]:
    """Widths of T5's tokens and of the pooled vector, by the config.json of its folder; None: it does not say.

    Raises:
        UserError: as ``stated_width``; or weights that are to be moved to a GPU, and there is none.
    """
    width = stated_width("t5_path", cfg.t5_path, "d_model")
    check_moves(cfg)
    return Width(width, f"text.t5_path={cfg.t5_path}"), Width(0, "text.kind=t5")


def check_t5_files(cfg: T5Config) -> None:
    """That the files hold the model of their config.json, by names and shapes; reads headers only.

    Raises:
        UserError: they do not, with everything that is missing, unexpected or of another shape.
    """
    open_t5("t5_path", cfg.t5_path)
