"""What the rest of the project expects of a denoiser, an autoencoder and a text encoder.

Structural types: a class fits by having the members, nothing is inherited. ``acceleration`` reads ``block_lists``
and ``attention_cores`` the same way, so the model does not know that it is sharded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.weights.format import WeightFormat
from opensora.utils.tasks import TaskRunner, one_by_one
from opensora.utils.tokens import Grid

AttentionAxis = Literal["joint", "space", "time", "window", "cross"]  # what an attention slot runs along
TokenAxis = Literal["space", "time"]
# How tensor parallelism cuts linear layers: pattern of names -> (kind, parts of (size, unit)), as acceleration reads it
TensorPlan: TypeAlias = dict[str, tuple[str, tuple[tuple[int, int], ...]]]


class AttentionCore(Protocol):
    """The slot every attention layer calls; sequence parallelism puts a wrapper of this signature in it."""

    def __call__(
        self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, *, key_mask: Tensor | None = None, context: Any = None
    ) -> Tensor:
        """Attention over the sequence dim: (B, L, H, Dh) each -> (B, L, H, Dh).

        ``key_mask`` (B, L) is True where a key may be attended. ``context`` is what the caller of the model's
        forward handed in for this micro-batch (who holds which tokens). The plain core reads ``context.segments``,
        if there are any: attention is then within each of them.
        """


class Attend(Protocol):
    """(B, L, H, Dh) queries over (B, S, H, Dh) keys and values that ``key_mask`` (B, S) shows -> (B, L, H, Dh)."""

    def __call__(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, key_mask: Tensor | None) -> Tensor: ...


class Segments(Protocol):
    """Which tokens of the sequences at hand are of one sample, where sequences hold several."""

    def apply(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """What ``attend`` gives for the tokens of each sample by themselves, each in its place."""


class Denoiser(Protocol):
    """A model: tokens with positions in, tokens out; patching, padding and sharding happen outside.

    Its forward keeps the argument names under which it was published; ``Family.arguments`` knows them. All of them
    also take ``context`` and hand it to every attention core and axis switch untouched.
    """

    block_lists: tuple[str | tuple[str, ...], ...]  # see Parallelizable in acceleration/protocol.py, as for the rest
    attention_cores: Mapping[str, AttentionAxis]
    axis_switches: Mapping[str, TokenAxis]
    # A model may also have ``run_stages``, the loop over its blocks: layers/stages.py, ``Denoising.reusable``

    def __call__(self, *, context: Any = None, **arguments: Any) -> Tensor:
        """(B, N, outputs * C) for tokens (B, N, C), or (B, T, S, ...) for (B, T, S, C)."""

    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill ``tensor``, the full value of the parameter called ``name``, in place: the model's one init method."""


class ModelConfig(Protocol):
    """The ``model:`` section; its class belongs to the family that ``kind`` names."""

    @property
    def kind(self) -> str: ...

    def __hash__(self) -> int: ...


def all_pairs(grid: Grid) -> int:
    """Full attention: N^2."""
    return grid.tokens**2


