"""What a run looks at while it trains: the loss on held-out clips, and clips of fixed prompts.

Both are of the moving average, where there is one, in the layout of the training. Training goes on as if nothing had
been: weights, average, modes of modules and all draws are as they were. A round is an event ``validated`` in
metrics.jsonl, written when it is complete: one that was broken off is made again when the run is resumed.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from acceleration.sharding import fsdp
from opensora.assembly.components import Components
from opensora.config.run import RunConfig, SampleConfig
from opensora.datasets.decode import api
from opensora.inference.batches import sample_jobs
from opensora.inference.check import check_jobs, check_validation
from opensora.inference.find import Source
from opensora.inference.memory import job_of
from opensora.inference.prompts import Job, read_jobs
from opensora.inference.references import count_frames
from opensora.planner.sampling_forecast import SamplingJob
from opensora.train.run import Run
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.metrics_log import Clip


def is_due(run: Run) -> bool:
    """Whether a round belongs to the updates made so far."""
    every = run.cfg.validate.every
    return bool(every and run.step and run.step % every == 0)


def catch_up(run: Run) -> None:
    """Make the round of the step that the run was resumed at, if it was broken off. Collective."""
    if is_due(run) and not run.checkpoints.from_main(run.metrics.was_validated(run.step)):
        validate(run)


def validate(run: Run) -> None:
    """One round, unless a stop is asked for meanwhile. Collective."""
    run.enter("validate")
    values: dict[str, Any] | None = {}
    files: list[str] = []
    with run.metrics.excluded("validate", run.mesh), _watched(run):
        if run.held_out is not None:
            values = run.held_out.round(run.engine.model, lambda: _stops(run))
        if values is not None and run.prompts and _can_be_read(run):
            files = sample_prompts(run)
        if values is None:
            return
    run.enter("validate")
    run.metrics.log_validation(run.step, values, _clips(run, files))
    shown = f"loss {values['validate/loss']:.4f}" if "validate/loss" in values else ""
    made = f"sampled {files[-1]}" if files else ""
    announce(f"step {run.step}: validation: {', '.join(filter(None, (shown, made))) or 'done'}")


@contextmanager
def _watched(run: Run) -> Iterator[None]:
    """The model as it is to be looked at: averaged, and not in training mode."""
    model = run.engine.model
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with run.engine.averaged() if run.cfg.validate.use_ema else nullcontext(False):
            yield
            fsdp.release(model)
    finally:
        for module in trained:
            module.training = True


def _stops(run: Run) -> bool:
    """Before a micro-batch: whether a stop was asked for. Collective."""
    stop = run.stop.agreed()
    run.enter("validate")
    return stop


def announce_weights(cfg: RunConfig) -> None:
    """Say so where the moving average cannot be looked at."""
    validate, engine = cfg.validate, cfg.parallel.engine
    if validate.every and validate.use_ema and cfg.optim.ema_decay and engine != "native":
        announce(
            f"validate.use_ema=true: parallel.engine={engine} cannot compute with the moving average; validation is of "
            "the live weights"
        )


def sample_job(cfg: RunConfig, step: int = 0) -> SampleConfig:
    """The prompts of a round as a sampling job."""
    validate = cfg.validate
    return SampleConfig(
        weights=str(cfg.folder),
        prompts=validate.prompts,
        prompt_csv=validate.prompt_csv,
        cond_type=validate.cond_type,
        ref=validate.ref,
        sampling=validate.sampling,
        save_dir=str(cfg.folder / "samples" / f"step-{step:08d}"),
        overwrite=True,  # a run that was resumed makes the samples of a step again
    )


def read_prompts(cfg: RunConfig) -> list[Job]:
    """The clips of a round, read once: a table that changes under a run does not change its clips.

    Raises:
        UserError: they cannot be read, with the key.
    """
    if not (cfg.validate.every and cfg.validate.makes_clips):
        return []
    with _named():
        return read_jobs(sample_job(cfg))


@contextmanager
def _named() -> Iterator[None]:
    """Keys of a sampling job in messages are those of the run's section."""
    try:
        yield
    except UserError as error:
        raise UserError(f"validate.{error}") from None


