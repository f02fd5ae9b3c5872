"""From prompts to videos. ``build_api`` gives a function, ``sample_jobs`` writes what it makes of a whole job.

The tokens of a sample are cut over ring x ulysses once before the first step and joined once after the last; in
between every process integrates its own share. The passes of guidance are shared out over cfg and their velocities
exchanged in every step; the tiles of the autoencoder over all processes of the sample. What is drawn depends on the
seed alone, so any number of processes gives the same video.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from acceleration.distributed.mesh import Mesh
from acceleration.distributed.tasks import DistributedRunner
from opensora.assembly.components import Components
from opensora.assembly.step_caches import step_cache
from opensora.assembly.token_layout import forward_arguments
from opensora.conditioning.dropout import dropped_labels
from opensora.conditioning.references import is_still, shown
from opensora.inference.lengths import as_published, asked_for, coded, frames_of, latents_made
from opensora.inference.prompts import final_prompt
from opensora.inference.references import (
    KnownFrames,
    Reference,
    check_count,
    check_length,
    check_references,
    code_known,
    split,
)
from opensora.inference.steps import (
    drawn_in_turn,
    given_frames,
    guided_channels,
    keeps_known,
    model_of,
    noise_of_steps,
    phases_of,
    solver_for,
)
from opensora.models.base import decode_clip, latent_grid
from opensora.models.conditions import Conditions, TokenBatch
from opensora.sampling.caches import OnDecision, StepCache
from opensora.sampling.caches.base import NoStepCache
from opensora.sampling.experts import guided_by
from opensora.sampling.guidance import build_guidance, passes_per_step
from opensora.sampling.loop import Predict, denoise
from opensora.sampling.noise import get_noise
from opensora.sampling.options import SamplingOption, sanitize_sampling_option
from opensora.utils.files.upload import upload
from opensora.utils.tokens import Grid

Api = Callable[..., Tensor]
Sampler: TypeAlias = "Callable[..., Made]"
OnStep = Callable[[int, int], None]


def conditions_of(
    parts: Components,
    texts: Sequence[str],
    x: Tensor,
    opt: SamplingOption,
    *,
    null: bool = False,
    behind: Sequence[str] | None = None,
    given: KnownFrames | None = None,
) -> Conditions:
    """What the model is told of one prompt per sample, this process's share of it.

    Args:
        x: the tokens of the samples, whole.
        opt: with width and height.
        null: these are no prompts, or what to move away from: a model with a null embedding of its own takes that for
            empty ones.
        behind: prompts whose masks such an embedding stands behind, as in training; None: the mask of no prompt.
        given: frames that are known; None: nothing is.
    """
    denoising = parts.layout.denoising
    learned, gone = denoising.null_text == "learned", [null and not prompt for prompt in texts]
    read = list(texts)
    if learned and behind is not None:
        read = [other if is_gone else own for own, other, is_gone in zip(texts, behind, gone, strict=True)]
    text, dropped = parts.text_encoder.encode(read), upload(torch.tensor(gone), parts.device) if learned else None
    numbers = {
        "fps": torch.tensor([opt.fps]),
        "size": torch.tensor([[opt.height, opt.width]], dtype=torch.float32),
        "num_frames": torch.tensor([opt.num_frames], dtype=torch.float32),
    }
    conditions = Conditions(
        text=None if learned and denoising.text == "none" else text.txt,
        text_mask=text.mask,
        pooled=text.y_vec if denoising.pooled_dim else None,
        label=dropped_labels(text.label, dropped, denoising.num_classes),
        dropped=dropped,
        reference=given.told().to(x) if given else None,
        known=given.known if given else None,
        image_tokens=None if null else _picture_tokens(parts, len(texts), given),
        **{
            name: upload(x.repeat_interleave(len(texts), 0), parts.device)
            for name, x in numbers.items()
            if name in denoising.wants
        },
    )
    return parts.layout.shard_conditions(parts.layout.patchify_conditions(conditions), x)


def _picture_tokens(parts: Components, clips: int, given: KnownFrames | None) -> Tensor | None:
    """(B, K, D) of the first frames that are known, zeros of clips without; None: the model reads none. Passes without
    prompt keep them, as Wan's do."""
    if not parts.layout.denoising.image_dim:
        return None
    encoder = parts.image_encoder
    assert encoder is not None, "checked with the job: there is an image encoder"
    if given is None or given.pictures is None:
        return torch.zeros(clips, encoder.tokens, encoder.dim, dtype=clip_precision(parts), device=parts.device)
    return shown(encoder.encode(given.pictures), given.known)