def space_and_time_pairs(grid: Grid) -> int:
    """Attention within frames, and along time at every place: T S^2 + S T^2, of a layer of each kind."""
    return grid.frames * grid.places**2 + grid.places * grid.frames**2


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """What others must know of a denoiser, from its configuration alone."""

    latent_channels: int  # C of what it denoises
    patch: tuple[int, int, int]  # latents per token along (t, h, w)
    width: int  # channels of a token inside
    heads: int
    token_axes: Literal["joint", "factored"] = "joint"  # tokens as one sequence, or as time x space
    text: Literal["joint", "cross", "none"] = "joint"  # text tokens in the sequence, or read by cross-attention
    cuts_text: bool = False  # of text in the sequence the model is given all on every process, and itself takes the
    # tokens that ``context.text`` says, (first, end); None there: all
    text_dim: int = 0  # of a text token
    pooled_dim: int = 0  # of the prompt as one vector; 0: not read
    num_classes: int = 0  # of labels; 0: not read
    outputs: int = 1  # values per latent: 2 with a learned variance
    times: Literal["unit", "steps", "any"] = "any"  # times that it reads: from 0 to 1, or up to 1000 (numbers of steps)
    null_text: Literal["encoded", "learned"] = "encoded"  # no prompt is the prompt "", or an embedding of the model
    image_dim: int = 0  # of a token of the reference picture; 0: not read
    references: Literal["none", "channels", "clip", "in_place"] = "none"  # known frames beside the noise (clip: as one
    # clip with all that is not known grey, coded as a whole), or in its place
    wants: frozenset[str] = frozenset()  # of fps, size, num_frames, guidance
    packs: bool = False  # sequences may hold several samples
    pads: bool = False  # latents that are no whole patches are filled up with zeros at the end of each axis
    cuts_tokens: bool = True  # the tokens of a sample may be cut over processes; else each holds all of them
    reusable: frozenset[str] = frozenset()  # what step caches find: blocks, if it runs them by its ``run_stages``, and
    # modulated, if its first stage states the modulated input of a block (layers/stages.py)
    attention_pairs: Callable[[Grid], int] = all_pairs  # of image tokens that meet in a layer; a function with a name

    def grid(self, latents: tuple[int, int, int]) -> Grid:
        """(T', H', W') of a clip, with this model's patches."""
        return Grid(latents, self.patch)

    def check_frames(self, latent_frames: int) -> None:
        """That latent frames are whole patches.

        Raises:
            ValueError: they are not.
        """
        if latent_frames % self.patch[0] and not self.pads:
            raise ValueError(
                f"makes {latent_frames} latent frames; must make a multiple of {self.patch[0]}, which a token of the "
                "model spans"
            )

    @property
    def reads_beside(self) -> bool:
        """Whether known frames stand beside the noise, in channels of their own."""
        return self.references in ("channels", "clip")

    def three_passes(self, references: bool) -> bool:
        """Whether guidance is by references too, where there are some: where they are a condition of their own, and
        not one of every pass, as a coded clip and frames in the place of noise are."""
        return references and self.references == "channels"

    def pixel_multiple(self, stride: tuple[int, int, int]) -> int:
        """Pixels that the sides of a clip are multiples of, behind an autoencoder of this stride: whole tokens, or
        whole latents for a model that fills up the rest."""
        if self.pads:
            return lcm(stride[1], stride[2])
        return lcm(stride[1] * self.patch[1], stride[2] * self.patch[2])

    def cuts_sizes(self, autoencoder: "Autoencoder | AutoencoderShape") -> bool:
        """Whether pixels that make up no whole latent are cut off, instead of being asked for: by a model that takes
        any number of latents, behind an autoencoder that takes any size."""
        return self.pads and coding_of(autoencoder) is not None

    def text_tokens(self, encoded: int) -> int:
        """Those that the model reads of ``encoded`` tokens of a prompt."""
        return 0 if self.text == "none" else encoded


class Width(NamedTuple):
    """How wide something is that a denoiser reads."""

    size: int | None  # None: not known without loading a model
    key: str  # who says so, for messages, as in "vae.kind=dct"


class Widths(NamedTuple):
    """What autoencoder and text encoder give."""

    latents: Width  # channels
    text: Width  # of a text token
    pooled: Width  # of the prompt as one vector


