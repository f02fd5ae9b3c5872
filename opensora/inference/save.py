"""Pixels to files: videos and stills, their prompts, and one sheet to look at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from opensora.config import SampleConfig
from opensora.inference.load import Components
from opensora.inference.prompts import Job
from opensora.utils import signals
from opensora.utils.images import contact_sheet
from opensora.utils.video_writer import write_image, write_video

SHEET = "contact_sheet.png"
SHEET_COLUMNS = 8
SHEET_PIXELS = 192  # of a thumbnail
SHEET_ROWS = 40  # of the contact sheet; a table of thousands of prompts would make a picture nobody can open


class Saver:
    """Writes ``{save_dir}/{video|image}_{resolution}/{name}.{mp4|png}`` with the prompt beside it as .txt."""

    def __init__(self, cfg: SampleConfig, parts: Components) -> None:
        option = cfg.sampling
        size = option.resolution if option.width is None else f"{option.width}x{option.height}"
        kind = "image" if option.num_frames == 1 else "video"
        self.folder = Path(cfg.save_dir) / f"{kind}_{size}"
        self.is_main = dist.get_rank() == 0
        self._writes = parts.mesh.is_first_of_sample
        self._fps = option.fps
        self._written: list[tuple[str, str, NDArray[np.uint8]]] = []  # file, prompt, a few small frames

    def save(self, jobs: Sequence[Job], pixels: Tensor) -> None:
        """Write one clip per job from pixels (B, 3, T, H, W) in [-1, 1]."""
        if not self._writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for job, clip in zip(jobs, to_uint8(pixels), strict=True):
            path = self.folder / f"{job.name}.{'png' if len(clip) == 1 else 'mp4'}"
            with signals.writing():
                if len(clip) == 1:
                    write_image(path, clip[0].numpy())
                else:
                    write_video(path, clip.numpy(), self._fps)
                path.with_suffix(".txt").write_text(job.text + "\n", encoding="utf-8")
            self._written.append((str(path), job.text, _thumbnails(clip)))

    def finish(self) -> list[str]:
        """Draw the contact sheet; the list of all files on the main process. Collective."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self._written)
        written = sorted((item for part in everyone for item in part), key=lambda item: item[0])
        if not self.is_main:
            return []
        sheet = self.folder / SHEET
        with signals.writing():
            contact_sheet([(text, frames) for _, text, frames in written[:SHEET_ROWS]], sheet, columns=SHEET_COLUMNS)
        return [file for file, _, _ in written] + [str(sheet)]


def _thumbnails(clip: Tensor) -> NDArray[np.uint8]:
    """(T, H, W, 3) -> evenly spaced frames, the first and last among them, of at most about SHEET_PIXELS a side."""
    frames = torch.linspace(0, len(clip) - 1, min(len(clip), SHEET_COLUMNS)).round().long()
    stride = max(1, max(clip.shape[1:3]) // SHEET_PIXELS)
    return clip[frames][:, ::stride, ::stride].numpy()


def to_uint8(pixels: Tensor) -> Tensor:
    """(B, 3, T, H, W) in [-1, 1] -> (B, T, H, W, 3) uint8 on the CPU."""
    scaled = ((pixels.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().cpu()
