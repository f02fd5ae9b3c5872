"""The sampling core: options, start noise, schedule, and the loop from noise to latents.

Works on tokens that may be one process's share; what surrounds it (text encoding, references, distribution, decoding,
files) is in ``opensora.inference``. Its ``prepare``, ``prepare_models``, ``prepare_api`` and ``process_and_save`` can
be imported from here as well.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from opensora.utils.errors import UserError
from opensora.utils.limits import Limits, check_limits
from opensora.utils.rng import torch_generator
from opensora.utils.sizes import area_of, frame_size, ratio_of
from opensora.utils.tokens import pack, unpack
from opensora.utils.files.untrusted import short
from opensora.utils.tasks import RunAll, Work, one_by_one

__all__ = [
    "SamplingOption",
    "sanitize_sampling_option",
    "image_size",
    "get_noise",
    "get_schedule",
    "time_shift",
    "flow_shift",
    "pack",
    "unpack",
    "TextInputs",
    "I2VDenoiser",
    "DistilledDenoiser",
    "DENOISERS",
    "passes_per_step",
]

T = TypeVar("T")
Progress = Callable[[int, int], None]  # (steps done, steps in all)

MAX_SIDE = 16384  # pixels; H.264 and players take no more
MAX_SEED = 2**63 - 1
MIN_FPS, MAX_FPS = 0.1, 1000.0
OSCILLATION_START = 10  # oscillating guidance is on in all steps before this one
_INFERENCE = "opensora.inference.pipeline"
_FROM_INFERENCE = ("prepare", "prepare_models", "prepare_api", "process_and_save")


def __getattr__(name: str) -> Any:
    """The public names of inference, looked up by string when asked for: utils must not import upwards."""
    if name in _FROM_INFERENCE:
        return getattr(import_module(_INFERENCE), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, kw_only=True)
class SamplingOption:
    """What to sample and how; ``sanitize_sampling_option`` fills in width and height."""

    width: int | None = None  # pixels; width and height win over resolution and aspect_ratio
    height: int | None = None
    resolution: str = "256px"  # area: "256px" is 256^2, "256p" is 256^2 * 16/9
    aspect_ratio: str = "16:9"  # width:height
    num_frames: int = 129
    num_steps: int = 50
    guidance: float = 7.5  # towards the prompt; 1: off
    guidance_img: float = 3.0  # towards the references; 1: off
    text_osci: bool = False  # guidance only in the first 10 and every even step
    image_osci: bool = False  # the same for guidance_img
    scale_temporal_osci: bool = False  # guidance_img grows along the clip and fades over the steps
    seed: int = 42
    shift: bool = True  # spend more steps on high noise, by flow_shift
    flow_shift: float | None = None  # alpha of the schedule; null: from tokens per frame and latent frames
    method: Literal["i2v", "distill"] = "i2v"  # guidance by several passes, or read by the model in one
    fps: float = 24.0  # frames per second, of the video and in the prompt
    motion_score: int | None = 4  # null: not said in the prompt

    LIMITS: ClassVar[Limits] = {
        **dict.fromkeys(("width", "height"), (MAX_SIDE, "H.264 and players take no more pixels a side")),
        "num_frames": (100_000, "more than an hour at 24 frames a second"),
        "num_steps": (10_000, "more change nothing that fp32 could show"),
        **dict.fromkeys(("guidance", "guidance_img"), (1000.0, "the velocity would overflow")),
        "flow_shift": (1000.0, "all times would be noise"),
        "seed": (MAX_SEED, "it has 63 bits"),
        "fps": (MAX_FPS, "no player shows more"),
        "motion_score": (1000, "training's scores are below"),
    }

    def __post_init__(self) -> None:
        check_limits(self)
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: allowed are integers >= 1, or null")
        if (self.width is None) != (self.height is None):
            given, other = ("width", "height") if self.height is None else ("height", "width")
            raise ValueError(f"{given}={getattr(self, given)} without {other}: give both, or neither with a resolution")
        for name in ("num_frames", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: allowed are integers >= 1")
        for name in ("guidance", "guidance_img"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: allowed are numbers >= 0")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: allowed are integers from 0 to 2^63-1; for another clip take another")
        if not self.fps >= MIN_FPS:
            raise ValueError(f"fps={self.fps}: allowed are numbers from {MIN_FPS} to {MAX_FPS:g}")
        if self.motion_score is not None and self.motion_score < 0:
            raise ValueError(f"motion_score={self.motion_score}: allowed are integers >= 0, or null")
        if self.flow_shift is not None and self.flow_shift <= 0:
            raise ValueError(f"flow_shift={self.flow_shift}: allowed are numbers > 0, or null for the formula")
        if self.method not in DENOISERS:
            raise ValueError(f"method={self.method}: allowed are {', '.join(DENOISERS)}")
        _named("resolution", self.resolution, area_of)
        _named("aspect_ratio", self.aspect_ratio, ratio_of)
        if self.width is None and max(image_size(self.resolution, self.aspect_ratio)) > MAX_SIDE:
            raise ValueError(
                f"resolution={self.resolution}: with aspect_ratio={self.aspect_ratio} a side has more than {MAX_SIDE} "
                "pixels, which H.264 and players do not take"
            )


def image_size(resolution: str, aspect_ratio: str, multiple: int = 16) -> tuple[int, int]:
    """(height, width) of about this area and ratio, both multiples of ``multiple``.

    Raises:
        ValueError: a resolution or ratio that cannot be read.
    """
    return frame_size(_named("resolution", resolution, area_of), aspect_ratio, multiple)


def _named(name: str, value: str, read: Callable[[str], T]) -> T:
    """``read(value)``, with the field's name in its error."""
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"{name}={short(value, 40)}: {error}") from None


