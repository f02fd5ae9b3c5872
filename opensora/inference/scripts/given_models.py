"""Models as scripts hold them: the two halves of a text encoder, and what did not come from ``prepare_models``.

``prepare_models`` gives T5 and CLIP apart, as the family's scripts have them; our text encoders give both features at
once. A model, an autoencoder or an encoder of a script's own is called by the family's names and nothing else.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from acceleration.distributed.mesh import view
from acceleration.sequence import SequenceParallel
from opensora.assembly.components import Components
from opensora.assembly.token_layout import token_layout
from opensora.models.base import TextEncoder, TextFeatures
from opensora.models.mmdit import MMDiTConfig
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.utils.tasks import TaskRunner, one_by_one

STRIDE = (4, 8, 8)  # of an autoencoder that does not say its own, as the family's


class TextPart:
    """One kind of features of a text encoder: T5's tokens, or CLIP's pooled prompt. Collective where it is sharded."""

    def __init__(self, encoder: TextEncoder, part: Literal["txt", "y_vec"]) -> None:
        self.encoder, self.part = encoder, part

    def __call__(self, text: Sequence[str], added_tokens: int = 0, seq_align: int = 1) -> Tensor:
        """(B, L, context_dim) or (B, vec_dim). ``seq_align``: L and ``added_tokens`` add up to a multiple of it."""
        more = {} if seq_align == 1 else {"added_tokens": added_tokens, "seq_align": seq_align}
        features: Tensor = getattr(self.encoder.encode(list(text), **more), self.part)
        return features


class TextPair:
    """A text encoder of two functions from prompts to features."""

    def __init__(self, t5: Callable[..., Tensor], clip: Callable[..., Tensor]) -> None:
        self._t5, self._clip = t5, clip

    def encode(self, prompts: list[str]) -> TextFeatures:
        return TextFeatures(txt=self._t5(prompts), y_vec=self._clip(prompts))


def text_encoder_of(model_t5: Any, model_clip: Any) -> Any:
    """What encodes prompts once for both kinds of features, where they are of the same encoder."""
    together = isinstance(model_t5, TextPart) and isinstance(model_clip, TextPart)
    if together and model_t5.encoder is model_clip.encoder and (model_t5.part, model_clip.part) == ("txt", "y_vec"):
        return model_t5.encoder
    return TextPair(model_t5, model_clip)


class GivenModel(nn.Module):
    """A script's own model, called with img, img_ids, txt, txt_ids, timesteps, y_vec, cond and guidance.

    As by the family's sampler, ``guidance`` is said in every method.
    """

    def __init__(self, model: Callable[..., Tensor], guidance: float) -> None:
        super().__init__()
        self.model, self.guidance = model, guidance
        found = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.anchor = nn.Parameter(torch.zeros((), dtype=None if found is None else found.dtype), requires_grad=False)

    def forward(self, *, txt_mask: Any, sample_of: Any, context: Any, **given: Any) -> Tensor:
        if given["guidance"] is None:
            given["guidance"] = torch.full((len(given["img"]),), self.guidance, device=given["img"].device)
        return self.model(**given)


class GivenAutoencoder:
    """A script's own autoencoder, which has ``encode`` and ``decode`` of a tensor alone."""

    is_costly = False

    def __init__(self, owner: Any, channels: int) -> None:
        self._owner, self.channels = owner, channels
        self.stride: tuple[int, int, int] = getattr(owner, "stride", STRIDE)
        self.causal: bool = getattr(owner, "causal", True)

    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        latents: Tensor = self._owner.encode(pixels)
        return latents

    def decode(self, latents: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        pixels: Tensor = self._owner.decode(latents)
        return pixels


def components_of(
    model: Any, model_ae: Any, text_encoder: Any, guidance: float, *, patch_size: int, channel: int
) -> Components:
    """Of models that a script made itself; this process works alone with them.

    Args:
        guidance: that a model is told which does not say whether it reads it.
        patch_size, channel: latents along a side of a token, and channels of a latent, where the model does not say.
    """
    cfg = getattr(model, "cfg", None)
    if cfg is None:
        cfg = MMDiTConfig(in_channels=channel * patch_size**2, patch_size=patch_size, guidance_embed=True)
        model = GivenModel(model, guidance)
    if not all(hasattr(model_ae, name) for name in ("stride", "causal", "channels", "is_costly")):
        model_ae = GivenAutoencoder(model_ae, channel)
    return Components(
        model=model,
        cfg=cfg,
        autoencoder=model_ae,
        text_encoder=text_encoder,
        objective=RectifiedFlowConfig(),
        layout=token_layout(cfg, SequenceParallel(view({}))),
        mesh=view({}),
        device=next(model.parameters()).device,
        prompt_suffix=False,
    )
