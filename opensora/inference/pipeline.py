"""From prompts to videos. ``prepare_models`` loads, ``prepare_api`` gives a function, ``process_and_save`` writes.

The tokens of a sample are cut over ring x ulysses once before the first step and joined once after the last; in
between every process integrates its own share. The passes of guidance are shared out over cfg and their velocities
exchanged in every step; the tiles of the autoencoder over all processes of the sample. What is drawn depends on the
seed alone, so any number of processes gives the same video.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count

import torch
from torch import Tensor

from acceleration.accounting import host_traffic
from acceleration.distributed import launcher_variables
from acceleration.distributed import mesh as meshes
from acceleration.distributed import runtime as runtimes
from acceleration.distributed.placement import host_names
from acceleration.distributed.runtime import Runtime
from acceleration.distributed.tasks import DistributedRunner
from opensora.assembly.components import Components
from opensora.assembly.layout import check_attention, check_guidance, check_layout
from opensora.assembly.step_caches import step_cache
from opensora.assembly.token_layout import TokenLayout, forward_arguments
from opensora.config.run import SampleConfig
from opensora.inference.check import check_sample, solver_of
from opensora.inference.find import Source, find_source
from opensora.inference.load import load_components
from opensora.inference.prompts import Job, final_prompt, read_jobs
from opensora.inference.save import Saver, output_folder, unused_names
from opensora.models.base import latent_grid
from opensora.models.conditions import Conditions, TokenBatch
from opensora.sampling.caches import OnDecision
from opensora.sampling.guidance import build_guidance, passes_per_step
from opensora.sampling.loop import Predict, denoise
from opensora.sampling.noise import get_noise
from opensora.sampling.options import SamplingOption, sanitize_sampling_option
from opensora.schedulers import build_solver
from opensora.schedulers.base import SolverOptions
from opensora.utils.console import announce, progress
from opensora.utils.errors import UserError
from opensora.utils.files.user_files import try_output
from opensora.utils.rng import torch_generator
from opensora.utils.tokens import Grid

Api = Callable[..., Tensor]
OnStep = Callable[[int, int], None]


def prepare_models(cfg: SampleConfig, source: Source, runtime: Runtime) -> Components:
    """The sharded model, the autoencoder and the text encoder on this process's device. Collective."""
    return load_components(cfg, source, runtime)


def prepare(
    parts: Components, texts: Sequence[str], x: Tensor, opt: SamplingOption, *, null: bool = False
) -> Conditions:
    """What the model is told of one prompt per sample, this process's share of it.

    Args:
        x: the tokens of the samples, whole.
        opt: with width and height.
        null: these are no prompts, or what to move away from: a model with a null embedding of its own takes that for
            empty ones.
    """
    text, denoising = parts.text_encoder.encode(list(texts)), parts.layout.denoising
    dropped = None
    if denoising.null_text == "learned":
        dropped = torch.tensor([null and not prompt for prompt in texts], device=parts.device)
    numbers = {"fps": torch.tensor([opt.fps]), "size": torch.tensor([[opt.height, opt.width]], dtype=torch.float32)}
    conditions = Conditions(
        text=text.txt,
        text_mask=text.mask,
        pooled=text.y_vec if denoising.pooled_dim else None,
        dropped=dropped,
        **{
            name: x.repeat_interleave(len(texts), 0).to(parts.device)
            for name, x in numbers.items()
            if name in denoising.wants
        },
    )
    return parts.layout.shard_conditions(conditions, x)