def check_widths(cfg: Any, **read: Width) -> None:
    """That a config's keys, by name, are as wide as what the model reads there.

    Raises:
        ValueError: a width that does not fit, with the one that does.
    """
    for key, width in read.items():
        if width.size not in (None, getattr(cfg, key)):
            raise ValueError(f"{key}={getattr(cfg, key)}: {width.key} gives {width.size}; set model.{key}={width.size}")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of denoiser: everything that the rest of the project may ask of it. The table is in families.py."""

    config: type  # of the ``model:`` section
    model: type[nn.Module]  # made from a config; a Denoiser
    sizes: Mapping[str, Any]  # configs by name
    describe: Callable[[Any], Denoising]
    check: Callable[[Any, Widths], None]  # that a config fits what it is given; ValueError "key=value: ..., set ..."
    arguments: Callable[[Any, TokenBatch, Tensor, Conditions], dict[str, Any]]
    # (config, tokens, t (B,), conditions) -> the forward's arguments but for context; pure
    weights: WeightFormat  # names and order of weights in files
    lora_targets: tuple[str, ...]  # patterns of the layers that adapters are for, if none are named
    objective: str = "rectified_flow"  # what published weights were trained with, for files that do not say
    per_job: frozenset[str] = frozenset()  # keys that a sampling job may set otherwise than training did
    fitted: frozenset[str] = frozenset()  # keys that weights are made to fit when they are read from a file
    read_hub: Callable[[Mapping[str, Any], Path], Any | None] | None = None
    # (content of the config.json of a folder of the model hub, the folder) -> the config that it describes; None: it is
    # of no such model. ValueError, without the file's name: it describes none that can be built
    hub: Callable[[Any], dict[str, Any]] | None = None  # what the config.json beside exported weights says
    diffusers_hub: Callable[[Any], dict[str, Any]] | None = None  # and what it says under diffusers' names; ValueError:
    # it has no words for this model
    encoders: tuple[str, ...] = ()  # kinds of autoencoders and text encoders of published weights; empty: not said


class Autoencoder(Protocol):
    """Pixels to latents and back. Weights are frozen; both directions run without gradient."""

    channels: int
    stride: tuple[int, int, int]  # pixels per latent along (frames, height, width)
    causal: bool  # True: the first frame is coded on its own, T' = (T-1)/stride_t + 1; False: T' = T/stride_t
    is_costly: bool  # True: to code a piece takes longer than to send it to another process

    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, channels, T', H', W'), scaled to about unit variance.

        The pieces of work, which ``run`` carries out, depend on the shape alone and not on who runs them.
        """

    def decode(self, latents: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        """(B, channels, T', H', W') -> (B, 3, T, H, W), clamped to [-1, 1]; ``run`` as in encode."""


class Draw(Protocol):
    """Standard normal noise for samples that are known to whoever draws."""

    def __call__(self, shape: tuple[int, ...], stage: str = "") -> Tensor:
        """(B, *shape) for samples of this shape; ``stage`` names the second draw of an autoencoder that draws twice."""


@runtime_checkable
class Variational(Protocol):
    """An autoencoder that codes a clip as a normal distribution, of which latents are the mode or a draw."""

    samples: bool  # whether latents are to be draws, where noise is given

    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one, draw: Draw | None = None) -> Tensor:
        """As ``Autoencoder.encode``; without ``draw`` the mode, whatever ``samples`` says."""


