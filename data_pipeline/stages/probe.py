"""probe: what a file is, decoding its first frame only: size as shown, frames, rate, codec, sound, SHA-256."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from data_pipeline.limits import SourceLimits
from data_pipeline.media.facts import read_facts
from data_pipeline.rows import Row
from data_pipeline.stages.base import Resources, SourceError, Unit
from opensora.datasets.decode.api import ANIMATIONS, probe, sniff

_BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """There is nothing to choose."""


class ProbeStage:
    """One row per file; those that are no video fail here, with the reason."""

    name: ClassVar[str] = "probe"
    version: ClassVar[int] = 1
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    resources: ClassVar[Resources] = Resources()
    columns: ClassVar[pa.Schema] = pa.schema(
        [
            ("sha256", pa.string()),  # of the bytes
            ("bytes", pa.int64()),
            ("container", pa.string()),
            ("codec", pa.string()),
            ("pixel_format", pa.string()),
            ("num_frames", pa.int64()),  # by the packets; a damaged file has fewer that can be decoded
            ("height", pa.int32()),  # as shown: turned, with square pixels
            ("width", pa.int32()),
            ("fps", pa.float64()),  # the mean rate
            ("time_base", pa.string()),  # seconds of a unit of time, as a fraction
            ("variable_rate", pa.bool_()),  # distances of frames differ by more than a tenth
            ("rotation", pa.int32()),  # degrees clockwise that the file asks for
            ("hdr", pa.string()),  # the curve of a high dynamic range: PQ, HLG, or empty
            ("key_frames", pa.int64()),
            ("video_streams", pa.int32()),
            ("has_audio", pa.bool_()),
            ("bitrate", pa.int64()),  # bits a second of the file
            ("note", pa.string()),  # what a person should know
        ]
    )

    def __init__(self, config: ProbeConfig, limits: SourceLimits) -> None:
        self.config, self._limits = config, limits

    def run(self, unit: Unit) -> list[Row]:
        """See ``Stage``."""
        if not os.path.isfile(unit.file):
            is_there = os.path.exists(unit.file)
            reason = "a folder, pipe or device, and no file" if is_there else "no such file"
            raise SourceError(reason, kind="no file" if is_there else "missing")
        found = sniff(unit.file)
        if found.kind == "still":
            raise SourceError("a still, not a video; python -m data_pipeline.index lists stills", kind="still")
        if found.kind == "neither":
            raise SourceError(f"no video: {found.what}", kind="no video")
        if found.what in ANIMATIONS:
            reason = f"a moving picture ({found.what}), which the stages behind this cannot read; save it as a video"
            raise SourceError(reason, kind="moving picture")
        info = probe(unit.file, timeout_s=self._limits.time_s)
        if info.height * info.width > self._limits.pixels:
            reason = f"{info.width}x{info.height} pixels, limits.pixels allows {self._limits.pixels}"
            raise SourceError(reason, kind="too large")
        if info.num_frames > self._limits.frames:
            reason = f"{info.num_frames} frames, limits.frames allows {self._limits.frames}"
            raise SourceError(reason, kind="too long")
        size = os.path.getsize(unit.file)
        facts = read_facts(unit.file, self._limits.time_s)
        row = {"sha256": _sha256(unit.file), "bytes": size, "num_frames": info.num_frames, "fps": info.fps}
        return [row | {"height": info.height, "width": info.width, "note": info.note, **facts}]


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
