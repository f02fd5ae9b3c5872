"""The family's Python interface, for scripts: load models, make pixels from prompts, write them.

    model, model_ae, model_t5, model_clip, optional_models = prepare_models(cfg, device, dtype)
    api_fn = prepare_api(model, model_ae, model_t5, model_clip, optional_models)
    x = api_fn(option, cond_type="t2v", text=["a red kite over the sea"])
    process_and_save(x, {"text": ["a red kite over the sea"]}, cfg, "video_256px", option)

These are the models, the checks, the function and the files of the sampling command. Every process that the launcher
started runs the same script.
"""

import atexit
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acceleration.config import ParallelConfig
from acceleration.distributed import launcher_variables
from acceleration.distributed import mesh as meshes
from acceleration.distributed import runtime as runtimes
from acceleration.distributed.runtime import Runtime
from acceleration.sharding.precision import DTYPES
from opensora.assembly.components import Components
from opensora.assembly.layout import check_guidance, check_kernels, check_layout
from opensora.config.load import load_config
from opensora.config.run import SampleConfig
from opensora.inference import pipeline
from opensora.inference.check import check_models, check_option
from opensora.inference.find import Source, find_source, prompt_suffix
from opensora.inference.load import load_components, text_of
from opensora.inference.prompts import Job, jobs_of_batch, with_names
from opensora.inference.save import Author, Saver, to_uint8, unused_names
from opensora.inference.scripts.batch import asked_of, check_sizes, seeds_of
from opensora.inference.scripts.given_models import TextPart, components_of, text_encoder_of
from opensora.inference.stills import still_job
from opensora.models.base import Autoencoder
from opensora.models.families import describe
from opensora.sampling.options import SamplingOption
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import short
from opensora.utils.tokens import image_ids, pack

PRECISIONS: tuple[Literal["bf16", "fp32", "fp64"], ...] = ("bf16", "fp32", "fp64")
PATCH_SIZE, CHANNEL = 2, 16  # of a model that does not say, as the family's


@dataclass(frozen=True)
class Loaded:
    """A model of ``prepare_models``, and what it was loaded from."""

    parts: Components
    cfg: SampleConfig
    source: Source


class OptionalModels(dict[str, Any]):
    """``img_flux`` and ``img_flux_ae`` of text to image to video; and where each model comes from."""

    def __init__(self) -> None:
        super().__init__()
        self._loaded: list[Loaded] = []

    def remember(self, loaded: Loaded) -> None:
        self._loaded.append(loaded)

    def origin(self, model: Any) -> Loaded | None:
        """None: the model is the script's own."""
        return next((one for one in self._loaded if one.parts.model is model), None)

    def has_text(self, encoder: Any) -> bool:
        """Whether a text encoder is one of those that came with the models."""
        return any(one.parts.text_encoder is encoder for one in self._loaded)


class Models(NamedTuple):
    """What ``prepare_models`` gives."""

    model: nn.Module
    model_ae: Autoencoder
    model_t5: TextPart
    model_clip: TextPart
    optional_models: OptionalModels


def prepare_models(
    cfg: SampleConfig | Mapping[str, Any] | str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    offload_model: bool = False,
) -> Models:
    """The models of a sampling configuration, on this process's device. Collective: joins the process group.

    Args:
        cfg: a configuration, its file, or a dict or OmegaConf configuration of what would be in it. With ``still``
            its model and autoencoder come as img_flux and img_flux_ae.
        device: must be what processes here work on, a GPU each where there is one; None: that.
        dtype: of weights, as ``cfg.precision``; None: that.
        offload_model: the models take turns on the GPU, as with ``offload=models``.

    Raises:
        UserError: files that are missing or do not fit, or a layout that does not fit the processes.
    """
    cfg = _configuration(cfg, dtype, offload_model)
    source, world = find_source(cfg), launcher_variables.ranks_from_environment().world_size
    check_layout(cfg.parallel.mesh, world, source.model)
    check_kernels(cfg.parallel)
    check_models(cfg, source)
    still = still_job(cfg, world) if cfg.still else None
    if still:
        check_models(*still)
    _check_device(device)
    runtime = join(cfg.parallel)
    models, text = OptionalModels(), None
    if still:
        parts = load_components(*still, runtime, name="still ")
        text = text_of(parts, still[1])
        models.update(img_flux=parts.model, img_flux_ae=parts.autoencoder)
        models.remember(Loaded(parts, *still))
    parts = load_components(cfg, source, runtime, text)
    models.remember(Loaded(parts, cfg, source))
    t5, clip = TextPart(parts.text_encoder, "txt"), TextPart(parts.text_encoder, "y_vec")
    return Models(parts.model, parts.autoencoder, t5, clip, models)


