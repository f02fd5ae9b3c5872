"""What can be known of references, strategies and clips that go on from one another before anything is loaded."""

from collections.abc import Sequence
from dataclasses import replace

from opensora.conditioning.placed_frames import KINDS_1_3, Placement, apply_mask_strategy, parse_mask_strategy
from opensora.config.opensora_1x import Release
from opensora.config.run import SampleConfig
from opensora.inference.find import Source
from opensora.inference.opensora_1x.prompts import for_each_part, with_scores
from opensora.inference.opensora_1x.references import check_reference, latent_length
from opensora.inference.opensora_1x.sizes import clip_latents, joins_latents, piece_length
from opensora.inference.prompts import Job, told_of
from opensora.inference.references import count_frames, split
from opensora.models.base import AutoencoderShape
from opensora.models.families import describe
from opensora.models.text import num_classes
from opensora.models.vae import autoencoder_shape
from opensora.schedulers.iddpm import IDDPMConfig
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.schedulers.rectified_flow_v1 import RectifiedFlowV1Config
from opensora.utils.errors import UserError

NO_EDITS = ("dpm_solver",)  # solvers that keep no frames


def release_of(cfg: SampleConfig, source: Source) -> Release:
    """Whose sentences about scores prompts end with: as the job says, or by what the model was trained with."""
    if cfg.release is not None:
        return cfg.release
    objective = source.objective
    if isinstance(objective, RectifiedFlowV1Config):
        return objective.version
    return "1.1" if isinstance(objective, IDDPMConfig) else "1.2"


def scored(cfg: SampleConfig, source: Source, jobs: Sequence[Job]) -> list[Job]:
    """Jobs whose prompts, or all parts of them, end with sentences about scores and camera.

    Raises:
        UserError: a score that the release does not write, or prompts that are numbers.
    """
    told = {name: getattr(cfg, name) for name in ("aes", "flow", "camera_motion")}
    given = [name for name, value in told.items() if value is not None]
    release = release_of(cfg, source)
    if given and num_classes(source.text):
        raise UserError(f"{given[0]}: must be null with text.kind=classes, which reads numbers")
    if given and release in ("1.0", "1.1"):
        raise UserError(f"{given[0]}: release={release} adds no scores to prompts; must be null, or set release")
    if not given:
        return list(jobs)

    def finished(part: str) -> str:
        return with_scores(part, release, **told)

    try:
        texts = [for_each_part(job.text, finished) if cfg.goes_on else finished(job.text) for job in jobs]
    except ValueError as error:
        raise UserError(f"{' or '.join(given)}: {error}") from None
    return [replace(job, text=text) for job, text in zip(jobs, texts, strict=True)]


def check_placed(cfg: SampleConfig, source: Source, jobs: Sequence[Job], solver: str) -> None:
    """That the model takes the frames that it is to be given, that they are there, and that clips can go on.

    Args:
        solver: that will be used.

    Raises:
        UserError: the key to change, or the prompt that is at fault.
    """
    denoising, shape = describe(source.model), autoencoder_shape(source.vae)
    scored(cfg, source, jobs)
    latents = clip_latents(cfg, denoising, shape)
    _check_still(cfg)
    _check_loop(cfg, shape, latents, denoising.references)
    places = any(job.strategy for job in jobs)
    if not (places or cfg.loop > 1 or cfg.cond_type != "t2v" or any(job.ref for job in jobs)):
        return
    _check_model(cfg, source, denoising.references, places, solver)
    beside = denoising.references == "channels"
    if beside and cfg.cond_type != "t2v" and not any(job.ref for job in jobs):
        raise UserError(
            f"cond_type={cfg.cond_type}: needs references; give reference_path, or a table with a column ref"
        )
    counts: dict[str, int] = {}
    for job in jobs:
        with told_of(job):
            for path in split(job.ref):
                if path not in counts:
                    counts[path] = count_frames(path)
                    check_reference(path, counts[path])
            lengths = [latent_length(counts[path], shape) for path in split(job.ref)]
            if beside:
                _check_kind(cfg, job, lengths)
            else:
                _check_strategy(cfg, job, latents, lengths)