def prepare_api(parts: Components, on_decision: OnDecision = lambda decision: None) -> Api:
    """A function from prompts to pixels over loaded components.

    Args:
        on_decision: told what this process's step cache, if there is one, decides.
    """
    run_passes = DistributedRunner(parts.mesh["cfg"])

    @torch.no_grad()
    def api(
        opt: SamplingOption,
        cond_type: str = "t2v",
        seed: int | Sequence[int] | None = None,
        text: Sequence[str] = ("",),
        neg: Sequence[str] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Sample one clip per prompt. Collective over all processes.

        Args:
            opt: size, length, steps and guidance; sizes are rounded up to what the model can make.
            cond_type: "t2v", from text alone.
            seed: of the noise, one for all clips or one each; None: ``opt.seed``. A clip's noise depends on its seed
                alone, whatever else is in the batch.
            text: prompts, one per clip.
            neg: what to move away from, one per clip; None: the empty prompt.
            on_step: called with (steps done, steps in all).

        Returns:
            Pixels (B, 3, T, H, W) in [-1, 1], on every process.

        Raises:
            UserError: a size, length or condition that cannot be sampled.
        """
        if cond_type != "t2v":
            raise UserError(f"cond_type={cond_type}: must be t2v")
        opt = fit(opt, parts)
        assert opt.height is not None and opt.width is not None
        layout = parts.layout
        grid = layout.denoising.grid(latent_grid(opt.num_frames, opt.height, opt.width, parts.autoencoder))
        seeds = _seeds(opt.seed if seed is None else seed, len(text))
        x = layout.patchify(_noise(opt, parts, seeds))  # (B, N, C) or (B, T, S, C)
        positions = layout.shard(layout.positions(grid, len(text), parts.device))
        options = SolverOptions(opt.num_steps, opt.shift, opt.flow_shift)
        solver = build_solver(solver_of("sampling", opt, parts.objective), parts.objective, options, grid)
        prompts = [final_prompt(t, opt, suffix=parts.prompt_suffix) for t in text]
        cache = step_cache(opt.cache, parts.model, parts.mesh, on_decision)
        with cache.during(parts.model):
            tokens = denoise(
                _predict(parts, positions),
                layout.shard(x),
                solver,
                build_guidance(
                    opt,
                    references=False,
                    steps=len(solver.times) - 1,
                    latent_frames=grid.latent_frames,
                    positions=positions,
                ),
                prepare(parts, prompts, x, opt),
                prepare(parts, neg or [""] * len(text), x, opt, null=True) if passes_per_step(opt) > 1 else None,
                outputs=layout.denoising.outputs,
                noise=_step_noise(layout, grid, seeds, x),
                progress=on_step,
                run=run_passes,
                watch=cache.watch,
            )
        latents = layout.unpatchify(layout.gather(tokens, grid), grid)  # (B, C, T', H', W')
        return parts.autoencoder.decode(latents, parts.run_tiles)[:, :, : opt.num_frames]

    return api


def fit(opt: SamplingOption, parts: Components) -> SamplingOption:
    """The option with a size that these components can make.

    Raises:
        UserError: a number of frames that the autoencoder cannot code.
    """
    stride, causal = parts.autoencoder.stride, parts.autoencoder.causal
    multiple = parts.layout.denoising.pixel_multiple(stride)
    return sanitize_sampling_option(opt, multiple=multiple, frame_stride=stride[0], causal=causal)


def process_and_save(parts: Components, cfg: SampleConfig, jobs: Sequence[Job], *, quiet: bool = False) -> list[str]:
    """Sample every job and write it; data-parallel groups of processes share the jobs. Collective.

    Names that files in the output folder have already are replaced by free ones, see ``unused_names``.

    Args:
        quiet: draw no progress bar.

    Returns:
        The files written by all processes together, in the order of their names, on the main process.

    Raises:
        UserError: the output folder cannot be written, before anything is sampled.
    """
    jobs = unused_names(cfg, jobs)
    reused = Counter[bool]()
    api = prepare_api(parts, lambda decision: reused.update((decision.computed,)))
    saver = Saver(cfg, parts)
    batches = [jobs[i : i + cfg.batch_size] for i in range(0, len(jobs), cfg.batch_size)]
    degree, rank = parts.mesh.data_degree, parts.mesh.data_rank
    rounds = -(-len(batches) // degree)
    bar = progress(rounds * cfg.sampling.num_steps, every_s=5.0) if saver.is_main and not quiet else None
    for turn in range(rounds):
        index = turn * degree + rank
        # Sharded weights are gathered by all processes: one without a batch left repeats the last, unsaved.
        batch = batches[min(index, len(batches) - 1)]

        def on_step(done: int, total: int, turn: int = turn) -> None:
            if bar is not None:
                bar.update_to(turn * total + done)

        pixels = api(
            cfg.sampling,
            seed=[job.seed for job in batch],
            text=[job.text for job in batch],
            neg=[job.neg for job in batch],
            on_step=on_step,
        )
        if index < len(batches):
            saver.save(batch, pixels)
    if bar is not None:
        bar.close()
    if decided := reused.total():
        announce(f"sampling.cache.kind={cfg.sampling.cache.kind}: reused {reused[False]} of {decided} times")
    if parts.turns is not None:
        announce(parts.turns.summary())
    return saver.finish()


def sample(cfg: SampleConfig) -> list[str]:
    """The whole job: check, join the process group, load, sample, write, leave.

    Raises:
        UserError: what the user can mend, before the process group exists where possible.
    """
    jobs, source = read_jobs(cfg), find_source(cfg)
    world_size = launcher_variables.ranks_from_environment().world_size
    check_layout(cfg.parallel.mesh, world_size, source.model)
    check_attention(cfg.parallel.attention)
    check_guidance(cfg.parallel.mesh, world_size, cfg.sampling)
    check_sample(cfg, source, len(jobs), world_size)
    try_output(output_folder(cfg), "save_dir", folder=True)
    parallel = cfg.parallel
    runtime = runtimes.start(parallel.timeout_s, mesh=parallel.mesh, interface=parallel.interface)
    parts = prepare_models(cfg, source, runtime)
    fit(cfg.sampling, parts)
    announce(f"{len(jobs)} samples on {runtime.world_size} processes, {runtime.device.type}")
    if len(set(hosts := host_names(runtime.peers))) > 1:
        launched = [peer.rank for peer in runtime.peers]
        announce(host_traffic.summary(meshes.resolve(parallel.mesh, runtime.world_size), hosts, launched, {}))
    files = process_and_save(parts, cfg, jobs)
    runtimes.stop()
    return files


def _predict(parts: Components, positions: Tensor) -> Predict:
    """The model on this process's tokens, which are at ``positions``."""

    def predict(x: Tensor, t: Tensor, known: Conditions) -> Tensor:
        tokens = TokenBatch(x=x, positions=positions)
        return parts.model(**forward_arguments(parts.cfg, tokens, t, known))

    return predict


def _step_noise(layout: TokenLayout, grid: Grid, seeds: Sequence[int], x: Tensor) -> Callable[[], Tensor]:
    """Normal values for a solver that draws some: this process's part of those that each clip's seed gives a step."""
    calls = count()
    shape = (layout.denoising.latent_channels, *grid.latents)

    def draw() -> Tensor:
        call = next(calls)
        drawn = [torch.randn(shape, generator=torch_generator(seed, "solver noise", call)) for seed in seeds]
        return layout.shard(layout.patchify(torch.stack(drawn)).to(x))

    return draw


def _seeds(seed: int | Sequence[int], clips: int) -> Sequence[int]:
    return [seed] * clips if isinstance(seed, int) else seed


def _noise(opt: SamplingOption, parts: Components, seeds: Sequence[int]) -> Tensor:
    """(B, C, T', H', W'), every clip drawn from its own seed; fp32, and steps then are, or fp64 for an fp64 model."""
    assert opt.height is not None and opt.width is not None
    autoencoder, dtype = parts.autoencoder, next(parts.model.parameters()).dtype
    return torch.cat(
        [
            get_noise(
                1,
                opt.height,
                opt.width,
                opt.num_frames,
                seed=one,
                channels=autoencoder.channels,
                stride=autoencoder.stride,
                causal=autoencoder.causal,
                patch_size=parts.layout.denoising.patch[1],
                device=parts.device,
                dtype=torch.promote_types(dtype, torch.float32),
            )
            for one in seeds
        ]
    )
