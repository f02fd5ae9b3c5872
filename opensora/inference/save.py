"""Pixels to files: videos and stills, their prompts, and one sheet to look at."""

import contextlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from acceleration.distributed.mesh import Mesh
from opensora.assembly.components import Components
from opensora.conditioning.references import Part
from opensora.config.run import SampleConfig
from opensora.inference.prompts import SHEET, Job, final_prompt, with_names
from opensora.inference.references import read_part, split
from opensora.inference.watermark import read_watermark
from opensora.utils import signal_handler
from opensora.utils.charts import contact_sheet
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files.user_files import try_output, write_whole, written_whole
from opensora.utils.files.video_writer import write_image, write_video

SHEET_COLUMNS = 8
SHEET_PIXELS = 192  # of a thumbnail
SHEET_ROWS = 40  # of the contact sheet; a table of thousands of prompts would make a picture nobody can open
_PORTABLE = re.compile(r"[A-Za-z0-9._ -]{1,100}")  # names that every file system takes


def output_folder(cfg: SampleConfig) -> Path:
    """``{save_dir}/{video|image}_{resolution}``, where the files of a job go; ``save_dir`` with ``release``."""
    if cfg.release is not None:
        return Path(cfg.save_dir)
    option = cfg.sampling
    size = option.resolution if option.width is None else f"{option.width}x{option.height}"
    return Path(cfg.save_dir) / f"{'image' if option.num_frames == 1 else 'video'}_{size}"


def unused_names(cfg: SampleConfig, jobs: Sequence[Job], folder: Path | None = None) -> list[Job]:
    """The jobs under names that nothing in the output folder has. Collective: the main process decides.

    With ``cfg.overwrite`` they keep their names.

    Raises:
        UserError: the folder cannot be written, or a file there cannot be called so; on every process.
    """
    decided: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            decided[0] = _decide(cfg, jobs, folder or output_folder(cfg))
        except (UserError, OSError) as error:
            decided[0] = str(error) if isinstance(error, UserError) else f"save_dir={cfg.save_dir}: {error}"
    dist.broadcast_object_list(decided)
    if isinstance(decided[0], str):
        raise UserError(decided[0])
    return list(decided[0])


def _decide(cfg: SampleConfig, jobs: Sequence[Job], folder: Path) -> list[Job]:
    try_output(folder, "save_dir", folder=True)
    named = list(jobs) if cfg.overwrite else with_names(jobs, names_in(folder))
    if cfg.overwrite:
        _check_replaceable(folder, named, "png" if cfg.sampling.num_frames == 1 else "mp4")
    moved = [(old.name, new.name) for old, new in zip(jobs, named, strict=True) if old.name != new.name]
    if moved:
        announce(
            f"{folder} holds files of an earlier job: this one writes {moved[0][1]} instead of {moved[0][0]}"
            f"{f', {len(moved)} clips in all' if len(moved) > 1 else ''}; overwrite=true replaces them"
        )
    for job in named:
        if not _PORTABLE.fullmatch(job.name):
            _try_name(folder, job.name)
    return named


def _check_replaceable(folder: Path, jobs: Sequence[Job], suffix: str) -> None:
    """That what the job will replace are files."""
    names = [f"{job.name}.{kind}" for job in jobs for kind in (suffix, "txt")]
    for path in (folder / name for name in (*names, f"{SHEET}.png")):
        if path.is_dir() and not path.is_symlink():  # which is replaced like a file
            raise UserError(f"overwrite=true: {path} is a folder; move it away, or give another name")


def names_in(folder: Path) -> set[str]:
    """What the clips, stills and prompts in a folder are called, without suffix."""
    return {path.stem for path in folder.iterdir() if path.suffix.lower() in (".mp4", ".png", ".txt")}


def _try_name(folder: Path, name: str) -> None:
    """That this file system can store a name with unusual characters, or a long one."""
    probe = folder / f"{name}.tmp"
    try:
        probe.touch(exist_ok=True)
        probe.unlink()
    except OSError as error:
        reason = f"no file there can be called {name!r} ({error.strerror})"
        raise UserError(f"{folder}: {reason}; choose another name") from None


@dataclass(frozen=True, kw_only=True)
class Author:
    """Who writes clips, and what their prompts end with, where no ``Components`` are at hand."""

    mesh: Mesh
    prompt_suffix: bool
    published_prompts: bool


