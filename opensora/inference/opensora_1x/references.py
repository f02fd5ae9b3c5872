"""References of clips that are made as by Open-Sora 1.1 to 1.3: whole images and clips, as latents."""

from collections.abc import Sequence

import torch
from torch import Tensor

from opensora.assembly.components import Components
from opensora.conditioning.placed_frames import PREVIOUS, PlacedFrames
from opensora.datasets.decode import api
from opensora.datasets.decode.common import ResizeToFill
from opensora.inference.lengths import Coder
from opensora.inference.references import READ_S, KnownFrames, cropped, encoded, unreadable
from opensora.models.base import coding_of
from opensora.utils.errors import UserError

MOST_FRAMES = 1024  # of a reference, which is held in memory


def coded_length(frames: int, shape: Coder) -> int:
    """The first frames of a reference that become whole latent ones, or whole pieces where clips are cut into pieces
    with frames in common."""
    coding = coding_of(shape)
    if coding is not None:
        latents = coding.stated(frames, None, None)[0] or 0
        return max(1, min(frames, coding.frames(latents)))
    lead, stride = int(shape.causal), shape.stride[0]
    return max(1, (frames - lead) // stride * stride + lead)


def latent_length(frames: int, shape: Coder) -> int:
    """Latent frames of a reference of so many frames."""
    made, coding = coded_length(frames, shape), coding_of(shape)
    if coding is not None:
        return coding.latents(made, 64, 64)[0]
    return 1 if made == 1 else (made - int(shape.causal)) // shape.stride[0] + int(shape.causal)


def check_reference(path: str, frames: int) -> None:
    """That a reference can be held in memory.

    Raises:
        UserError: it is too long.
    """
    if frames > MOST_FRAMES:
        raise UserError(f"ref={path}: has {frames} frames, must have at most {MOST_FRAMES}; cut out what is needed")


def read_reference(path: str, size: tuple[int, int], shape: Coder, dtype: torch.dtype) -> Tensor:
    """(3, T, H, W) of ``dtype`` in [-1, 1]: resized to cover ``size``, cropped at the centre.

    Raises:
        UserError: it cannot be read.
    """
    try:
        count = coded_length(api.probe(path, timeout_s=READ_S).num_frames, shape)
        frames = api.read_frames(path, 0, count, resize=ResizeToFill(*size), timeout_s=READ_S)
    except api.DecodeError as error:
        raise unreadable(path, error.cause) from None
    return cropped(torch.from_numpy(frames), size).permute(3, 0, 1, 2).to(dtype) / 127.5 - 1


def code_references(
    parts: Components, files: Sequence[str], size: tuple[int, int], dtype: torch.dtype, seed: int
) -> list[Tensor]:
    """(C, T', H', W') of every reference of a clip. Collective over the processes that share the work of coding.

    ``seed``: of the clip, for an autoencoder that draws.
    """
    found = []
    for number, path in enumerate(files):
        pixels = read_reference(path, size, parts.autoencoder, dtype)
        found.append(code_frames(parts, pixels, seed, f"reference {number}"))
    return found


def code_frames(parts: Components, pixels: Tensor, seed: int, name: str) -> Tensor:
    """(3, T, H, W) -> (C, T', H', W'), of as many frames as become whole latent ones."""
    count = coded_length(pixels.shape[1], parts.autoencoder)
    clip = pixels[None, :, :count].to(parts.device)
    return encoded(parts.autoencoder, clip, parts.run_tiles, seed, name)[0]


def placed_latents(plans: Sequence[PlacedFrames], references: Sequence[Sequence[Tensor]], like: Tensor) -> Tensor:
    """(B, C, T', H', W'): latents of references where the plans say so, zeros elsewhere.

    Args:
        like: (B, C, T', H', W') for size, precision and device; it is also the clip before, for frames from there.
    """
    found = torch.zeros_like(like)
    for row, plan in enumerate(plans):
        for frame in plan.given:
            source = plan.sources[frame]
            assert source is not None
            clip = like[row] if source.reference == PREVIOUS else references[row][source.reference]
            found[row, :, frame] = clip[:, source.frame].to(found)
    return found


def edit_ratios(plans: Sequence[PlacedFrames]) -> Tensor:
    """(B, T'), of frames that nothing is given of 1."""
    return torch.tensor([plan.edit_ratios for plan in plans], dtype=torch.float32)


def known_frames(plans: Sequence[PlacedFrames], latents: Tensor) -> KnownFrames:
    """What a model reads beside the noise; nothing is put back at the end."""
    known = torch.zeros(len(plans), *latents.shape[2:], dtype=torch.bool, device=latents.device)
    for row, plan in enumerate(plans):
        known[row, plan.given] = True
    return KnownFrames(reference=latents, known=known, kept=torch.zeros_like(known))