def sanitize_sampling_option(
    option: SamplingOption, *, multiple: int = 16, frame_stride: int = 4, causal: bool = True
) -> SamplingOption:
    """The option with width and height set, rounded up to multiples.

    Args:
        multiple: pixels per token side, the autoencoder's stride times the patch.
        frame_stride: frames per latent frame.
        causal: the autoencoder codes the first frame on its own, so clips have k * frame_stride + 1 frames.

    Raises:
        UserError: a number of frames the autoencoder cannot code (a single frame always can be).
    """
    if option.width is not None and option.height is not None:
        height, width = (math.ceil(side / multiple) * multiple for side in (option.height, option.width))
    else:
        height, width = image_size(option.resolution, option.aspect_ratio, multiple)
    lead = 1 if causal else 0
    if option.num_frames > 1 and (option.num_frames - lead) % frame_stride:
        below = (option.num_frames - lead) // frame_stride * frame_stride + lead
        raise UserError(
            f"num_frames={option.num_frames}: allowed are {frame_stride}k{'+1' if causal else ''} and 1, "
            f"as the autoencoder codes {frame_stride} frames at a time: use {max(below, 1)} or {below + frame_stride}"
        )
    return replace(option, width=width, height=height)


def latent_frames(num_frames: int, frame_stride: int = 4, causal: bool = True) -> int:
    """T' of a clip: 1 for a still, else (F-1)/stride + 1 for a causal autoencoder and F/stride for another."""
    if num_frames == 1:
        return 1
    return (num_frames - 1) // frame_stride + 1 if causal else num_frames // frame_stride


