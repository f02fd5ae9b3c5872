"""captions: a text for every clip, of the first of several kinds that has one."""

import io
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
from PIL import Image

from data_pipeline.captioning.beside import caption_beside, captions_files
from data_pipeline.captioning.endpoint import Answer, CaptionError, Endpoint, EndpointConfig, key_of
from data_pipeline.captioning.template import template_caption
from data_pipeline.limits import SourceLimits
from data_pipeline.media.storage import find_clip
from data_pipeline.rows import Row
from data_pipeline.stages.base import Resources, Unit
from opensora.datasets.decode.api import DecodeError, read_frames

KINDS = ("file", "endpoint", "template", "none")
_QUALITY = 85  # of JPEG
_OF_TIME = 0.9  # of limits.time_s: then what was not asked goes without


@dataclass(frozen=True, kw_only=True)
class CaptionsConfig:
    """Where texts come from."""

    kinds: list[str] = field(default_factory=lambda: ["file", "template"])  # tried in this order
    # file: captions.csv or a text beside the video; endpoint: a model that is asked; template: from what was measured
    # none: no text, and clips without one are not kept
    file: str = ""  # csv with columns path,text; empty: captions.csv in the folder of the videos, or above it
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)

    def __post_init__(self) -> None:
        kinds = self.kinds
        if not kinds or len(set(kinds)) != len(kinds) or not set(kinds) <= set(KINDS):
            raise ValueError(f"kinds={kinds!r}: must be some of {', '.join(KINDS)}, each once")
        if any(kind in ("template", "none") for kind in kinds[:-1]):
            raise ValueError(f"kinds={kinds!r}: template and none must be the last, as none is tried behind them")
        for name in ("url", "model"):
            if "endpoint" in kinds and not getattr(self.endpoint, name):
                raise ValueError(f"endpoint.{name}='': must be given, as kinds has endpoint")


class _Found(NamedTuple):
    """What became of one clip."""

    row: Row
    error: str = ""  # of a kind that had none although it should


class CaptionsStage:
    """One row per clip; of those that were not cut all columns are null."""

    name: ClassVar[str] = "captions"
    version: ClassVar[int] = 1
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "cut": ("path", "sha256", "num_frames", "height", "width", "fps"),
        "measure": ("luma", "camera_motion", "motion_score"),
    }
    resources: ClassVar[Resources] = Resources()
    per_clip: ClassVar[bool] = True
    retry_column: ClassVar[str] = "caption_error"
    columns: ClassVar[pa.Schema] = pa.schema(
        [
            ("text", pa.string()),  # null: there is none
            ("caption_source", pa.string()),  # the kind that it is of
            ("caption_error", pa.string()),  # why a kind that was tried before, or all, had none
            ("caption_model", pa.string()),
            ("caption_prompt", pa.string()),  # what the model was asked
            ("caption_prompt_hash", pa.string()),
            ("prompt_tokens", pa.int64()),  # that the model read
            ("tokens", pa.int64()),  # that it wrote
        ]
    )

    def __init__(self, config: CaptionsConfig, limits: SourceLimits, out: str, source: object) -> None:
        """
        Args:
            out: the folder of the run.
            source: where its videos are, for captions beside them.

        Raises:
            UserError: the captions file that is named is not there, or the environment holds no key.
        """
        kinds = list(config.kinds)
        self.config: Any = {"kinds": kinds} | ({"endpoint": config.endpoint.asked} if "endpoint" in kinds else {})
        self._kinds, self._endpoint = kinds, config.endpoint
        self._limits, self._out = limits, Path(out).absolute()
        self._files = captions_files(config.file, source) if "file" in kinds else ()
        if "endpoint" in kinds:
            key_of(config.endpoint)

    def beside(self, file: str) -> Row:
        """See ``ReadsBeside``."""
        if "file" not in self._kinds:
            return {}
        found = caption_beside(file, self._files)
        return {"text": found.text, "reason": found.reason, "detail": found.detail}

    def run(self, unit: Unit) -> list[Row]:
        """See ``Stage``."""
        until = time.monotonic() + _OF_TIME * self._limits.time_s
        known = unit.before or [None] * len(unit.rows["cut"])
        clips = list(zip(unit.rows["cut"], unit.rows["measure"], known, strict=True))
        beside = unit.row("beside") if "beside" in unit.rows else {}

        def caption(clip: tuple[Row, Row, Row | None]) -> Row:
            cut, measured, before = clip
            if before is not None or cut["path"] is None:
                return before or {}
            return self._caption(endpoint, cut, measured, beside, until)

        if "endpoint" not in self._kinds:
            endpoint = None
            return [caption(clip) for clip in clips]
        with Endpoint(self._endpoint) as endpoint, ThreadPoolExecutor(self._endpoint.concurrency) as pool:
            return list(pool.map(caption, clips))

    def _caption(self, endpoint: Endpoint | None, cut: Row, measured: Row, beside: Row, until: float) -> Row:
        errors: list[str] = []
        for kind in self._kinds:
            if kind == "file":
                found = _of_file(beside, is_last=kind == self._kinds[-1])
            elif kind == "endpoint":
                assert endpoint is not None
                found = self._of_endpoint(endpoint, cut, until)
            elif kind == "template":
                found = _Found({"text": template_caption(cut, measured)})
            else:
                break
            errors += [found.error] if found.error else []
            if found.row:
                return found.row | {"caption_source": kind, "caption_error": "; ".join(errors) or None}
        return {"caption_error": "; ".join(errors) or None}

    def _of_endpoint(self, endpoint: Endpoint, cut: Row, until: float) -> _Found:
        try:
            answer: Answer = endpoint.caption(list(self._pictures(cut)), until)
        except (CaptionError, DecodeError) as error:
            return _Found({}, f"endpoint: {error.cause if isinstance(error, DecodeError) else error}")
        prompt = {"caption_prompt": self._endpoint.prompt, "caption_prompt_hash": self._endpoint.prompt_hash}
        counts = {"prompt_tokens": answer.prompt_tokens, "tokens": answer.tokens}
        return _Found({"text": answer.text, "caption_model": answer.model, **prompt, **counts})

    def _pictures(self, cut: Row) -> Iterator[bytes]:
        """Frames of a clip as JPEG, spread over it."""
        path = find_clip(self._out, cut["path"])
        if path is None:
            raise DecodeError(cut["path"], "the clip is gone")
        count = min(self._endpoint.frames, cut["num_frames"])
        scale = min(1.0, self._endpoint.frame_side / max(cut["height"], cut["width"]))
        size = (max(1, round(cut["height"] * scale)), max(1, round(cut["width"] * scale)))
        timeout_s = self._limits.time_s
        frames = read_frames(path, 0, count, span=cut["num_frames"], resize=lambda *_: size, timeout_s=timeout_s)
        for frame in frames:
            file = io.BytesIO()
            Image.fromarray(frame).save(file, "JPEG", quality=_QUALITY)
            yield file.getvalue()


def _of_file(beside: Mapping[str, str], *, is_last: bool) -> _Found:
    """A caption that is not there is no error where another kind follows; one that cannot be read is."""
    if beside["text"]:
        return _Found({"text": beside["text"]})
    if beside["reason"] == "no caption" and not is_last:
        return _Found({})
    return _Found({}, f"file: {beside['reason']}: {beside['detail']}")