def _prepared(parts: Components, prompt: str) -> str:
    """As the text encoder wants it in sampling, cleaned where it was not in training."""
    prepare: Callable[[str], str] | None = getattr(parts.text_encoder, "for_sampling", None)
    return prompt if prepare is None else prepare(prompt)


class Made(NamedTuple):
    """Clips before they are decoded."""

    latents: Tensor  # (B, C, T', H', W')
    frames: int  # that they are coded as
    published: bool  # as many frames are kept as the family's sampler keeps


def build_api(parts: Components, on_decision: OnDecision = lambda decision: None) -> Api:
    """A function from prompts to pixels over loaded components.

    Args:
        on_decision: told what this process's step cache, if there is one, decides.
    """
    sampler = build_sampler(parts, on_decision)

    @torch.no_grad()
    def api(opt: SamplingOption, cond_type: str = "t2v", *args: Any, **told: Any) -> Tensor:
        """Sample one clip per prompt. Collective over all processes.

        Args: those of the function that ``build_sampler`` gives.

        Returns:
            Pixels (B, 3, T, H, W) in [-1, 1], on every process, with as many frames as were asked for; with ``noise``
            or ``opt.noise=published`` as many as the family's sampler gives, see ``lengths``.

        Raises:
            UserError: a size, length, kind or reference that cannot be sampled, or a solver that keeps no frames.
        """
        return pixels_of(parts, sampler(opt, cond_type, *args, **told), cond_type, opt.num_frames)

    return api


@torch.no_grad()
def pixels_of(parts: Components, made: Made, cond_type: str, frames: int) -> Tensor:
    """Pixels (B, 3, T, H, W) in [-1, 1] of what ``build_sampler`` made, as ``build_api`` gives them. Collective."""
    pixels = decode_clip(parts.autoencoder, made.latents, made.frames, parts.run_tiles)
    chosen = as_published if made.published else asked_for
    return chosen(pixels, cond_type, frames, parts.autoencoder)


