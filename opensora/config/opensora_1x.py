"""Keys of a sampling job that Open-Sora 1.1 to 1.3 have in their configuration files and commands."""

import math
import re
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from opensora.conditioning.placed_frames import parse_mask_strategy
from opensora.sampling.options import MAX_FPS, MIN_FPS
from opensora.utils.files.untrusted import short
from opensora.utils.limits import Limits

Release: TypeAlias = Literal["1.0", "1.1", "1.2", "1.3"]
Score: TypeAlias = float | str

MOST_SCORE = 1000.0
_WORDS = re.compile(r"[A-Za-z][A-Za-z -]{0,99}")  # a score of 1.3, as "very good"
LIMITS: Limits = {
    "loop": (10_000, "hours of video"),
    "condition_frame_length": (10_000, "no clip has so many latent frames"),
    "condition_frame_edit": (1.0, "1 makes frames anew"),
    "align": (10_000, "no clip has so many latent frames"),
    "save_fps": (MAX_FPS, "no player shows more"),
    **dict.fromkeys(("aes", "flow"), (MOST_SCORE, "training's scores are below")),
}


@dataclass(frozen=True, kw_only=True)
class ReleaseSampling:
    """See ``SampleConfig``."""

    release: Release | None = None  # whose prompts may end in JSON, and whose files are called sample_0000; null: none
    reference_path: tuple[str | None, ...] = ()  # references of every prompt, images or clips, as "a.png;b.mp4"
    mask_strategy: tuple[
        str | None, ...
    ] = ()  # for every prompt which frames of references go where, as "0,0,0,0,8,0.3"
    neg_prompts: tuple[str | None, ...] = ()  # what clips of every prompt move away from; null: neg
    loop: int = 1  # clips that go on from one another, in one video
    condition_frame_length: int = 5  # latent frames of the clip before that a clip goes on from
    condition_frame_edit: float = 0.0  # edit ratio of these: 0 keeps them, 1 makes them anew
    align: int | None = None  # first frames of mask_strategy become multiples of it; null: they stay
    aes: float | str | None = None  # aesthetic score that prompts end with, a number or a word of 1.3
    flow: float | str | None = None  # motion score that prompts end with, a number or a word of 1.3
    camera_motion: str | None = None  # that prompts end with, as "pan left"
    save_fps: float | None = None  # frames per second of the files; null: sampling.fps

    LIMITS: ClassVar[Limits] = LIMITS

    def __post_init__(self) -> None:
        for name in ("loop", "condition_frame_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be an integer >= 1")
        if self.align is not None and self.align < 1:
            raise ValueError(f"align={self.align}: must be an integer >= 1, or null")
        if not 0 <= self.condition_frame_edit <= 1:
            raise ValueError(f"condition_frame_edit={self.condition_frame_edit}: must be a number from 0 to 1")
        if self.save_fps is not None and self.save_fps < MIN_FPS:
            raise ValueError(f"save_fps={self.save_fps}: must be a number from {MIN_FPS} to {MAX_FPS:g}, or null")
        if self.camera_motion is not None and not self.camera_motion.strip():
            raise ValueError(f"camera_motion={short(repr(self.camera_motion), 40)}: must be a text, or null")
        for name in ("aes", "flow"):
            self._check_score(name, getattr(self, name))
        for number, strategy in enumerate(self.mask_strategy):
            try:
                parse_mask_strategy(strategy)
            except ValueError as error:
                raise ValueError(f"mask_strategy.{number}: {error}") from None

    def _check_score(self, name: str, value: Score | None) -> None:
        if value is None:
            return
        shown = f"{name}={short(repr(value), 40)}"
        if self.release in ("1.0", "1.1"):
            raise ValueError(f"{shown}: release={self.release} adds no scores to prompts; must be null")
        try:
            number = float(value)
        except ValueError:
            if not _WORDS.fullmatch(str(value)) or self.release == "1.2":
                raise ValueError(f"{shown}: must be a number, or a word with release=1.3") from None
            return
        if not 0 <= number <= MOST_SCORE or math.isnan(number):
            raise ValueError(f"{shown}: must be a number from 0 to {MOST_SCORE:g}")

    @property
    def goes_on(self) -> bool:
        """Whether clips are made as by the commands of Open-Sora 1.x: references stand in them, or they go on from one
        another."""
        lists = (self.reference_path, self.mask_strategy, self.neg_prompts)
        return self.release is not None or self.loop > 1 or any(lists)