class ClipCoding(Protocol):
    """Sizes of clips and their latents, where an autoencoder takes clips of any length or size: a frozen value."""

    def latents(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T', H', W') of a clip.

        Raises:
            ValueError: it cannot be coded.
        """

    def frames(self, latent_frames: int) -> int:
        """The most frames that so many latent ones decode to."""

    def made(self, frames: int) -> int:
        """The least frames, this many or more, to code so that this many come back."""

    def stated(
        self, frames: int | None, height: int | None, width: int | None
    ) -> tuple[int | None, int | None, int | None]:
        """The size of latents that the family's own samplers reckon with; None is passed through."""


def coding_of(autoencoder: "Autoencoder | AutoencoderShape") -> ClipCoding | None:
    """How an autoencoder codes clips of any size; None: by the rule of ``causal``."""
    return getattr(autoencoder, "coding", None)


class AutoencoderShape(NamedTuple):
    """What planning needs to know of an autoencoder, without its weights; same names as on the autoencoder."""

    channels: int
    stride: tuple[int, int, int]
    causal: bool
    time_tiles: tuple[int, int] | None = None
    # (latent frames of a tile, from its first to that of the next): clips longer than one are decoded in tiles, and a
    # tile of one latent frame to a single frame. None: nothing of the length of a clip depends on tiles
    coding: ClipCoding | None = None  # in place of the rule of ``causal``; ``decode`` is then told how many ``frames``


@dataclass(frozen=True, kw_only=True)
class TextFeatures:
    """What the denoiser reads of a prompt."""

    txt: Tensor  # (B, L, context_in_dim), one row per text token
    y_vec: Tensor  # (B, vec_in_dim), the pooled prompt
    mask: Tensor | None = None  # (B, L) bool, True for real tokens; None: padding is attended, as in Flux
    label: Tensor | None = None  # (B,) int64, a class in place of a prompt; L and both widths are then 0


class TextEncoder(Protocol):
    """Prompts to features. Weights are frozen.

    One that is given other prompts in sampling than in training also has ``for_sampling(prompt)``, which makes these.
    """

    context_dim: int
    vec_dim: int

    def encode(self, prompts: list[str]) -> TextFeatures:
        """One row per prompt; ``""`` is the unconditional prompt."""


def decoded_frames(latent_frames: int, autoencoder: Autoencoder | AutoencoderShape) -> int:
    """Frames that so many latent ones decode to."""
    if (coding := coding_of(autoencoder)) is not None:
        return coding.frames(latent_frames)
    if latent_frames == 1:
        return 1
    stride, lead = autoencoder.stride[0], int(autoencoder.causal)
    length, step = getattr(autoencoder, "time_tiles", None) or (latent_frames, latent_frames)
    if latent_frames <= length:
        return (latent_frames - lead) * stride + lead
    tiles = (min(length, latent_frames - start) for start in range(0, latent_frames, step))
    return sum(min(step * stride, stride * tile if tile > 1 else 1) for tile in tiles)


def latent_grid(
    frames: int, height: int, width: int, autoencoder: Autoencoder | AutoencoderShape
) -> tuple[int, int, int]:
    """(T', H', W') of a clip of this size.

    Raises:
        ValueError: a size the autoencoder cannot code, with the nearest ones it can.
    """
    if (coding := coding_of(autoencoder)) is not None:
        return coding.latents(frames, height, width)
    stride_t, stride_h, stride_w = autoencoder.stride
    lead = 1 if autoencoder.causal or frames == 1 else 0
    if (frames - lead) % stride_t:
        below = (frames - lead) // stride_t * stride_t + lead
        raise ValueError(
            f"{frames} frames do not fit the autoencoder: use {max(below, lead or stride_t)} or {below + stride_t}"
        )
    if height % stride_h or width % stride_w:
        raise ValueError(f"{height}x{width} pixels do not fit the autoencoder: use multiples of {stride_h}x{stride_w}")
    return (frames - lead) // stride_t + lead, height // stride_h, width // stride_w


def grid_of(pixels: Tensor, autoencoder: Autoencoder | AutoencoderShape) -> tuple[int, int, int]:
    """``latent_grid`` of clips (B, 3, T, H, W)."""
    frames, height, width = pixels.shape[2:]
    return latent_grid(frames, height, width, autoencoder)


def decode_clip(autoencoder: Autoencoder, latents: Tensor, frames: int, run: TaskRunner = one_by_one) -> Tensor:
    """The pixels of latents that ``frames`` frames were coded as, or would be."""
    if coding_of(autoencoder) is None:
        return autoencoder.decode(latents, run)
    return autoencoder.decode(latents, run, frames=frames)  # type: ignore[call-arg]


@dataclass(frozen=True)
class ClipMeasure:
    """What a clip amounts to for a model behind an autoencoder: for the cost of micro-batches."""

    autoencoder: AutoencoderShape
    denoising: Denoising

    def __call__(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """(image tokens, pairs of them that meet in attention)."""
        grid = self.denoising.grid(latent_grid(frames, height, width, self.autoencoder))
        return grid.tokens, self.denoising.attention_pairs(grid)