def build_sampler(parts: Components, on_decision: OnDecision = lambda decision: None) -> Sampler:
    """A function from prompts to latents over loaded components; ``on_decision``: see ``build_api``."""
    run_passes = DistributedRunner(parts.mesh["cfg"])

    @torch.no_grad()
    def sample(
        opt: SamplingOption,
        cond_type: str = "t2v",
        seed: int | Sequence[int] | None = None,
        text: Sequence[str] = ("",),
        neg: Sequence[str] | None = None,
        ref: Sequence[str | Sequence[Reference] | None] | None = None,
        on_step: OnStep | None = None,
        noise: Tensor | None = None,
        edit_ratios: Tensor | None = None,
        *,
        placed: Tensor | None = None,
        given: KnownFrames | None = None,
    ) -> Made:
        """One clip per prompt. Collective over all processes.

        Args:
            opt: size, length, steps and guidance; sizes are rounded up to what the model can make.
            cond_type: what the references give, see ``conditioning.references``; "t2v": nothing. The same on all
                processes: other kinds are guided by three passes, whether or not a clip has references.
            seed: of the noise, one for all clips or one each; None: ``opt.seed``. A clip's noise depends on its seed
                alone, whatever else is in the batch.
            text: prompts, one per clip.
            neg: what to move away from, one per clip; None: the empty prompt.
            ref: files, as "a.png;b.mp4", or frames of references, one entry per clip; "" or None: a clip from its text
                alone.
            on_step: called with (steps done, steps in all), from (0, all) on; see ``denoise``.
            noise: (B, C, T', H', W') to start from, in place of what the seed gives.
            edit_ratios: (B, T'), for models that take clean frames in the place of noisy ones: of latent frames that
                stand in ``noise`` already, from 0, kept, to 1, made anew; all others have 1.
            placed: (B, C, T', H', W') latents that are put into the noise first, where edit_ratios is below 1.
            given: what is known beside the noise, in place of what ``ref`` and ``cond_type`` give; on all processes.

        Raises:
            UserError: as of ``build_api``.
        """
        opt, layout = fit(opt, parts), parts.layout
        made = coded(opt, layout.denoising, parts.autoencoder, cond_type)
        if noise is not None:
            made = frames_of(noise.shape[2], opt.num_frames, parts.autoencoder)
        assert opt.height is not None and opt.width is not None
        grid = layout.denoising.grid(latent_grid(made, opt.height, opt.width, parts.autoencoder))
        grid = grid._replace(pixels=(opt.num_frames, opt.height, opt.width))
        seeds = _seeds(opt.seed if seed is None else seed, len(text))
        given = _given(parts, cond_type, ref, seeds, opt, grid, made) if given is None else given
        guided = layout.denoising.three_passes(given is not None)
        opt = replace(opt, scale_temporal_osci=opt.scale_temporal_osci and is_still(cond_type))
        start = _noise(replace(opt, num_frames=made), parts, seeds) if noise is None else noise.to(parts.device)
        if placed is not None and edit_ratios is not None:
            start = torch.where((edit_ratios < 1)[:, None, :, None, None].to(start.device), placed.to(start), start)
        x = layout.patchify(start)  # (B, N, C) or (B, T, S, C)
        positions = layout.shard(layout.positions(grid, len(text), parts.device))
        solver = solver_for(opt, parts.objective, grid)
        frame_noise = noise_of_steps(layout, grid, seeds, x, "frame noise")
        told = {"suffix": parts.prompt_suffix, "published": parts.published_prompts}
        prompts = [_prepared(parts, final_prompt(t, opt, **told)) for t in text]
        avoided = [_prepared(parts, t) for t in neg or [""] * len(text)]
        passes = passes_per_step(opt, references=guided)
        known = conditions_of(parts, prompts, x, opt, given=given)
        null = conditions_of(parts, avoided, x, opt, null=True, behind=prompts) if passes > 1 else None
        solver_noise = drawn_in_turn(noise_of_steps(layout, grid, seeds, x, "solver noise"))
        kept = given_frames(opt, solver, layout, grid, edit_ratios, frame_noise, references=given is not None)
        tokens = layout.shard(x)
        for expert, steps in phases_of(solver, parts.low_noise):
            model, own = model_of(parts, expert), guided_by(opt, expert)
            cache = _step_cache(own, model, parts.mesh, on_decision)
            with cache.during(model):
                tokens = denoise(
                    _predict(parts, model, positions, grid),
                    tokens,
                    solver,
                    build_guidance(
                        own,
                        references=guided,
                        steps=len(solver.times) - 1,
                        latent_frames=grid.frames,
                        positions=positions,
                        guided=guided_channels(layout.denoising, own),
                        keeps_known=keeps_known(parts.objective),
                        total=layout.sequence.total,
                    ),
                    known,
                    null,
                    outputs=layout.denoising.outputs,
                    noise=solver_noise,
                    frames=kept,
                    progress=on_step,
                    run=run_passes,
                    watch=cache.watch,
                    steps=steps,
                )
        latents = layout.unpatchify(layout.gather(tokens, grid), grid)  # (B, C, T', H', W')
        if given is not None:
            latents = given.put_back(latents)
        return Made(latents, made, noise is not None or opt.noise == "published")

    return sample


def _step_cache(opt: SamplingOption, model: nn.Module, mesh: Mesh, on_decision: OnDecision) -> StepCache:
    """What steps of a model reuse; nothing is asked of it where they reuse nothing."""
    if opt.cache.kind == "none":
        return NoStepCache()
    return step_cache(opt.cache, model, mesh, on_decision)


