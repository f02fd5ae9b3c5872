"""A text encoder that needs no download: a T5 encoder on bytes whose weights are drawn from a seed.

The weights are never trained, so what matters is that a denoiser can read the features. Heads of a randomly drawn
transformer average over the whole prompt; here each head's relative position bias makes it look at one neighbouring
byte instead, and the layers become random nonlinear features of byte n-grams. The features of a word's bytes are
averaged into one row, so that a caption costs a dozen tokens, not sixty.
"""

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from opensora.models.base import TextFeatures
from opensora.utils.limits import Limits
from opensora.utils.rng import torch_generator

if TYPE_CHECKING:
    from transformers import T5EncoderModel

HEAD_DIM = 32
ATTEND_NEIGHBOUR = 12.0  # attention logit of the one offset a head looks at; all others are 0
CACHED_PROMPTS = 4096
BYTE_LIMIT = 1024  # of a prompt; the rest is not read


@dataclass(frozen=True, kw_only=True)
class ByteTextConfig:
    """The seeded byte encoder: ``context_in_dim`` and ``vec_in_dim`` of the denoiser must equal ``dim``."""

    kind: Literal["bytes"] = "bytes"
    dim: int = 256
    depth: int = 2
    max_words: int = 32  # rows of txt; later words are only seen by y_vec
    mask: bool = False  # False: padding rows (zeros) are attended, as in Flux
    seed: int = 0

    LIMITS: ClassVar[Limits] = {
        "dim": (65536, "the denoiser reads no wider text"),
        "depth": (64, "the weights are never trained"),
        "max_words": (BYTE_LIMIT, "no more bytes of a prompt are read"),
    }

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be an integer from 0 to 2^63-1")
        if self.dim < HEAD_DIM or self.dim % HEAD_DIM:
            raise ValueError(f"dim={self.dim}: must be a multiple of {HEAD_DIM}")
        for name in ("depth", "max_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be an integer >= 1")


class ByteTextEncoder:
    """Prompt -> one row per word (and one for the end), and their normalised mean.

    Each prompt is encoded alone and at its own length, so its features do not depend on the batch it is in.
    """

    def __init__(
        self, cfg: ByteTextConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        from transformers import ByT5Tokenizer

        self.cfg = cfg
        self.context_dim = self.vec_dim = cfg.dim
        self._dtype = dtype
        self._tokenizer = ByT5Tokenizer()
        self._model = _seeded_t5(cfg).to(device)
        self._device = device
        self._cache: OrderedDict[str, tuple[Tensor, Tensor, int]] = OrderedDict()
        self._common = torch.zeros(cfg.dim, device=device)
        self._common = torch.stack([self._pool(self._word_rows(text)) for text in COMMON_TEXTS]).mean(dim=0)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextFeatures:
        """txt (B, max_words, dim), y_vec (B, dim), each about unit variance over its last dim."""
        rows = [self._cached(prompt) for prompt in prompts]
        mask = None
        if self.cfg.mask:
            lengths = torch.tensor([length for _, _, length in rows], device=self._device)
            mask = torch.arange(self.cfg.max_words, device=self._device) < lengths[:, None]
        return TextFeatures(
            txt=torch.stack([txt for txt, _, _ in rows]), y_vec=torch.stack([vec for _, vec, _ in rows]), mask=mask
        )

    def _cached(self, prompt: str) -> tuple[Tensor, Tensor, int]:
        if prompt in self._cache:
            self._cache.move_to_end(prompt)
            return self._cache[prompt]
        words = self._word_rows(prompt)
        vec = torch.nn.functional.layer_norm(self._pool(words) - self._common, (self.cfg.dim,))
        length = min(len(words), self.cfg.max_words)
        txt = words.new_zeros(self.cfg.max_words, self.cfg.dim)
        txt[:length] = torch.nn.functional.layer_norm(words[:length] - self._common, (self.cfg.dim,))
        self._cache[prompt] = (txt.to(self._dtype), vec.to(self._dtype), length)
        if len(self._cache) > CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return self._cache[prompt]

    @torch.no_grad()
    def _word_rows(self, prompt: str) -> Tensor:
        """(words + 1, dim) fp32: the mean feature over each word's bytes, and the end token's."""
        text = " ".join(prompt.split())
        raw = text.encode()[:BYTE_LIMIT]
        ids = self._tokenizer(raw.decode(errors="ignore"), return_tensors="pt")["input_ids"].to(self._device)
        hidden = self._model(input_ids=ids).last_hidden_state[0]  # (bytes + 1, dim)
        word_of_byte = torch.zeros(len(hidden), dtype=torch.long)
        spans = [match.span() for match in re.finditer(rb"[^ ]+", raw)]
        for index, (start, end) in enumerate(spans):
            word_of_byte[start:end] = index + 1
        word_of_byte[-1] = len(spans) + 1  # 0: the spaces, left out
        sums = hidden.new_zeros(len(spans) + 2, self.cfg.dim).index_add_(0, word_of_byte.to(hidden.device), hidden)
        counts = torch.bincount(word_of_byte, minlength=len(spans) + 2).to(hidden)
        return (sums / counts.clamp_min(1)[:, None])[1:]

    def _pool(self, words: Tensor) -> Tensor:
        """The mean over words: (words, dim) -> (dim,)."""
        return words.mean(dim=0)


# What all prompts have in common is taken out, so that the rest, which tells them apart, has unit variance.
COMMON_TEXTS = (
    "a person walks along the street in the rain",
    "two small dogs play on a beach at sunset",
    "the camera slowly turns around an old wooden house",
    "a close view of hands that cut fresh vegetables",
    "large waves break against dark rocks below the cliff",
    "a yellow car drives past tall buildings at night",
    "clouds move quickly over green hills and a lake",
    "an empty white room with one round window",
)


def _seeded_t5(cfg: ByteTextConfig) -> "T5EncoderModel":
    """The encoder with weights drawn per parameter name; the process's random state is left as it was."""
    from transformers import T5Config, T5EncoderModel

    heads = cfg.dim // HEAD_DIM
    architecture = T5Config(
        vocab_size=384,
        d_model=cfg.dim,
        d_kv=HEAD_DIM,
        num_heads=heads,
        d_ff=4 * cfg.dim,
        num_layers=cfg.depth,
        feed_forward_proj="relu",
        dropout_rate=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        model = T5EncoderModel(architecture)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch_generator("byte text encoder", cfg.seed, name)
            if "layer_norm" in name:
                parameter.fill_(1.0)
            elif "relative_attention_bias" in name:
                parameter.copy_(_neighbour_bias(parameter.shape[0], heads))
            else:
                fan_in = 1 if "embed" in name or "shared" in name else parameter.shape[-1]
                # Queries stay small: which byte a head looks at is decided by the bias alone.
                gain = 0.1 if ".q." in name else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain / fan_in**0.5)
    return model.eval().requires_grad_(False)


def _neighbour_bias(buckets: int, heads: int) -> Tensor:
    """(buckets, heads): head h looks at the offset 0, -1, +1, -2, +2, ... of its number.

    T5 buckets (bidirectional): 0 to buckets/4 - 1 are offsets 0, -1, -2, ... exactly; from buckets/2 on +0, +1, ...
    """
    bias = torch.zeros(buckets, heads)
    offsets = buckets // 4
    for head in range(heads):
        distance = (head + 1) // 2 % offsets
        ahead = head % 2 == 0 and distance > 0
        bias[distance + (buckets // 2 if ahead else 0), head] = ATTEND_NEIGHBOUR
    return bias