def prepare_api(
    model: Any,
    model_ae: Any,
    model_t5: Any,
    model_clip: Any,
    optional_models: Mapping[str, Any] | None = None,
) -> Callable[..., Tensor]:
    """``api_fn`` over models of ``prepare_models``, or over a script's own that are called by the family's names."""
    origin = optional_models.origin(model) if isinstance(optional_models, OptionalModels) else None
    if isinstance(model_t5, TextPart) and not isinstance(optional_models, OptionalModels):
        raise UserError("optional_models: must be the last of what prepare_models gave, which knows how it was loaded")
    text_encoder = text_encoder_of(model_t5, model_clip)
    if origin and isinstance(optional_models, OptionalModels) and optional_models.has_text(text_encoder):
        text_encoder = origin.parts.text_encoder  # of stills, which may have another one than clips
    its_patch, its_channels = _sizes(origin.parts.cfg if origin else getattr(model, "cfg", None))

    def api_fn(
        option: SamplingOption,
        cond_type: str = "t2v",
        seed: int | Sequence[int] | None = None,
        patch_size: int = its_patch,
        channel: int = its_channels,
        **batch: Any,
    ) -> Tensor:
        """Pixels (B, 3, T, H, W) in [-1, 1] of one clip per prompt, on every process. Collective.

        Args:
            option: size, length, steps and guidance; need not be sanitized.
            cond_type: what the references give: t2v, i2v_head, i2v_tail, i2v_loop, v2v_head and others.
            seed: for all clips, or one each; None: that of ``option``.
            patch_size, channel: of the model; there to be compared with it. ``channel`` may also be that of a token,
                ``in_channels``.
            batch: ``text``, a prompt per clip; ``ref``, files as "a.png;b.mp4", or frames (3, T, H, W), per clip;
                ``neg``, negative prompts. Names for files are passed over.

        Raises:
            UserError: whatever of these does not fit.
        """
        check_sizes(patch_size, channel, its_patch, its_channels, knows=origin is not None or hasattr(model, "cfg"))
        asked = asked_of(batch)
        seeds = seeds_of(option.seed if seed is None else seed, len(asked["text"]))
        if origin:
            option = _checked_option(option, origin, len(asked["text"]), cond_type)
            parts = replace(origin.parts, autoencoder=model_ae, text_encoder=text_encoder)
        else:
            own = text_encoder, option.guidance
            parts = components_of(model, model_ae, *own, patch_size=patch_size, channel=channel)
        return pipeline.build_api(parts)(option, cond_type, seeds, **asked)

    return api_fn


