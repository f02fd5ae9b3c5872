"""metrics.jsonl of a run, and its copies in TensorBoard and Weights & Biases."""

import importlib.util
import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import ANY, COUNT, TEXT, mismatch, parse_json, read_small, seal, unseal
from opensora.utils.files.user_files import replacing
from opensora.utils.files.video_writer import gif

METRICS_NAME, WANDB_ID_NAME = "metrics.jsonl", "wandb_id"
VALIDATED = "validated"  # the event of a complete round of validation, which has its numbers
MAX_METRICS = 1 << 34  # bytes
WandbMode = Literal["off", "offline", "online"]


class Clip(NamedTuple):
    """A sampled clip or still."""

    path: Path  # mp4 or png
    frames: NDArray[np.uint8]  # (T, H, W, 3)
    fps: float
    prompt: str


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Copies of metrics.jsonl."""

    tensorboard: bool = False  # also write TensorBoard events into the run's folder
    wandb: WandbMode = "off"  # also write to Weights & Biases; online needs a key
    wandb_project: str = "opensora"


def check_installed(cfg: LogConfig) -> None:
    """That the packages of the copies are there; imports nothing.

    Raises:
        UserError: one is not, with how to get it.
    """
    for wanted, key, package, off in (
        (cfg.tensorboard, "log.tensorboard=true", "tensorboard", "log.tensorboard=false"),
        (cfg.wandb != "off", f"log.wandb={cfg.wandb}", "wandb", "log.wandb=off"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"{key}: {package} is not installed; pip install {package}, or {off}")


class MetricsLogger:
    """Appends one JSON line per record to ``folder/metrics.jsonl``; TensorBoard and wandb get copies.

    Use on one rank only. The file is the truth: one line per step, in order, flushed as it is written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tensorboard: bool = False,
        wandb: WandbMode = "off",
        wandb_project: str = "opensora",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        resumed_step: int = 0,
    ) -> None:
        """Open the writers.

        Args:
            name: of the run, in wandb; the folder's name if None.
            config: the resolved configuration, kept by wandb.
            resumed_step: updates already made. Records of later steps, which the resumed run will make again, are
                cut off, so that every step is in the file once.

        Raises:
            UserError: TensorBoard or wandb is asked for and not installed.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / METRICS_NAME
        self._tensorboard = _open_tensorboard(self.folder / "tensorboard", resumed_step) if tensorboard else None
        self._wandb = None
        if wandb != "off":
            name = name or self.folder.name
            identity = _wandb_identity(self.folder, name, fresh=not resumed_step)
            self._wandb = _open_wandb(self.folder, wandb, wandb_project, name, identity, config)
        _cut_after(self.path, resumed_step)
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one record for ``step`` (updates made so far). Values are numbers, text or lists of those."""
        record = {"step": step, **{name: _jsonable(value) for name, value in values.items()}}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self._copy_numbers(step, values)

    def log_validation(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers of a complete round of validation, as the event ``VALIDATED`` of ``step``."""
        self.log_event(VALIDATED, step, **values)
        self._copy_numbers(step, values)

    def was_validated(self, step: int) -> bool:
        """Whether the file has a complete round of ``step``."""
        _, events = read_metrics(self.path)
        return any(event["event"] == VALIDATED and event["step"] == step for event in events)

    @property
    def shows_clips(self) -> bool:
        """Whether there are copies, which people look at clips in."""
        return self._tensorboard is not None or self._wandb is not None

    def show_clips(self, step: int, clips: Mapping[str, Clip]) -> None:
        """Put clips into the copies: animated images in TensorBoard, the files themselves in wandb."""
        if self._tensorboard is not None:
            for name, clip in clips.items():
                _add_animation(self._tensorboard, f"validate/{name}", clip, step)
        if self._wandb is not None and clips:
            self._wandb.log({f"validate/{name}": _wandb_media(clip) for name, clip in clips.items()}, step=step)

    def _copy_numbers(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in values.items() if _is_number(value)}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def log_event(self, event: str, step: int, **values: Any) -> None:
        """Write an event (``resumed``, ``interrupted``, ...) between the records; it has ``event`` and no metrics."""
        record = {"step": step, "event": event, **{name: _jsonable(value) for name, value in values.items()}}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Drop records of steps after ``step`` from the file, as they will come again; copies keep theirs."""
        self._file.close()
        _cut_after(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Flush and close all writers; safe to call twice."""
        if not self._file.closed:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(records, events) of a metrics.jsonl, in order; lines that a crash cut short or damaged are left out.

    Raises:
        UserError: it cannot be read.
    """
    records: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    for _, record in _read_lines(Path(path))[0]:
        (events if "event" in record else records).append(record)
    return records, events


def _open_tensorboard(folder: Path, resumed_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "log.tensorboard=true: tensorboard is not installed; pip install tensorboard, or log.tensorboard=false"
        ) from error
    return SummaryWriter(str(folder), purge_step=resumed_step + 1)


def _wandb_identity(folder: Path, name: str, *, fresh: bool) -> str:
    """What wandb knows the run by: kept in its folder, so that a resumed run goes on in the same charts, and a fresh
    one of the same name does not write into another's."""
    path = folder / WANDB_ID_NAME
    if not fresh and os.path.lexists(path):
        try:
            return str(unseal(read_small(path), ValueError, {"id": TEXT})["id"])
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            announce(f"{path}: damaged ({reason}); wandb shows a new run from here on")
    identity = f"{name}-{secrets.token_hex(4)}"
    with replacing(path) as file:
        file.write(seal({"id": identity}).encode())
    return identity


def _open_wandb(
    folder: Path, mode: WandbMode, project: str, name: str, identity: str, config: Mapping[str, Any] | None
) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"log.wandb={mode}: wandb is not installed; pip install wandb, or log.wandb=off") from error
    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        announce("log.wandb=online: no key found, so this run is logged offline; wandb sync uploads it later")
        mode = "offline"
    return wandb.init(
        project=project, name=name, id=identity, dir=str(folder), mode=mode, config=dict(config or {}), resume="allow"
    )


def _add_animation(writer: Any, tag: str, clip: Clip, step: int) -> None:
    """TensorBoard plays GIFs where images are; its own videos are the same, made by a package more."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    _, height, width, colours = clip.frames.shape
    picture = gif(clip.frames, clip.fps)
    image = Summary.Image(height=height, width=width, colorspace=colours, encoded_image_string=picture)
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
    writer.add_text(f"{tag}/prompt", clip.prompt, step)


def _wandb_media(clip: Clip) -> Any:
    import wandb

    if len(clip.frames) == 1:
        return wandb.Image(str(clip.path), caption=clip.prompt)
    return wandb.Video(str(clip.path), caption=clip.prompt, format="mp4")


def _cut_after(path: Path, step: int) -> None:
    """Drop records of steps after ``step``, and lines that are damaged or cut short; the file is replaced in one go.

    Raises:
        UserError: it cannot be read.
    """
    if not os.path.lexists(path):
        return
    lines, damaged, whole = _read_lines(path)
    kept = [line for line, record in lines if record["step"] <= step]
    if damaged:
        announce(f"{path}: {damaged} damaged line{'s' * (damaged > 1)} left out; what is trained is not concerned")
    if damaged or not whole or len(kept) < len(lines):
        with replacing(path) as file:
            file.write(b"".join(line + b"\n" for line in kept))


def _read_lines(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], int, bool]:
    """((line, record) of every line that is one, how many are damaged, whether the bytes are just these lines).

    What a power cut leaves are zeros, within a line or instead of some.
    """
    try:
        content = read_small(path, MAX_METRICS)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be read ({reason}); move it away, and it begins anew") from None
    lines: list[tuple[bytes, dict[str, Any]]] = []
    damaged = 0
    for raw in content.split(b"\n"):
        line = raw.strip(b"\0\r ")
        record = _parse_line(line)
        if record is not None:
            lines.append((line, record))
        damaged += bool(raw) and record is None
    return lines, damaged, content == b"".join(line + b"\n" for line, _ in lines)


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line, ValueError)
    except ValueError:
        return None
    return record if mismatch(record, {"step": COUNT, "event?": TEXT, "...": ANY}) is None else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