def get_noise(
    num_samples: int,
    height: int,
    width: int,
    num_frames: int,
    *,
    seed: int,
    channels: int = 16,
    stride: tuple[int, int, int] = (4, 8, 8),
    causal: bool = True,
    patch_size: int = 2,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Start latents (B, channels, T', H', W'), standard normal, from one generator keyed by the seed.

    Drawn on the CPU in fp32 and then moved, so that devices agree. H' and W' are rounded up to whole patches.
    """
    frames = latent_frames(num_frames, stride[0], causal)
    rows = patch_size * math.ceil(height / (stride[1] * patch_size))
    columns = patch_size * math.ceil(width / (stride[2] * patch_size))
    shape = (num_samples, channels, frames, rows, columns)
    return torch.randn(shape, generator=torch_generator(seed, "sampling noise")).to(device, dtype)


def flow_shift(tokens_per_frame: int, latent_frames: int) -> float:
    """alpha of ``time_shift``: 1 at 256 tokens to 3 at 4096, linear and beyond, times sqrt(T')."""
    return (1 + 2 * (tokens_per_frame - 256) / (4096 - 256)) * math.sqrt(latent_frames)


def time_shift(alpha: float, t: Tensor) -> Tensor:
    """t in [0, 1] -> alpha t / (1 + (alpha - 1) t): alpha > 1 moves times towards 1, the noise."""
    return alpha * t / (1 + (alpha - 1) * t)


def get_schedule(
    num_steps: int, tokens_per_frame: int, latent_frames: int, *, alpha: float | None = None, shift: bool = True
) -> list[float]:
    """num_steps + 1 times from 1 (noise) to 0 (data).

    Args:
        alpha: the shift; None: ``flow_shift(tokens_per_frame, latent_frames)``.
        shift: False for evenly spaced times.
    """
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    if shift:
        times = time_shift(flow_shift(tokens_per_frame, latent_frames) if alpha is None else alpha, times)
    return times.tolist()


@dataclass(frozen=True, kw_only=True)
class TextInputs:
    """What one pass of the model reads of a prompt, this process's share of it."""

    txt: Tensor  # (B, L, context_in_dim)
    txt_ids: Tensor  # (B, L, 3)
    y_vec: Tensor  # (B, vec_in_dim)
    txt_mask: Tensor | None = None  # (B, L)
    context: Any = None  # for the attention cores: who holds which tokens


class SampleDenoiser(Protocol):
    """From noise to latents; the choices are in ``DENOISERS``."""

    def denoise(
        self,
        model: Callable[..., Tensor],
        img: Tensor,
        *,
        timesteps: list[float],
        option: SamplingOption,
        img_ids: Tensor,
        prompt: TextInputs,
        negative: TextInputs | None = None,
        cond: Tensor | None = None,
        references: bool = False,
        latent_frames: int = 1,
        progress: Progress | None = None,
        run: RunAll = one_by_one,
    ) -> Tensor:
        """Tokens at t=0 in fp32 (fp64 for fp64 img), (B, N, C) as img.

        Args:
            model: a denoiser, see opensora/models/base.py.
            img: (B, N, C) noise, packed; N may be this process's share.
            timesteps: falling times, see get_schedule.
            option: guidance, and how it varies.
            img_ids: (B, N, 3), the (t, h, w) of img.
            prompt, negative: the prompt and what to move away from ("" if nothing).
            cond: (B, N, C') for models that read references, zeros where nothing is known; None for others.
            references: whether cond knows anything, on any process: all must say the same.
            latent_frames: T' of the whole clip.
            progress: called after every step.
            run: evaluates the model for the passes of a step, which do not depend on each other.
        """


class I2VDenoiser:
    """Classifier-free guidance by several passes, for prompts and for references.

    With c the pass that knows prompt and references, u the one that knows references, u2 the one that knows nothing:
    v = u2 + g_img (u - u2) + g_txt (c - u). Without references u = u2 and two passes do; with a guidance of 1 one.
    """

    @torch.no_grad()
    def denoise(
        self,
        model: Callable[..., Tensor],
        img: Tensor,
        *,
        timesteps: list[float],
        option: SamplingOption,
        img_ids: Tensor,
        prompt: TextInputs,
        negative: TextInputs | None = None,
        cond: Tensor | None = None,
        references: bool = False,
        latent_frames: int = 1,
        progress: Progress | None = None,
        run: RunAll = one_by_one,
    ) -> Tensor:
        """See SampleDenoiser. Raises ValueError when guidance is on and there is no negative prompt."""
        if negative is None and (references or option.guidance != 1):
            raise ValueError(f"guidance={option.guidance} needs the features of a negative prompt, as those of ''")

        def velocity(x: Tensor, t: float, step: int) -> Tensor:
            def evaluate(*passes: tuple[TextInputs, Tensor | None]) -> list[Tensor]:
                work = [Work(partial(_velocity, model, x, t, img_ids, *known), tuple(x.shape)) for known in passes]
                return [found.to(x.dtype) for found in run(work)]

            guidance = oscillate(option.guidance, step) if option.text_osci else option.guidance
            if negative is None or (guidance == 1 and not references):
                return evaluate((prompt, cond))[0]
            if not references or cond is None:
                prompted, unprompted = evaluate((prompt, cond), (negative, cond))
                return unprompted + guidance * (prompted - unprompted)
            nothing = torch.zeros_like(cond)
            prompted, unprompted, ignorant = evaluate((prompt, cond), (negative, cond), (negative, nothing))
            image_guidance = _image_guidance(option, step, len(timesteps), latent_frames, img_ids)
            return ignorant + image_guidance * (unprompted - ignorant) + guidance * (prompted - unprompted)

        return _integrate(velocity, img, timesteps, progress)


class DistilledDenoiser:
    """One pass per step; the model reads the guidance scale as an input (Flux-dev)."""

    @torch.no_grad()
    def denoise(
        self,
        model: Callable[..., Tensor],
        img: Tensor,
        *,
        timesteps: list[float],
        option: SamplingOption,
        img_ids: Tensor,
        prompt: TextInputs,
        negative: TextInputs | None = None,
        cond: Tensor | None = None,
        references: bool = False,
        latent_frames: int = 1,
        progress: Progress | None = None,
        run: RunAll = one_by_one,
    ) -> Tensor:
        """See SampleDenoiser; there is nothing to move away from, so the negative prompt is not read."""
        guidance = torch.full((img.shape[0],), option.guidance, device=img.device)

        def velocity(x: Tensor, t: float, step: int) -> Tensor:
            one = Work(partial(_velocity, model, x, t, img_ids, prompt, cond, guidance), tuple(x.shape))
            return run([one])[0].to(x.dtype)

        return _integrate(velocity, img, timesteps, progress)


DENOISERS: dict[str, type[SampleDenoiser]] = {"i2v": I2VDenoiser, "distill": DistilledDenoiser}


def passes_per_step(option: SamplingOption, *, references: bool = False) -> int:
    """How often a step evaluates the model, in the steps with the most."""
    if option.method == "distill":
        return 1
    return 3 if references else 1 if option.guidance == 1 else 2


def oscillate(guidance: float, step: int) -> float:
    """``guidance`` in the first 10 steps and every even one after, else 1 (off)."""
    return guidance if step < OSCILLATION_START or step % 2 == 0 else 1.0


def _image_guidance(
    option: SamplingOption, step: int, times: int, latent_frames: int, img_ids: Tensor
) -> float | Tensor:
    """g_img of a step: a number, or (B, N, 1) growing from 1 to a limit along the clip, the limit falling to 1."""
    guidance = oscillate(option.guidance_img, step) if option.image_osci else option.guidance_img
    if not option.scale_temporal_osci or guidance <= 1:
        return guidance
    limit = 1 + (guidance - 1) * (1 - step / (times - 1))
    return 1 + (limit - 1) * img_ids[..., :1] / max(latent_frames - 1, 1)


def _velocity(
    model: Callable[..., Tensor],
    x: Tensor,
    t: float,
    img_ids: Tensor,
    text: TextInputs,
    cond: Tensor | None,
    guidance: Tensor | None = None,
) -> Tensor:
    times = torch.full((x.shape[0],), t, device=x.device, dtype=x.dtype)
    return model(
        img=x,
        img_ids=img_ids,
        txt=text.txt,
        txt_ids=text.txt_ids,
        timesteps=times,
        y_vec=text.y_vec,
        cond=cond,
        guidance=guidance,
        txt_mask=text.txt_mask,
        context=text.context,
    )


def _integrate(
    velocity: Callable[[Tensor, float, int], Tensor], img: Tensor, timesteps: list[float], progress: Progress | None
) -> Tensor:
    """Euler steps down the times; the sum is kept in fp32 (fp64 for fp64 img)."""
    x = img if img.dtype == torch.float64 else img.float()
    steps = len(timesteps) - 1
    for step in range(steps):
        now, then = timesteps[step], timesteps[step + 1]
        x = x + (then - now) * velocity(x, now, step)
        if progress is not None:
            progress(step + 1, steps)
    return x