def _given(
    parts: Components,
    cond_type: str,
    ref: Sequence[str | Sequence[Reference] | None] | None,
    seeds: Sequence[int],
    opt: SamplingOption,
    grid: Grid,
    frames: int,
) -> KnownFrames | None:
    """What the references of a batch give, of clips of ``frames`` frames; None: the kind takes none."""
    listed = [split(one) if isinstance(one, str) else list(one or ()) for one in ref or [None] * len(seeds)]
    for references in listed:
        check_count(cond_type, len(references))
    if cond_type == "t2v":
        return None
    assert opt.height is not None and opt.width is not None
    check_references(parts.cfg, parts.objective, cond_type)
    check_length(cond_type, grid.latent_frames, opt.num_frames, parts.autoencoder)
    return code_known(
        cond_type,
        listed,
        grid.latents,
        (opt.height, opt.width),
        parts.autoencoder,
        parts.run_tiles,
        parts.device,
        clip_precision(parts),
        seeds,
        parts.layout.denoising.references,
        frames,
    )


def clip_precision(parts: Components) -> torch.dtype:
    """Of what is not the model's: fp32, or fp64 for an fp64 model."""
    return torch.promote_types(next(parts.model.parameters()).dtype, torch.float32)


def fit(opt: SamplingOption, parts: Components) -> SamplingOption:
    """The option with a size that these components can make."""
    denoising, autoencoder = parts.layout.denoising, parts.autoencoder
    multiple = denoising.pixel_multiple(autoencoder.stride)
    return sanitize_sampling_option(opt, multiple=multiple, rounds=not denoising.cuts_sizes(autoencoder))


def _predict(parts: Components, model: nn.Module, positions: Tensor, grid: Grid) -> Predict:
    """A model on this process's tokens of a clip, which are at ``positions``; what fills up tokens stays zero."""
    whole = parts.layout.inside(grid, parts.device)
    inside = None if whole is None else parts.layout.shard(whole)

    def predict(x: Tensor, t: Tensor, known: Conditions) -> Tensor:
        x = x if inside is None else torch.where(inside, x, 0.0)
        tokens = TokenBatch(x=x, positions=positions, grid=grid.sides)
        found: Tensor = model(**forward_arguments(parts.cfg, tokens, t, known))
        if inside is None:
            return found
        outputs = found.shape[-1] // x.shape[-1]
        return torch.where(torch.cat([inside] * outputs, dim=-1), found, 0.0)

    return predict


def _seeds(seed: int | Sequence[int], clips: int) -> Sequence[int]:
    return [seed] * clips if isinstance(seed, int) else seed


def _noise(opt: SamplingOption, parts: Components, seeds: Sequence[int]) -> Tensor:
    """(B, C, T', H', W'); fp32, and steps then are, or fp64 for an fp64 model.

    Every clip is drawn from its own seed, or all together from the first one, in the precision of the model, as the
    published sampler does.
    """
    assert opt.height is not None and opt.width is not None
    autoencoder, published = parts.autoencoder, opt.noise == "published"
    _, rows, columns = latent_grid(opt.num_frames, opt.height, opt.width, autoencoder)
    draws = [(seeds[0], len(seeds))] if published else [(seed, 1) for seed in seeds]
    drawn = [
        get_noise(
            count,
            rows * autoencoder.stride[1],
            columns * autoencoder.stride[2],
            opt.num_frames,
            seed=seed,
            channels=autoencoder.channels,
            stride=autoencoder.stride,
            causal=autoencoder.causal,
            latents=latents_made(opt.num_frames, autoencoder),
            patch_size=1 if parts.layout.denoising.pads else parts.layout.denoising.patch[1],
            device=parts.device,
            dtype=next(parts.model.parameters()).dtype if published else clip_precision(parts),
            published=published,
        )
        for seed, count in draws
    ]
    return torch.cat(drawn).to(clip_precision(parts))
