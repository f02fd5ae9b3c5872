"""Clips with references in them, and clips that go on from one another, as one video.

Every further clip is given the last latent frames of the one before. Open-Sora 1.1 and 1.2 decode each clip, code it
again for the next one, and join pixels; 1.3 joins latents and decodes them together. Randomness is a function of a
sample's seed, the number of the clip, and what it is for; the first clip is that of a job of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensora.assembly.components import Components
from opensora.conditioning.placed_frames import (
    PlacedFrames,
    Placement,
    apply_mask_strategy,
    kind_of_clip,
    parse_mask_strategy,
)
from opensora.config.run import SampleConfig
from opensora.inference.lengths import asked_for, coded, frames_of
from opensora.inference.opensora_1x.prompts import prompt_of_clip
from opensora.inference.opensora_1x.references import (
    code_frames,
    code_references,
    edit_ratios,
    known_frames,
    placed_latents,
)
from opensora.inference.opensora_1x.sizes import frames_at_head, joins_latents, whole_pieces
from opensora.inference.pipeline import Made, OnStep, Sampler, clip_precision, fit
from opensora.inference.prompts import Job
from opensora.inference.references import split
from opensora.models.base import decode_clip, latent_grid
from opensora.utils.rng import derive_key

Plans = Sequence[PlacedFrames]


def clip_seed(seed: int, clip: int) -> int:
    """Of one of the clips that go on from one another; that of the first is the sample's."""
    return seed if clip == 0 else derive_key(seed, "clip", clip)


