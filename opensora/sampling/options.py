"""What a sampling job may choose: size, length, guidance, seed; and how a choice becomes a size the model can make."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar, Literal, TypeVar

from opensora.sampling.cache_config import CACHE_CONFIGS, CacheConfig, NoCache
from opensora.utils.files.untrusted import short
from opensora.utils.limits import Limits, check_limits
from opensora.utils.respacing import DIFFUSION_STEPS, spaced_count
from opensora.utils.sections import section
from opensora.utils.sizes import RATIOS, area_of, frame_size, ratio_of

T = TypeVar("T")


class SamplingMethod(str, Enum):
    """Names of guidance, for scripts; configurations write them out."""

    I2V = "i2v"  # by several passes
    DISTILLED = "distill"  # read by the model, in one


METHODS = tuple(method.value for method in SamplingMethod)
MAX_SIDE = 16384  # pixels; H.264 and players take no more
MAX_SEED = 2**63 - 1
MIN_FPS, MAX_FPS = 0.1, 1000.0


@dataclass(frozen=True, kw_only=True)
class SamplingOption:
    """What to sample and how; ``sanitize_sampling_option`` fills in width and height."""

    width: int | None = None  # pixels; width and height win over resolution and aspect_ratio
    height: int | None = None
    resolution: str = "256px"  # area: "256px" is 256^2, "256p" is 256^2 * 16/9
    aspect_ratio: str = "16:9"  # width:height
    num_frames: int = 129  # any number: those that the autoencoder codes beyond it are made and cut off
    num_steps: int = 50
    guidance: float = 7.5  # towards the prompt; 1: off
    guidance_low: float | None = None  # that of the expert for low noise, where there are two; null: as guidance
    guidance_img: float | None = 3.0  # towards the references; 1: off; null: as guidance
    cfg_channel: int | None = None  # latent channels that are guided, the first ones; null: all (Open-Sora 1.0: 3 of 4)
    text_osci: bool = False  # guidance only in the first force_num and every even step
    image_osci: bool = False  # the same for guidance_img
    force_num: int = 10
    scale_temporal_osci: bool = False  # guidance_img grows along the clip and fades over the steps
    scale_image_weight: bool = False  # the same as in Open-Sora 1.3: both from and to initial_image_scale
    initial_image_scale: float = 1.0
    use_flaw_fix: bool = False  # guided by text alone: contrast is moved back to that without guidance
    use_sdedit: bool = False  # references that are read beside the noise stand in it too, with the noise of each step
    seed: int = 42
    noise: Literal["keyed", "published"] = "keyed"
    # of a clip's seed alone; or as the family's sampler draws it on a CPU: all clips that are sampled together from the
    # seed of the first, and as many frames as it makes of them
    shift: bool = True  # spend more steps on high noise, by flow_shift
    flow_shift: float | None = None  # alpha of the schedule; null: as in training
    solver: str | None = None  # steps from noise to data; null: the first that fits what the model was trained for
    timestep_respacing: str | None = None  # solver ddpm or ddim: which steps, in place of num_steps: "" all, "100",
    # "10,20,30" of equal sections, "ddim50"
    eta: float = 0.0  # solver ddim: noise of each step; 0 none, 1 about as ddpm
    clip_denoised: bool = False  # solver ddpm or ddim: clean latents to [-1, 1] in every step
    method: Literal["i2v", "distill"] = "i2v"  # guidance by several passes, or read by the model in one
    fps: float = 24.0  # frames per second, of the video and in the prompt
    motion_score: int | None = 4  # null: not said in the prompt; refine.motion_score has a language model say it
    camera_motion: str | None = None  # said in the prompt, as "pan left"; null: not said
    cache: CacheConfig = section(CACHE_CONFIGS, default=NoCache)  # what steps reuse of those before

    LIMITS: ClassVar[Limits] = {
        **dict.fromkeys(("width", "height"), (MAX_SIDE, "H.264 and players take no more pixels a side")),
        "num_frames": (100_000, "more than an hour at 24 frames a second"),
        "num_steps": (10_000, "more change nothing that fp32 could show"),
        **dict.fromkeys(
            ("guidance", "guidance_low", "guidance_img", "initial_image_scale"), (1000.0, "the velocity would overflow")
        ),
        "cfg_channel": (10_000, "no latents have more"),
        "force_num": (10_000, "a clip takes no more steps"),
        "eta": (1.0, "a step takes no more noise"),
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
                raise ValueError(f"{name}={value}: must be an integer >= 1, or null")
        if (self.width is None) != (self.height is None):
            given, other = ("width", "height") if self.height is None else ("height", "width")
            raise ValueError(f"{given}={getattr(self, given)} without {other}: give both, or neither with a resolution")
        for name in ("num_frames", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be an integer >= 1")
        for name in ("guidance", "guidance_low", "guidance_img", "initial_image_scale", "force_num", "eta"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name}={value}: must be a number >= 0")
        if self.cfg_channel is not None and self.cfg_channel < 1:
            raise ValueError(f"cfg_channel={self.cfg_channel}: must be an integer >= 1, or null for all channels")
        if self.scale_image_weight and self.scale_temporal_osci:
            raise ValueError("scale_image_weight=true: must be false with scale_temporal_osci=true; use one of them")
        self._check_steps()
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be an integer from 0 to 2^63-1; for another clip take another")
        if not self.fps >= MIN_FPS:
            raise ValueError(f"fps={self.fps}: must be a number from {MIN_FPS} to {MAX_FPS:g}")
        if self.motion_score is not None and self.motion_score < 0:
            raise ValueError(f"motion_score={self.motion_score}: must be an integer >= 0, or null")
        if self.camera_motion is not None and not self.camera_motion.strip():
            raise ValueError(f"camera_motion={short(repr(self.camera_motion), 40)}: must be a text, or null")
        if self.flow_shift is not None and self.flow_shift <= 0:
            raise ValueError(f"flow_shift={self.flow_shift}: must be a number > 0, or null for the formula")
        if self.noise not in ("keyed", "published"):
            raise ValueError(f"noise={self.noise}: must be one of keyed, published")
        if isinstance(self.method, SamplingMethod):
            object.__setattr__(self, "method", self.method.value)
        if self.method not in METHODS:
            raise ValueError(f"method={self.method}: must be one of {', '.join(METHODS)}")
        _named("resolution", self.resolution, area_of)
        _named("aspect_ratio", self.aspect_ratio, ratio_of)
        if self.width is None and max(image_size(self.resolution, self.aspect_ratio)) > MAX_SIDE:
            raise ValueError(
                f"resolution={self.resolution}: with aspect_ratio={self.aspect_ratio} a side has more than {MAX_SIDE} "
                "pixels, which H.264 and players do not take"
            )

    def _check_steps(self) -> None:
        """Steps that are chosen by words count as ``num_steps``, for whoever wants to know how many there are."""
        if self.timestep_respacing is None:
            return
        try:
            count = spaced_count(self.timestep_respacing)
        except ValueError as error:
            raise ValueError(f"timestep_respacing={short(repr(self.timestep_respacing))}: {error}") from None
        object.__setattr__(self, "num_steps", count or DIFFUSION_STEPS)


def image_size(resolution: str, aspect_ratio: str, multiple: int = 16) -> tuple[int, int]:
    """(height, width) of about this area and ratio, both multiples of ``multiple``.

    Every ratio of ``RATIOS`` also lies on its side, with the transposed size; where the one on its side is listed too
    (16:9 and 9:16), each has the other's transposed size, as in the family's table.

    Raises:
        ValueError: a resolution or ratio that cannot be read.
    """
    area = _named("resolution", resolution, area_of)
    transposed = ":".join(reversed(aspect_ratio.split(":")))
    if transposed in RATIOS:
        width, height = frame_size(area, transposed, multiple)
        return height, width
    return frame_size(area, aspect_ratio, multiple)


def _named(name: str, value: str, read: Callable[[str], T]) -> T:
    """``read(value)``, with the field's name in its error."""
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"{name}={short(value, 40)}: {error}") from None


def sanitize_sampling_option(option: SamplingOption, *, multiple: int = 16, rounds: bool = True) -> SamplingOption:
    """The option with width and height set, rounded up to multiples. Frames stay as asked: see ``coded_frames``.

    Args:
        multiple: pixels per token side, the autoencoder's stride times the patch.
        rounds: false for models and autoencoders that cut off what is no whole latent, as Open-Sora 1.x does: a size
            that is given stays, the model is told of it, and clips lack the pixels that are left over.
    """
    if option.width is not None and option.height is not None:
        height, width = (max(side, multiple) for side in (option.height, option.width))
        if rounds:
            height, width = (math.ceil(side / multiple) * multiple for side in (height, width))
    else:
        height, width = image_size(option.resolution, option.aspect_ratio, multiple)
    return replace(option, width=width, height=height)
