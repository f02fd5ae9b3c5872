"""scores: what pluggable models say of a clip. Without any in the configuration there is no such stage.

Frames are decoded for the clips that are still kept only. A score that needs a text, ``clip_match``, has one of a side
file or a fixed prompt: captions are written behind the cut, for clips that all filters have let pass.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from data_pipeline.limits import SourceLimits
from data_pipeline.outputs import digest_of
from data_pipeline.rows import Row
from data_pipeline.scoring.base import Scorer, ScorerFiles
from data_pipeline.stages.base import GlobalStage, Resources, Stage, Unit
from opensora.datasets.decode.api import DecodeError, read_frames
from opensora.utils.errors import UserError
from opensora.utils.limits import Limits

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_DIGITS = 4  # behind the point: more differ from one processor to another


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """A column of scores."""

    kind: Literal["clip_aesthetic", "clip_match"]
    model: str  # folder of a CLIP as transformers saves it, or of its picture part as ONNX a file
    head: str = ""  # clip_aesthetic: linear layers on the embedding of a picture, safetensors or .pth
    prompt: str = ""  # clip_match: what every clip is compared with
    captions: str = ""  # clip_match: csv with columns path,text; clips of other videos have no score
    frames: int = 1  # of a clip that are looked at; its score is their mean

    LIMITS: ClassVar[Limits] = {"frames": (16, "a score looks at a few frames")}

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model='': must name the folder of a model; nothing is downloaded")
        if self.frames < 1:
            raise ValueError(f"frames={self.frames}: must be an integer >= 1")
        if self.kind == "clip_aesthetic" and not self.head:
            raise ValueError("head='': must name the file with the layers that make a score of an embedding")
        if self.kind == "clip_aesthetic" and (self.prompt or self.captions):
            raise ValueError("prompt: clip_aesthetic takes no text; write kind: clip_match")
        if self.kind == "clip_match" and bool(self.prompt) == bool(self.captions):
            raise ValueError("prompt: clip_match needs a prompt or a captions file, one of them")
        if self.kind == "clip_match" and self.head:
            raise ValueError("head: clip_match has none; write kind: clip_aesthetic")


class ScoresStage:
    """One row per clip; of those that were rejected or are duplicates all scores are null."""

    name: ClassVar[str] = "scores"
    version: ClassVar[int] = 2
    resources: ClassVar[Resources] = Resources(models=True)
    per_clip: ClassVar[bool] = True

    def __init__(
        self, config: Mapping[str, ScorerConfig], limits: SourceLimits, stages: Sequence[Stage | GlobalStage]
    ) -> None:
        """
        Args:
            stages: those before it, whose columns no score may be called like.

        Raises:
            UserError: a name that cannot be a column, a file that is not there or is no such model, or one that does
                not fit into ``limits.memory_mib``.
        """
        _check_names(config, stages)
        self._limits, self._scorers = limits, {name: _scorer(name, each, limits) for name, each in config.items()}
        self.reads = {"shots": ("clip_id", "first", "last"), "screen": ("keep",)}
        if any(stage.name == "duplicates" for stage in stages):
            self.reads["duplicates"] = ("duplicate_of",)
        # Where files lie does not change a score: their content does.
        self.config: Any = [
            {"name": name, "kind": each.kind, "frames": each.frames, "prompt": each.prompt, "files": self.digest(name)}
            for name, each in config.items()
        ]
        self._frames = {name: each.frames for name, each in config.items()}
        self.columns = pa.schema(
            [field for name in config for field in ((name, pa.float64()), (f"{name}_model", pa.string()))]
        )

    def digest(self, name: str) -> str:
        """16 hex digits of all files behind a score: what its column ``NAME_model`` has."""
        return digest_of(self._scorers[name].files.digests)

    def run(self, unit: Unit) -> list[Row]:
        """See ``Stage``.

        Raises:
            UserError: a model cannot be loaded.
        """
        kept = [row["keep"] for row in unit.rows["screen"]]
        copies = [row["duplicate_of"] for row in unit.rows.get("duplicates", [])] or [None] * len(kept)
        known = unit.before or [None] * len(kept)
        wanted = [keep and copy is None for keep, copy in zip(kept, copies, strict=True)]
        clips = zip(unit.rows["shots"], wanted, known, strict=True)
        return [row or (self._scores(unit, shot) if is_wanted else {}) for shot, is_wanted, row in clips]

    def _scores(self, unit: Unit, shot: Row) -> Row:
        found: Row = {}
        frames: dict[int, np.ndarray | None] = {}
        for name, scorer in self._scorers.items():
            numbers = sampled(shot["first"], shot["last"], self._frames[name])
            frames |= {number: self._frame(unit.file, number) for number in numbers if number not in frames}
            there = [frame for number in numbers if (frame := frames[number]) is not None]
            score = scorer.score(there, unit.file) if there else None
            found |= {name: None if score is None else round(score, _DIGITS), f"{name}_model": self.digest(name)}
        return found

    def _frame(self, file: str, number: int) -> np.ndarray | None:
        """(H, W, 3) uint8 RGB; None: it is damaged."""
        try:
            picture: np.ndarray = read_frames(file, number, 1, timeout_s=self._limits.time_s)[0]
        except DecodeError:
            return None
        return picture


def sampled(first: int, last: int, count: int) -> list[int]:
    """The middle ones of ``count`` equal parts of the frames [first, last)."""
    return [first + (2 * number + 1) * (last - first) // (2 * count) for number in range(count)]


def _check_names(config: Mapping[str, ScorerConfig], stages: Sequence[Stage | GlobalStage]) -> None:
    taken = {column: stage.name for stage in stages for column in stage.columns.names}
    for name in config:
        if not _NAME.fullmatch(name) or name.endswith("_model"):
            raise UserError(f"scores.{name}: must be a name for a column: letters, digits and _, not _model at its end")
        if name in taken:
            raise UserError(f"scores.{name}: stage {taken[name]} has a column of that name; give it another one")


def _scorer(name: str, config: ScorerConfig, limits: SourceLimits) -> Scorer:
    """Nothing is loaded yet: that happens where scores are computed."""
    from data_pipeline.scoring.clip import ClipAesthetic, ClipMatch

    key = f"scores.{name}"
    given = {"model": config.model, "head": config.head, "captions": config.captions}
    files = ScorerFiles(key, {name: path for name, path in given.items() if path})
    files.check_memory(limits.memory_mib)
    if config.kind == "clip_aesthetic":
        return ClipAesthetic(files)
    return ClipMatch(files, config.prompt)