def _can_be_read(run: Run) -> bool:
    """Whether the references are still there; training goes on without clips where they are not. Collective."""
    problem = None
    if run.runtime.is_main:
        try:
            check_references(run.cfg, run.prompts)
        except UserError as error:
            problem = str(error)
    problem = run.checkpoints.from_main(problem)
    if problem is not None:
        announce(f"step {run.step}: no clips are sampled: {problem}")
    return problem is None


def check_references(cfg: RunConfig, jobs: Sequence[Job]) -> None:
    """That references are files that can be read, and are what their kind takes.

    Raises:
        UserError: the first that is not.
    """
    with _named():
        check_jobs(sample_job(cfg), _source(cfg), jobs)


def _source(cfg: RunConfig) -> Source:
    """What is sampled from."""
    return Source(
        path=cfg.folder,
        checkpoint=None,
        adapters=None,
        model=cfg.model,
        vae=cfg.vae,
        text=cfg.text,
        image_encoder=cfg.image_encoder,
        objective=cfg.objective,
        conditioning=cfg.conditioning,
        prompt_suffix=cfg.data.prompt_suffix,
    )


def planned_clips(cfg: RunConfig) -> SamplingJob | None:
    """The clips of a round, as the planner wants them, in the layout of the run; None: no prompts.

    Raises:
        UserError: prompts that cannot be read, or a size that cannot be made.
    """
    jobs = read_prompts(cfg)
    if not jobs:
        return None
    job = replace(sample_job(cfg), batch_size=together(cfg, jobs), vae_parallel=cfg.train.vae_parallel)
    with _named():
        return replace(job_of(job, _source(cfg), jobs), parallel=cfg.parallel)


def together(cfg: RunConfig, jobs: Sequence[Job]) -> int:
    """How many clips are denoised together."""
    return min(cfg.validate.batch_size or len(jobs), len(jobs))


def check_prompts(cfg: RunConfig, world_size: int) -> None:
    """That prompts, references and sizes of the clips can be sampled by this model on this machine.

    Raises:
        UserError: the key, and what would work.
    """
    if jobs := read_prompts(cfg):
        check_references(cfg, jobs)
        check_validation(cfg, world_size, together(cfg, jobs))


def sample_prompts(run: Run) -> list[str]:
    """Write samples/step-XXXXXXXX/ with a clip per prompt and a contact sheet; the files, on the main process.
    Collective."""
    encoders = run.prepare.encoders
    assert encoders.autoencoder is not None
    job, jobs = sample_job(run.cfg, run.step), run.prompts
    announce(f"step {run.step}: sampling {len(jobs)} clip{'s' * (len(jobs) > 1)}")
    parts = Components(
        model=run.engine.model,
        cfg=run.cfg.model,
        autoencoder=encoders.autoencoder,
        text_encoder=encoders.text_encoder,
        image_encoder=encoders.image_encoder,
        layout=run.prepare.layout,
        objective=run.cfg.objective,
        mesh=run.mesh,
        device=run.runtime.device,
        prompt_suffix=run.cfg.data.prompt_suffix,
        run_tiles=encoders.run_tiles,
    )
    run.enter("sample")
    job = replace(job, batch_size=together(run.cfg, jobs))
    return sample_jobs(parts, job, jobs, quiet=not sys.stderr.isatty())


def _clips(run: Run, files: list[str]) -> dict[str, Clip]:
    """By name, what the copies of the records show; nothing where nobody looks."""
    if not run.metrics.shows_clips:
        return {}
    found = {}
    for path in map(Path, files[:-1]):  # the last one is the contact sheet
        frames = api.read_frames(str(path), 0, count_frames(str(path)))
        prompt = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        found[path.stem] = Clip(path, frames, run.cfg.validate.sampling.fps, prompt)
    return found