@dataclass(frozen=True)
class LongClips:
    """Makes the videos of a batch."""

    parts: Components
    cfg: SampleConfig
    sampler: Sampler
    has_references: bool  # some clip of the whole job

    @torch.no_grad()
    def __call__(self, batch: Sequence[Job], on_step: OnStep | None = None) -> Tensor:
        """Pixels (B, 3, T, H, W) in [-1, 1] of one video per job. Collective.

        Args:
            on_step: called with (steps done, steps in all), counted over all clips of a video.
        """
        made: list[Made] = []
        pixels: list[Tensor] = []
        references, placements = self._given(batch)
        for clip in range(self.cfg.loop):
            made.append(self._clip(clip, batch, references, placements, made, on_step))
            if not self._joins_latents:
                pixels.append(self._decoded(made[-1].latents, made[-1].frames))
            if clip + 1 < self.cfg.loop and not self._reads_beside:
                for row, job in enumerate(batch):
                    references[row].append(self._as_reference(row, job, clip, made[-1], pixels))
                    placements[row].append(self._continued(clip + 1, len(references[row]) - 1))
        return self._joined(made) if self._joins_latents else self._cut(pixels)

    def _as_reference(self, row: int, job: Job, clip: int, made: Made, pixels: Sequence[Tensor]) -> Tensor:
        """(C, T', H', W') of a clip that another goes on from."""
        if self._joins_latents:
            return made.latents[row]
        return code_frames(self.parts, pixels[-1][row], clip_seed(job.seed, clip), "clip")

    @property
    def _reads_beside(self) -> bool:
        """Whether the model reads references beside the noise."""
        return self.parts.layout.denoising.references == "channels"

    @property
    def _joins_latents(self) -> bool:
        return joins_latents(self.cfg.release, self.parts.layout.denoising.references)

    def _continued(self, clip: int, reference: int) -> Placement:
        length = self.cfg.condition_frame_length
        return Placement(clip, reference, -length, 0, length, self.cfg.condition_frame_edit)

    def _given(self, batch: Sequence[Job]) -> tuple[list[list[Tensor]], list[list[Placement]]]:
        """(references as latents, strategies) of every sample."""
        opt, parts = fit(self.cfg.sampling, self.parts), self.parts
        assert opt.height is not None and opt.width is not None
        size, dtype = (opt.height, opt.width), clip_precision(parts)
        references = [code_references(parts, split(job.ref), size, dtype, job.seed) for job in batch]
        return references, [parse_mask_strategy(job.strategy) for job in batch]

    def _clip(
        self,
        clip: int,
        batch: Sequence[Job],
        references: list[list[Tensor]],
        placements: list[list[Placement]],
        before: Sequence[Made],
        on_step: OnStep | None,
    ) -> Made:
        cfg = self.cfg
        given: dict[str, Any] = {}
        like = before[-1].latents if before else self._empty(len(batch))
        if self._reads_beside:
            if clip or self._kind != "t2v":
                plans = [self._kind_of(clip, files, like.shape[2]) for files in references]
                given["given"] = known_frames(plans, placed_latents(plans, references, like))
        elif clip or self.has_references:
            rule: dict[str, Any] = {"align": cfg.align, "shortens": cfg.release != "1.1"}
            plans = [
                apply_mask_strategy(placed, like.shape[2], [one.shape[1] for one in files], clip, **rule)
                for placed, files in zip(placements, references, strict=True)
            ]
            given = {"placed": placed_latents(plans, references, like), "edit_ratios": edit_ratios(plans)}
        return self.sampler(
            cfg.sampling,
            "t2v",
            seed=[clip_seed(job.seed, clip) for job in batch],
            text=[prompt_of_clip(job.text, clip) for job in batch],
            neg=[job.neg for job in batch],
            on_step=None if on_step is None else self._counted(on_step, clip),
            **given,
        )

    @property
    def _kind(self) -> str:
        """Of the whole job."""
        return self.cfg.cond_type if self.has_references else "t2v"

    def _kind_of(self, clip: int, references: Sequence[Tensor], latent_frames: int) -> PlacedFrames:
        return kind_of_clip(
            self._kind,
            self.cfg.condition_frame_length,
            latent_frames,
            [one.shape[1] for one in references],
            clip=clip,
            clips=self.cfg.loop,
        )

    def _empty(self, clips: int) -> Tensor:
        """(B, C, T', H', W')"""
        opt, parts = fit(self.cfg.sampling, self.parts), self.parts
        assert opt.height is not None and opt.width is not None
        made = coded(opt, parts.layout.denoising, parts.autoencoder)
        grid = latent_grid(made, opt.height, opt.width, parts.autoencoder)
        return torch.zeros(clips, parts.autoencoder.channels, *grid, dtype=clip_precision(parts), device=parts.device)

    def _counted(self, on_step: OnStep, clip: int) -> Callable[[int, int], None]:
        return lambda done, total: on_step(clip * total + done, self.cfg.loop * total)

    def _decoded(self, latents: Tensor, frames: int) -> Tensor:
        return decode_clip(self.parts.autoencoder, latents, frames, self.parts.run_tiles)

    def _joined(self, made: Sequence[Made]) -> Tensor:
        """Latents without those that clips have from the ones before, of whole pieces, decoded."""
        shape, asked = self.parts.autoencoder, self.cfg.sampling.num_frames
        if len(made) == 1:
            return asked_for(self._decoded(made[0].latents, made[0].frames), "t2v", asked, shape)
        length = self.cfg.condition_frame_length
        latents = torch.cat([one.latents[:, :, length if number else 0 :] for number, one in enumerate(made)], dim=2)
        whole = whole_pieces(latents.shape[2], shape)
        return self._decoded(latents[:, :, :whole], frames_of(whole, 0, shape))

    def _cut(self, pixels: Sequence[Tensor]) -> Tensor:
        """Clips without what they have from the ones before; the last one ends where it was asked to."""
        head = frames_at_head(self.cfg.condition_frame_length, self.parts.autoencoder)
        video = torch.cat([one[:, :, head if number else 0 :] for number, one in enumerate(pixels)], dim=2)
        beyond = max(0, pixels[-1].shape[2] - self.cfg.sampling.num_frames)
        return video[:, :, : video.shape[2] - beyond]
