"""References of a sampling job: images and clips of any size, as the latents of the frames that they give.

Each clip that is made has references of its own, or none. What a kind takes of them (``cond_type``) is read, resized to
cover the clip's frame, cropped at its centre, and coded by itself.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from opensora.conditioning.references import (
    KINDS,
    MOST_REFERENCES,
    Part,
    code_references,
    fits,
    grey_behind,
    is_still,
    kinds_of,
    parts_of,
)
from opensora.config.given_frames import reads_no_references
from opensora.datasets.decode import api
from opensora.datasets.decode.common import ResizeToFill, cover_size
from opensora.datasets.loading.window import crop_origin
from opensora.models.base import Autoencoder, AutoencoderShape, ModelConfig, Variational
from opensora.models.families import describe
from opensora.schedulers import ObjectiveConfig
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import short
from opensora.utils.files.user_files import absence
from opensora.utils.rng import torch_generator
from opensora.utils.tasks import TaskRunner, one_by_one

Reference: TypeAlias = str | Tensor  # a file, or its frames (3, T, H, W) in [-1, 1]
READ_S = 120.0  # longest that reading one reference may take
SEPARATOR = ";"  # between the files of a clip
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


@dataclass(frozen=True, kw_only=True)
class KnownFrames:
    """What is known of a batch, as latents."""

    reference: Tensor  # (B, C, T', H', W'), zeros where unknown; ``whole``: coded with grey there
    known: Tensor  # (B, T', H', W') bool: what the model is told
    kept: Tensor  # (B, T', H', W') bool: what is put back into the latents at the end
    whole: bool = False
    pictures: Tensor | None = None  # (B, 3, H, W) in [-1, 1]: first frames, grey where unknown; None: of no clip

    def told(self) -> Tensor:
        """Of ``reference`` what the model is told."""
        return self.reference if self.whole else self.reference * self.known[:, None]

    def put_back(self, latents: Tensor) -> Tensor:
        """Latents (B, C, T', H', W') with those of references where they are to stay as they are."""
        return torch.where(self.kept[:, None], self.reference.to(latents), latents)


def split(ref: str) -> list[str]:
    """The files of ``a.png;b.mp4``."""
    return [one.strip() for one in ref.split(SEPARATOR) if one.strip()]


def code_known(
    cond_type: str,
    references: Sequence[Sequence[Reference]],
    grid: tuple[int, int, int],
    size: tuple[int, int],
    autoencoder: Autoencoder,
    run: TaskRunner = one_by_one,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seeds: Sequence[int] = (),
    takes: str = "channels",
    frames: int | None = None,
) -> KnownFrames:
    """Collective over the processes that ``run`` shares work with.

    Args:
        cond_type: one of ``KINDS``.
        references: of every clip; none: nothing of it is known.
        grid: (T', H', W') of the clips.
        size: (height, width) of their frames.
        dtype: of pixels; fp64 to compare layouts.
        seeds: of the clips, for an autoencoder that draws (``vae.sample=posterior``); none: it does not.
        takes: how the model takes references (``Denoising.references``).
        frames: of the clips that are made, where it takes a clip with grey frames.

    Raises:
        UserError: a reference that cannot be read, or does not fit the kind.
    """
    for given in references:
        check_count(cond_type, len(given))
    still = grid[0] == 1
    # The published sampler tells the model nothing of a still, and gives back the reference itself for i2v.
    kinds = [cond_type if given and (not still or is_still(cond_type)) else "t2v" for given in references]
    whole = takes == "clip" and not still

    pictures = torch.zeros(len(references), 3, *size, dtype=dtype, device=device)

    def code(part: Part, rows: list[int]) -> Tensor:
        coded = []
        for row in rows:
            pixels = read_part(references[row][chosen(cond_type, part)], part, size, cond_type, dtype)[None]
            if part.end == "head":
                pictures[row] = pixels[0, :, 0]
            seed = seeds[row] if seeds and not whole else None
            if whole:
                assert frames is not None
                pixels = grey_behind(pixels, frames)
            coded.append(encoded(autoencoder, pixels.to(device), run, seed, part.name))
        return torch.cat(coded)

    reference, known = code_references(kinds, grid, autoencoder, code, device=device, whole=whole)
    keeps = takes == "in_place" or (is_still(cond_type) and not whole)
    kept = known if keeps else torch.zeros_like(known)
    return KnownFrames(
        reference=reference,
        known=torch.zeros_like(known) if still else known,
        kept=kept,
        whole=whole,
        pictures=pictures,
    )


def encoded(autoencoder: Autoencoder, pixels: Tensor, run: TaskRunner, seed: int | None, name: str) -> Tensor:
    """Latents of a clip (1, 3, T, H, W): a draw of its own for every ``name``, where there is a seed and an autoencoder
    that draws."""
    if seed is None or not (isinstance(autoencoder, Variational) and autoencoder.samples):
        return autoencoder.encode(pixels, run)

    def draw(shape: tuple[int, ...], stage: str = "") -> Tensor:
        purpose = f"posterior {name} {stage}" if stage else f"posterior {name}"
        return torch.randn(1, *shape, generator=torch_generator(seed, purpose)).to(pixels.device)

    return autoencoder.encode(pixels, run, draw)


def chosen(cond_type: str, part: Part) -> int:
    """Which of a clip's references a part is taken from: the last frame is that of the last one, all else of the
    first."""
    return -1 if part.end == "tail" and is_still(cond_type) else 0


def takes_references(model: ModelConfig, objective: ObjectiveConfig) -> bool:
    """Whether a job may give references by ``cond_type``: to models that read them beside the noise, or in its place
    along a flow, which keeps them clean."""
    denoising = describe(model)
    return denoising.reads_beside or (denoising.references == "in_place" and isinstance(objective, RectifiedFlowConfig))


def check_references(model: ModelConfig, objective: ObjectiveConfig, cond_type: str) -> None:
    """That a model takes known frames, of this kind.

    Raises:
        UserError: it does not.
    """
    if not takes_references(model, objective):
        raise UserError(f"ref: {reads_no_references(model)}; take ref and cond_type out, or give other weights")
    kinds = kinds_of(describe(model).references)
    if cond_type not in kinds:
        raise UserError(
            f"cond_type={cond_type}: model.kind={model.kind} reads known frames at the head alone; must be one of "
            f"{', '.join(kinds)}"
        )


def check_count(cond_type: str, count: int) -> None:
    """That a clip has no more references than its kind can take.

    Raises:
        UserError: an unknown kind, or too many.
    """
    if cond_type not in KINDS:
        raise UserError(f"cond_type={short(cond_type, 40)}: must be one of {', '.join(KINDS)}")
    most = MOST_REFERENCES if KINDS[cond_type] else 0
    if count > most:
        takes = f"takes at most {most}, one for each end" if most else "takes none; set cond_type=i2v_head, or another"
        given = f"{count} reference{'s' * (count > 1)}"
        raise UserError(f"ref: {given} for a clip, cond_type={cond_type} {takes}")


def check_length(cond_type: str, latents: int, frames: int, autoencoder: Autoencoder | AutoencoderShape) -> None:
    """That a clip has room for what its kind gives.

    Args:
        latents, frames: latent frames of the clip, and the frames that are asked for.

    Raises:
        UserError: it has not, with the least length that has.
    """
    if fits(cond_type, latents, autoencoder) or (latents == 1 and is_still(cond_type)):
        return
    least = next(count for count in range(2, 1000) if fits(cond_type, count, autoencoder))
    lead = int(autoencoder.causal)
    least_frames = (least - lead - 1) * autoencoder.stride[0] + lead + 1
    given = "+".join(str(part.frames) for part in parts_of(cond_type, autoencoder))
    raise UserError(
        f"sampling.num_frames={frames}: must be at least {least_frames} with cond_type={cond_type}, as references give "
        f"{given} of them"
    )


def read_part(
    reference: Reference, part: Part, size: tuple[int, int], cond_type: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(3, part.frames, H, W) of ``dtype`` in [-1, 1]: the first or last frames of a reference at a clip's size.

    Raises:
        UserError: it cannot be read, or is too short.
    """
    if isinstance(reference, Tensor):
        check_frames("its frames", reference.shape[1], part, cond_type)
        return _fill(part.of(reference, part.frames).to(dtype), size)
    total = count_frames(reference)
    check_frames(reference, total, part, cond_type)
    start = 0 if part.end == "head" else total - part.frames
    try:
        frames = api.read_frames(reference, start, part.frames, resize=ResizeToFill(*size), timeout_s=READ_S)
    except api.DecodeError as error:
        raise unreadable(reference, error.cause) from None
    return cropped(torch.from_numpy(frames), size).permute(3, 0, 1, 2).to(dtype) / 127.5 - 1


def count_frames(path: str) -> int:
    """Of an image, 1.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    if _ADDRESS.match(path):
        raise UserError(f"ref={path}: is an address, and nothing is fetched; save it, and give the file")
    if reason := absence(path, "file"):
        raise unreadable(path, reason)
    try:
        return api.probe(path, timeout_s=READ_S).num_frames
    except api.DecodeError as error:
        raise unreadable(path, error.cause) from None


def unreadable(path: str, reason: str) -> UserError:
    """The error of a reference that cannot be read."""
    return UserError(f"ref={short(path, 200)}: {reason}; give an image or a video that can be read")


def check_frames(name: str, found: int, part: Part, cond_type: str) -> None:
    """That a reference has the frames that a part takes.

    Raises:
        UserError: it is too short.
    """
    if found < part.frames:
        kinds = f"cond_type={cond_type} takes its {'first' if part.end == 'head' else 'last'} {part.frames}"
        raise UserError(f"ref={name}: has {found} frame{'s' * (found > 1)}, {kinds}; give a longer clip, or use i2v")


def _fill(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames (3, T, H, W) in [-1, 1], resized to cover ``size`` and cropped at their centre."""
    cover = cover_size(frames.shape[2], frames.shape[3], *size)
    if cover != tuple(frames.shape[2:]):
        scaled = interpolate(frames.transpose(0, 1), cover, mode="bicubic", antialias=True)
        frames = scaled.clamp(-1, 1).transpose(0, 1)
    return cropped(frames.permute(1, 2, 3, 0), size).permute(3, 0, 1, 2)


def cropped(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """(T, H, W, 3) -> (T, height, width, 3), a view."""
    top, left = crop_origin(frames.shape[1], frames.shape[2], *size)
    return frames[:, top : top + size[0], left : left + size[1]]