class Saver:
    """Writes ``{folder}/{name}.{mp4|png}`` with the prompt that the model was given beside it as .txt.

    Every file is there whole or not at all, and none of another job is replaced, unless ``cfg.overwrite``.
    """

    def __init__(self, cfg: SampleConfig, parts: "Components | Author", folder: Path | None = None) -> None:
        self.folder = folder or output_folder(cfg)
        self.is_main = dist.get_rank() == 0
        self._writes = parts.mesh.is_first_of_sample
        self._option, self._overwrite, self._parts = cfg.sampling, cfg.overwrite, parts
        self._fps = cfg.sampling.fps if cfg.save_fps is None else cfg.save_fps
        self._crf, self._mark = cfg.crf, read_watermark(cfg.watermark)
        # file, prompt, a few small frames, what they were made from
        self._written: list[tuple[str, str, NDArray[np.uint8], list[NDArray[np.uint8]]]] = []

    def save(self, jobs: Sequence[Job], pixels: Tensor) -> None:
        """Write one clip per job from pixels (B, 3, T, H, W) in [-1, 1].

        Raises:
            UserError: a file cannot be written.
        """
        if not self._writes:
            return
        for job, clip in zip(jobs, to_uint8(pixels), strict=True):
            clip = self._mark(clip) if self._mark else clip
            with signal_handler.writing():
                path = self._write_clip(job.name, clip)
                told = {"suffix": self._parts.prompt_suffix, "published": self._parts.published_prompts}
                prompt = final_prompt(job.text, self._option, **told)
                write_whole(path.with_suffix(".txt"), partial(_write_line, prompt))
            given = _reference_thumbnails(job.ref, clip) if len(self._written) < SHEET_ROWS else []
            self._written.append((str(path), job.text, thumbnails(clip), given))

    def _write_clip(self, name: str, clip: Tensor) -> Path:
        """The file, whose name has a number more if another job took it since the names were decided."""
        suffix = "png" if len(clip) == 1 else "mp4"
        for number in itertools.count():
            path = self.folder / f"{name}{f'_{number}' if number else ''}.{suffix}"
            try:
                with written_whole(path, replace=self._overwrite) as aside:
                    write_clip(aside, clip, self._fps, self._crf)
                return path
            except FileExistsError:
                announce(f"{path}: another job has written it since this one began; this one takes another name")
        raise AssertionError("unreachable")

    def finish(self, *, sheet: bool = True) -> list[str]:
        """Draw the contact sheet, if one is wanted; the list of all files on the main process. Collective."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self._written)
        written = sorted((item for part in everyone for item in part), key=lambda item: item[0])
        if not self.is_main:
            return []
        files = [file for file, *_ in written]
        if not sheet:
            return files
        shown = written[:SHEET_ROWS]
        rows = [(prompt, frames) for _, prompt, frames, _ in shown]
        given = [references for *_, references in shown]
        with signal_handler.writing():
            return [*files, str(self._write_sheet(rows, given if any(given) else ()))]

    def _write_sheet(
        self, rows: Sequence[tuple[str, NDArray[np.uint8]]], references: Sequence[Sequence[NDArray[np.uint8]]]
    ) -> Path:
        """The contact sheet, beside those of earlier jobs."""
        for number in itertools.count():
            sheet = self.folder / f"{SHEET}{f'_{number}' if number else ''}.png"
            with contextlib.suppress(FileExistsError), written_whole(sheet, replace=self._overwrite) as aside:
                contact_sheet(rows, aside, columns=SHEET_COLUMNS, references=references)
                return sheet
        raise AssertionError("unreachable")


def write_clip(path: Path, clip: Tensor, fps: float, crf: int) -> None:
    """(T, H, W, 3) uint8 on the CPU -> an mp4, or a png of a single frame."""
    if len(clip) == 1:
        write_image(path, clip[0].numpy())
    else:
        write_video(path, clip.numpy(), fps, crf=crf)


def _write_line(line: str, file: IO[str]) -> None:
    file.write(line + "\n")


def thumbnails(clip: Tensor) -> NDArray[np.uint8]:
    """(T, H, W, 3) -> evenly spaced frames, the first and last among them, of at most about SHEET_PIXELS a side."""
    frames = torch.linspace(0, len(clip) - 1, min(len(clip), SHEET_COLUMNS)).round().long()
    stride = max(1, max(clip.shape[1:3]) // SHEET_PIXELS)
    return clip[frames][:, ::stride, ::stride].numpy()


def _reference_thumbnails(ref: str, clip: Tensor) -> list[NDArray[np.uint8]]:
    """The first frame of every file that ``clip`` was made from, cropped as its model saw it, small."""
    size = (clip.shape[1], clip.shape[2])
    frames = [read_part(file, Part("head", 1, 1), size, "i2v_head") for file in split(ref)]
    return [thumbnails(to_uint8(frame[None])[0])[0] for frame in frames]


def to_uint8(pixels: Tensor) -> Tensor:
    """(B, 3, T, H, W) in [-1, 1] -> (B, T, H, W, 3) uint8 on the CPU."""
    scaled = ((pixels.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().cpu()
