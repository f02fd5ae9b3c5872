"""Text to image to video: a model of stills makes the first frame of every clip, then leaves the device to another.

All stills of a job are made before the model of clips is loaded, so that a device holds one of them at a time.
"""

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from acceleration.config import MeshConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.runtime import Runtime
from opensora.assembly.layout import check_layout
from opensora.assembly.turns import AUTOENCODER, DENOISER
from opensora.config.run import SampleConfig, StillConfig
from opensora.datasets.buckets.aspect import training_sizes
from opensora.inference.batches import share_out
from opensora.inference.check import check_sample
from opensora.inference.find import Source, find_source
from opensora.inference.lengths import coded, latents_made
from opensora.inference.load import LoadedText, load_components, text_of
from opensora.inference.pipeline import build_api
from opensora.inference.prompts import Job
from opensora.inference.references import check_length, check_references
from opensora.inference.save import output_folder, to_uint8
from opensora.models.families import describe
from opensora.models.vae import autoencoder_shape
from opensora.sampling.cache_config import NoCache
from opensora.sampling.options import SamplingOption
from opensora.utils import signal_handler
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files.user_files import written_whole
from opensora.utils.files.video_writer import write_image
from opensora.utils.sizes import RATIOS

KIND: Literal["i2v_head"] = "i2v_head"  # of what a still gives its clip
FOLDER = "generated_condition"  # beside the clips


def clips_of(cfg: SampleConfig) -> SampleConfig:
    """The job of the clips, which have references once the stills are made."""
    return replace(cfg, cond_type=KIND) if cfg.still else cfg


def check_stills(cfg: SampleConfig, source: Source, jobs: Sequence[Job], world_size: int) -> None:
    """That stills can be made, and clips go on from them.

    Raises:
        UserError: the key to change.
    """
    if cfg.still is None:
        return
    if cfg.cond_type != "t2v" or any(job.ref for job in jobs):
        raise UserError("still: makes the reference of every clip itself; take cond_type and ref out, or still")
    if cfg.sampling.num_frames == 1:
        raise UserError("sampling.num_frames=1: must be 2 or more with still, which makes the first frame of clips")
    check_references(source.model, source.objective, KIND)
    shape = autoencoder_shape(source.vae)
    made = coded(cfg.sampling, describe(source.model), shape, KIND)
    check_length(KIND, latents_made(made, shape), cfg.sampling.num_frames, shape)
    with _told_as_stills(cfg.still):
        job, found = still_job(cfg, world_size)
        check_layout(job.parallel.mesh, world_size, found.model)
        check_sample(job, found, jobs, world_size)


@contextmanager
def _told_as_stills(still: StillConfig) -> Iterator[None]:
    """Errors of keys of the section ``still`` begin with its name; the text encoder may be that of clips."""
    given = [field.name for field in fields(still) if field.name != "text" or still.text is not None]
    try:
        yield
    except UserError as error:
        named = any(re.match(rf"{name}[.=:]", str(error)) for name in given)
        raise (UserError(f"still.{error}") if named else error) from None


def make_stills(cfg: SampleConfig, jobs: Sequence[Job], runtime: Runtime) -> tuple[list[Job], LoadedText]:
    """The jobs with a still of their prompt as reference, in ``generated_condition`` of the output folder; and the text
    encoder, which the model of clips may read as well. Collective.

    Names of the jobs must be final. A still of the same name is replaced.
    """
    job, source = still_job(cfg, runtime.world_size)
    folder = output_folder(cfg) / FOLDER
    parts = load_components(job, source, runtime)
    announce(f"{len(jobs)} stills of {job.sampling.width}x{job.sampling.height} for the first frames")
    api = build_api(parts)
    for batch, is_ours in share_out(parts, job, jobs):
        pixels = api(job.sampling, seed=[one.seed for one in batch], text=[one.text for one in batch])
        if is_ours and parts.mesh.is_first_of_sample:
            for one, still in zip(batch, to_uint8(pixels), strict=True):
                _write(folder / f"{one.name}.png", still[0])
    text = text_of(parts, source)
    text.turns.forget(DENOISER, AUTOENCODER)
    del parts, api
    gc.collect()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    dist.barrier()
    return [replace(one, ref=str(folder / f"{one.name}.png")) for one in jobs], text


def still_size(resolution: str, aspect_ratio: str, multiple: int) -> tuple[int, int]:
    """(height, width) from the table of training: what the model of stills has seen.

    Raises:
        ValueError: not a resolution or ratio of the table.
    """
    transposed = ":".join(reversed(aspect_ratio.split(":")))
    if aspect_ratio in RATIOS and transposed in RATIOS:  # each has the other's, as in sampling
        ((width, height),) = training_sizes(f"{resolution}_ar{transposed}", multiple)
        return height, width
    return training_sizes(f"{resolution}_ar{aspect_ratio}", multiple)[0]


def still_job(
    cfg: SampleConfig, world_size: int, find: Callable[[SampleConfig], Source] = find_source
) -> tuple[SampleConfig, Source]:
    """The job that makes the stills: prompts as they are, the same steps, seeds and shift.

    ``find``: what says what the weights are of.
    """
    still = cfg.still
    assert still is not None
    job = replace(
        cfg,
        weights=still.weights,
        model=still.model,
        vae=still.vae,
        text=still.text or cfg.text,
        image_encoder=None,
        objective=None,
        lora=None,
        still=None,
        low_noise=None,
        prompt_suffix=False,
        parallel=replace(cfg.parallel, mesh=_one_pass(cfg.parallel.mesh, world_size)),
    )
    source = replace(find(job), prompt_suffix=False)
    denoising = describe(source.model)
    multiple = denoising.pixel_multiple(autoencoder_shape(source.vae).stride)
    try:
        height, width = still_size(still.resolution, cfg.sampling.aspect_ratio, multiple)
    except ValueError as error:
        raise UserError(f"still.resolution={still.resolution}: {error}") from None
    option: SamplingOption = replace(
        cfg.sampling,
        height=height,
        width=width,
        num_frames=1,
        guidance=still.guidance,
        guidance_low=None,
        method="distill" if "guidance" in denoising.wants else "i2v",
        text_osci=False,
        solver=None,
        cache=NoCache(),  # which was chosen for the model of clips
    )
    return replace(job, sampling=option), source


def _one_pass(mesh: MeshConfig, world_size: int) -> MeshConfig:
    """The layout without processes for passes of guidance: they share out the weights."""
    if mesh.cfg == 1:
        return mesh
    degrees: dict[str, Any] = dict(meshes.resolve(mesh, world_size))
    degrees["shard"] *= degrees["cfg"]
    return replace(mesh, **(degrees | {"cfg": 1}))


def _write(path: Path, picture: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with signal_handler.writing(), written_whole(path, replace=True) as aside:
        partial(write_image, aside)(picture.numpy())