def prepare(
    t5: Callable[..., Tensor],
    clip: Callable[..., Tensor],
    img: Tensor,
    prompt: str | Sequence[str],
    seq_align: int = 1,
    patch_size: int = 2,
) -> dict[str, Tensor]:
    """img, img_ids, txt, txt_ids and y_vec of a model's forward, from latents (B, C, T', H', W') and prompts.

    Latents of fewer clips than there are prompts are repeated, as for the passes of guidance. ``seq_align``: as
    ``TextPart``.
    """
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not texts or len(texts) % len(img):
        raise ValueError(f"prompt: {len(texts)} prompts for {len(img)} clips; must be a multiple")
    tokens = (img.shape[3] // patch_size) * (img.shape[4] // patch_size) * img.shape[2]
    txt = (
        t5(texts, added_tokens=tokens, seq_align=seq_align) if isinstance(t5, TextPart) or seq_align > 1 else t5(texts)
    )
    return prepare_ids(img.repeat(len(texts) // len(img), 1, 1, 1, 1), txt, clip(texts), patch_size=patch_size)


def prepare_ids(img: Tensor, t5_embedding: Tensor, clip_embedding: Tensor, *, patch_size: int = 2) -> dict[str, Tensor]:
    """As ``prepare``, from features that are there: (B, L, D) of T5 and (B, V) of CLIP."""
    grid = (img.shape[2], img.shape[3], img.shape[4])
    ids = image_ids(grid, patch_size, img.device).expand(len(img), -1, -1)
    return {
        "img": pack(img, patch_size),
        "img_ids": ids.to(img),
        "txt": t5_embedding.to(img),
        "txt_ids": torch.zeros(*t5_embedding.shape[:2], 3, device=img.device, dtype=img.dtype),
        "y_vec": clip_embedding.to(img),
    }


def process_and_save(
    x: Tensor,
    batch: Mapping[str, Any],
    cfg: SampleConfig | Mapping[str, Any] | str | Path,
    sub_dir: str,
    option: SamplingOption,
    epoch: int = 0,
    start_index: int = 0,
    saving: bool = True,
) -> list[str]:
    """Write one video or still per clip, and its prompt beside it. Collective; of processes that made the same clips
    one writes.

    Args:
        x: (B, 3, T, H, W) in [-1, 1].
        batch: that of ``api_fn``; ``name`` and ``index`` say what files are called, else prompt_0000 and so on.
        cfg: save_dir, save_prefix, prompt_as_path, overwrite, crf and watermark are read.
        sub_dir: folder inside save_dir.
        epoch: which of several clips of the same prompts this is: ``_1`` for the second.
        start_index: number of the first prompt, where the batch has no ``index``.
        saving: False: nothing is written.

    Returns:
        The files written by all processes, on the main process.

    Raises:
        UserError: a batch that does not fit, or a folder that cannot be written.
    """
    cfg = replace(_configuration(cfg), sampling=option)
    asked = asked_of(batch, for_files=True)
    if x.ndim != 5 or x.shape[1] != 3 or len(x) != len(asked["text"]):
        wanted = f"(B, 3, T, H, W) with B={len(asked['text'])}, a clip for every prompt"
        raise UserError(f"x: has shape {tuple(x.shape)}, must be {wanted}")
    if not saving:
        return []
    jobs = jobs_of_batch(cfg, asked, len(x), copy=epoch, start_index=start_index)
    runtime = join(cfg.parallel)
    suffix, published = prompt_suffix(cfg)
    degrees = meshes.resolve(cfg.parallel.mesh, runtime.world_size)
    author = Author(mesh=meshes.view(degrees, runtime.rank), prompt_suffix=suffix, published_prompts=published)
    folder = Path(cfg.save_dir) / sub_dir
    jobs = _names(cfg, jobs, x, author, folder)
    saver = Saver(cfg, author, folder)
    if jobs:
        saver.save(jobs, x)
    return saver.finish(sheet=False)


def join(parallel: ParallelConfig) -> Runtime:
    """The process group of this script, joined by the first call, and left when the script ends."""
    if not dist.is_initialized():
        atexit.register(_leave)
        return runtimes.start(parallel.timeout_s, mesh=parallel.mesh, interface=parallel.interface)
    local = launcher_variables.ranks_from_environment().local_rank
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return Runtime(dist.get_rank(), dist.get_world_size(), local, device)


def _leave() -> None:
    """Together with the others, unless this process ends because of an error."""
    if dist.is_initialized() and not hasattr(sys, "last_value"):
        runtimes.stop()


def _names(cfg: SampleConfig, jobs: list[Job], x: Tensor, author: Author, folder: Path) -> list[Job]:
    """This process's jobs under names of their own; none, where another one has made the same clips and writes them."""
    made = hashlib.sha256(to_uint8(x).numpy().tobytes()).hexdigest()
    mine = (jobs, made) if author.mesh.is_first_of_sample else None
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    writers = [rank for rank, one in enumerate(everyone) if one is not None and one not in everyone[:rank]]
    every = [job for rank in writers for job in everyone[rank][0]]
    named = unused_names(cfg, with_names([replace(job, row=row) for row, job in enumerate(every)]), folder)
    rank = dist.get_rank()
    if rank not in writers:
        return []
    first = sum(len(everyone[other][0]) for other in writers if other < rank)
    return named[first : first + len(jobs)]


def _configuration(
    cfg: SampleConfig | Mapping[str, Any] | str | Path, dtype: torch.dtype | str | None = None, offload: bool = False
) -> SampleConfig:
    found = cfg if isinstance(cfg, SampleConfig) else load_config(SampleConfig, cfg)
    if dtype is not None:
        precision = next((name for name in PRECISIONS if dtype in (name, DTYPES[name])), None)
        if precision is None:
            raise UserError(f"dtype={short(str(dtype), 40)}: must be torch.bfloat16, torch.float32 or torch.float64")
        found = replace(found, precision=precision)
    return replace(found, offload="models") if offload and found.offload == "none" else found


def _check_device(device: torch.device | str | None) -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if device is None or torch.device(device).type == kind:
        return
    hint = "hide the GPUs by CUDA_VISIBLE_DEVICES=" if kind == "cuda" else "this machine shows no GPU"
    raise UserError(f"device={device}: processes here work on {kind}; {hint}")


def _sizes(cfg: Any) -> tuple[int, int]:
    """(patch_size, channel) of a model; the family's where it does not say."""
    if cfg is None:
        return PATCH_SIZE, CHANNEL
    denoising = describe(cfg)
    return denoising.patch[1], denoising.latent_channels


def _checked_option(option: SamplingOption, origin: Loaded, clips: int, cond_type: str) -> SamplingOption:
    """As the command checks ``sampling``."""
    references = describe(origin.source.model).three_passes(cond_type != "t2v")
    mesh, world = origin.cfg.parallel.mesh, origin.parts.mesh.world_size
    check_guidance(mesh, world, option, references=references)
    return check_option("option", option, origin.cfg, origin.source, samples=clips, world_size=world)