def _check_still(cfg: SampleConfig) -> None:
    if cfg.still is not None:
        raise UserError(
            "still: must be null with release, loop, reference_path or mask_strategy; make the stills first"
        )
    if cfg.ref is not None and cfg.reference_path:
        raise UserError("ref: reference_path has the references of every prompt; keep one of them")


def _check_loop(cfg: SampleConfig, shape: AutoencoderShape, latents: int, references: str) -> None:
    if cfg.loop == 1:
        return
    length = cfg.condition_frame_length
    if cfg.sampling.num_frames == 1:
        raise UserError(f"loop={cfg.loop}: must be 1 with sampling.num_frames=1; only clips go on from one another")
    if length >= latents:
        raise UserError(
            f"condition_frame_length={length}: must be below {latents}, the latent frames of a clip of "
            f"sampling.num_frames={cfg.sampling.num_frames}"
        )
    piece = piece_length(shape)
    if not joins_latents(cfg.release, references) and length % piece:
        raise UserError(
            f"condition_frame_length={length}: must be a multiple of {piece}, the latent frames that the autoencoder "
            "decodes together, as clips are joined where these end"
        )


def _check_model(cfg: SampleConfig, source: Source, references: str, places: bool, solver: str) -> None:
    key = "mask_strategy" if places else "cond_type" if cfg.cond_type != "t2v" else "loop" if cfg.loop > 1 else "ref"
    kind, objective = source.model.kind, source.objective
    if references == "none":
        raise UserError(f"{key}: model.kind={kind} takes no frames that are given; leave it out, or give other weights")
    if references == "clip" or isinstance(objective, RectifiedFlowConfig):
        raise UserError(
            f"{key}: with release, loop, reference_path or mask_strategy is for models of Open-Sora 1.x; use ref and "
            f"cond_type alone with model.kind={kind}"
        )
    if references == "channels":
        if not isinstance(objective, RectifiedFlowV1Config) or objective.version != "1.3":
            raise UserError(
                f"{key}: with release, loop, reference_path or mask_strategy is for models of Open-Sora 1.x; use ref "
                f"and cond_type alone with model.kind={kind}"
            )
        if places:
            raise UserError("mask_strategy: the model reads references beside the noise; use cond_type=i2v_head")
        if cfg.cond_type not in KINDS_1_3:
            raise UserError(f"cond_type={cfg.cond_type}: must be one of {', '.join(KINDS_1_3)} with release or loop")
        return
    if cfg.cond_type != "t2v":
        raise UserError(
            f"cond_type={cfg.cond_type}: model.kind={kind} takes given frames in the place of noise; must be t2v, and "
            'mask_strategy="0" gives the first frame'
        )
    if solver in NO_EDITS:
        raise UserError(f"{key}: sampling.solver={solver} keeps no given frames; use ddpm or ddim")


def _check_kind(cfg: SampleConfig, job: Job, lengths: Sequence[int]) -> None:
    """1.3: at most one reference for each end."""
    if cfg.cond_type == "t2v" and lengths:
        raise UserError("ref: cond_type=t2v takes none; set cond_type=i2v_head, or another")
    most = 2 if cfg.cond_type in ("i2v_loop", "i2v_tail") else 1
    if len(lengths) > most:
        raise UserError(f"ref: {len(lengths)} references for a prompt, cond_type={cfg.cond_type} takes at most {most}")


def _check_strategy(cfg: SampleConfig, job: Job, latents: int, lengths: Sequence[int]) -> None:
    """That every tuple finds its clip, its reference, and room."""
    if lengths and not job.strategy:
        raise UserError(f'ref={job.ref}: mask_strategy is missing, which says where it goes; "0" is the first frame')
    try:
        placements = parse_mask_strategy(job.strategy)
        beyond = next((placed for placed in placements if placed.clip >= cfg.loop), None)
        if beyond is not None:
            raise ValueError(f"clip={beyond.clip}: there {_clips(cfg.loop)}, counted from 0 (loop)")
        there = list(lengths)
        for clip in range(cfg.loop):
            told: Sequence[Placement] = placements
            apply_mask_strategy(told, latents, there, clip, cfg.align, shortens=cfg.release != "1.1")
            there.append(latents)
    except ValueError as error:
        raise UserError(f"mask_strategy={job.strategy!r:.80}: {error}") from None


def _clips(count: int) -> str:
    return "is 1 clip" if count == 1 else f"are {count} clips"
