"""Text encoders by kind: the table that everything else asks. A new one is a file, and a line of it."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from opensora.models.base import ModelConfig, Width, Widths
from opensora.models.families import family_of
from opensora.models.text.bytes import ByteTextConfig, ByteTextEncoder
from opensora.models.text.classes import ClassesConfig, ClassLabels, label_of
from opensora.models.text.clip import ClipConfig, ClipTextEncoder
from opensora.models.text.folder import width_at
from opensora.models.text.llava_clip import CROP, LlavaClipConfig, LlavaClipTextEncoder
from opensora.models.text.placement import check_moves
from opensora.models.text.t5 import T5Config, T5TextEncoder
from opensora.models.text.t5_clip import T5ClipConfig, T5ClipTextEncoder
from opensora.models.text.transformers_encoder import Peers, Visits
from opensora.models.text.umt5 import UMT5Config, UMT5TextEncoder
from opensora.models.text.weights import EncoderFile, open_clip, open_llama, open_t5, open_umt5
from opensora.utils.errors import UserError

if TYPE_CHECKING:
    from opensora.models.base import TextEncoder

TextConfig: TypeAlias = (
    ByteTextConfig | T5ClipConfig | T5Config | UMT5Config | LlavaClipConfig | ClipConfig | ClassesConfig
)
Device: TypeAlias = torch.device | str


class Blocks(NamedTuple):
    """The published text model that decides on what prompts take while they are encoded; numbers of one block."""

    width: int
    hidden: int
    heads: int
    parameters: int
    outside: int  # parameters outside of blocks: the embedding
    read: int = 0  # tokens before those of the prompt


class TextEncoderKind(NamedTuple):
    """What can be asked of a kind of text encoder."""

    config: type
    build: Callable[..., "TextEncoder"]  # (configuration, device, type of the features)
    tokens: Callable[[Any], int]  # of a prompt, padding included
    has_mask: Callable[[Any], bool]  # its features say which tokens are padding
    widths: Callable[[Any], tuple[int | None, int | None]]  # of text tokens and of the pooled prompt, by the
    # configuration alone; None: not said there
    stated: Callable[[Any], tuple[Width, Width]] | None = None  # by config.json of its folders, or UserError; None in
    # a width: not said there
    parameters: int = 0  # of the published one, for forecasts
    blocks: Blocks | None = None  # of the largest model; None: a CLIP at most
    files: Mapping[str, Callable[[str, str], EncoderFile]] = {}  # key of a path -> what opens it, by headers
    moves: bool = False  # ``build`` also takes the processes to cut its weights over, and what moves them out
    classes: Callable[[Any], int] | None = None  # of labels, which it gives in place of features

    def check(self, cfg: Any) -> None:
        """That the files hold the models of their config.json, by names and shapes; reads headers only.

        Raises:
            UserError: they do not, with everything that is missing, unexpected or of another shape.
        """
        for key, opened in self.files.items():
            opened(key, getattr(cfg, key))


T5_BLOCKS = Blocks(width=4096, hidden=10240, heads=64, parameters=192_946_176, outside=131_600_384)
UMT5_BLOCKS = T5_BLOCKS._replace(parameters=192_948_224, outside=1_050_152_960)
LLAMA_BLOCKS = Blocks(width=4096, hidden=14336, heads=32, parameters=218_112_000, outside=525_598_720, read=CROP)
TEXT_ENCODERS: dict[str, TextEncoderKind] = {
    "bytes": TextEncoderKind(
        ByteTextConfig,
        ByteTextEncoder,
        tokens=lambda cfg: cfg.max_words,
        has_mask=lambda cfg: cfg.mask,
        widths=lambda cfg: (cfg.dim, cfg.dim),
    ),
    "t5_clip": TextEncoderKind(
        T5ClipConfig,
        T5ClipTextEncoder,
        tokens=lambda cfg: cfg.max_tokens,
        has_mask=lambda cfg: False,
        widths=lambda cfg: (None, None),
        stated=lambda cfg: (width_at(cfg, "t5_path", "d_model"), width_at(cfg, "clip_path", "hidden_size")),
        parameters=4_885_000_000,
        blocks=T5_BLOCKS,
        files={"t5_path": open_t5, "clip_path": open_clip},
        moves=True,
    ),
    "t5": TextEncoderKind(
        T5Config,
        T5TextEncoder,
        tokens=lambda cfg: cfg.max_tokens,
        has_mask=lambda cfg: True,
        widths=lambda cfg: (None, 0),
        stated=lambda cfg: (width_at(cfg, "t5_path", "d_model"), Width(0, "text.kind=t5")),
        parameters=4_762_000_000,
        blocks=T5_BLOCKS,
        files={"t5_path": open_t5},
        moves=True,
    ),
    "umt5": TextEncoderKind(
        UMT5Config,
        UMT5TextEncoder,
        tokens=lambda cfg: cfg.max_tokens,
        has_mask=lambda cfg: False,
        widths=lambda cfg: (None, 0),
        stated=lambda cfg: (width_at(cfg, "umt5_path", "d_model"), Width(0, "text.kind=umt5")),
        parameters=5_681_000_000,
        blocks=UMT5_BLOCKS,
        files={"umt5_path": open_umt5},
        moves=True,
    ),
    "llava_clip": TextEncoderKind(
        LlavaClipConfig,
        LlavaClipTextEncoder,
        tokens=lambda cfg: cfg.max_tokens,
        has_mask=lambda cfg: True,
        widths=lambda cfg: (None, None),
        stated=lambda cfg: (width_at(cfg, "llava_path", "hidden_size"), width_at(cfg, "clip_path", "hidden_size")),
        parameters=7_192_000_000,
        blocks=LLAMA_BLOCKS,
        files={"llava_path": open_llama, "clip_path": open_clip},
        moves=True,
    ),
    "clip": TextEncoderKind(
        ClipConfig,
        ClipTextEncoder,
        tokens=lambda cfg: 1,
        has_mask=lambda cfg: False,
        widths=lambda cfg: (None, None),
        stated=lambda cfg: (width_at(cfg, "clip_path", "hidden_size"),) * 2,
        parameters=63_000_000,
        files={"clip_path": open_clip},
        moves=True,
    ),
    "classes": TextEncoderKind(
        ClassesConfig,
        ClassLabels,
        tokens=lambda cfg: 0,
        has_mask=lambda cfg: False,
        widths=lambda cfg: (0, 0),
        classes=lambda cfg: cfg.num_classes,
    ),
}
TEXT_ENCODER_CONFIGS: dict[str, type] = {kind: entry.config for kind, entry in TEXT_ENCODERS.items()}


def text_tokens(cfg: TextConfig) -> int:
    """Tokens of a prompt, padding included."""
    return TEXT_ENCODERS[cfg.kind].tokens(cfg)


def has_mask(cfg: TextConfig) -> bool:
    """Whether features say which of their tokens are padding."""
    return TEXT_ENCODERS[cfg.kind].has_mask(cfg)


def text_widths(cfg: TextConfig) -> tuple[int | None, int | None]:
    """Widths of the features, as far as the configuration says them."""
    return TEXT_ENCODERS[cfg.kind].widths(cfg)


def num_classes(cfg: TextConfig) -> int:
    """Of labels that are given in place of features; 0: features are."""
    classes = TEXT_ENCODERS[cfg.kind].classes
    return 0 if classes is None else classes(cfg)


def check_prompts(cfg: TextConfig, prompts: Iterable[str]) -> None:
    """That prompts are such as the encoder reads.

    Raises:
        UserError: the first that is not.
    """
    if classes := num_classes(cfg):
        for prompt in prompts:
            label_of(prompt, classes)


def check_text_encoder(cfg: TextConfig, latents: Width, model: ModelConfig) -> None:
    """That the files of ``cfg`` are there, fit, and give what the denoiser reads, before either is made; loads nothing.

    Raises:
        UserError: they are not, or give other widths; with the key.
    """
    kind = TEXT_ENCODERS[cfg.kind]
    if kind.stated is None:
        return  # its widths are in the configuration: opensora.config.run.check_fit
    given = Widths(latents, *kind.stated(cfg))
    check_moves(cfg)  # type: ignore[arg-type]
    try:
        family_of(model).check(model, given)
    except ValueError as error:
        raise UserError(f"model.{error}") from None
    kind.check(cfg)


def build_text_encoder(
    cfg: TextConfig,
    device: Device,
    dtype: torch.dtype,
    peers: Peers | None = None,
    visits: Callable[..., Visits] | None = None,
) -> "TextEncoder":
    """The frozen encoder of ``cfg`` on ``device``; its features have ``dtype``.

    Args:
        peers: the processes to cut its weights over, for a kind that can be cut; None: this one works by itself.
        visits: what lets weights be on the device only while they are used, for a kind that can be moved.
    """
    kind = TEXT_ENCODERS[cfg.kind]
    return kind.build(cfg, device, dtype, peers, visits) if kind.moves else kind.build(cfg, device, dtype)
