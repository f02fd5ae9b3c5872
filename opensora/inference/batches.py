"""The clips of a job in batches: shared out over groups of processes, sampled and written."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from torch import Tensor

from opensora.assembly.components import Components
from opensora.config.run import SampleConfig
from opensora.inference.opensora_1x.clips import LongClips
from opensora.inference.pipeline import OnStep, build_api, build_sampler
from opensora.inference.prompts import Job
from opensora.inference.save import Saver, unused_names
from opensora.sampling.caches import OnDecision
from opensora.utils.console import announce, progress

Maker: TypeAlias = Callable[[Sequence[Job], OnStep], Tensor]


def sample_jobs(parts: Components, cfg: SampleConfig, jobs: Sequence[Job], *, quiet: bool = False) -> list[str]:
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
    make = _maker(parts, cfg, jobs, lambda decision: reused.update((decision.computed,)))
    saver = Saver(cfg, parts)
    shares = list(share_out(parts, cfg, jobs))
    steps = len(shares) * cfg.loop * cfg.sampling.num_steps
    bar = progress(steps, every_s=5.0) if saver.is_main and not quiet else None
    for turn, (batch, is_ours) in enumerate(shares):

        def on_step(done: int, total: int, turn: int = turn) -> None:
            if bar is not None and done:
                bar.update_to(turn * total + done)

        pixels = make(batch, on_step)
        if is_ours:
            saver.save(batch, pixels)
    if bar is not None:
        bar.close()
    if decided := reused.total():
        announce(f"sampling.cache.kind={cfg.sampling.cache.kind}: reused {reused[False]} of {decided} times")
    if parts.turns is not None:
        announce(parts.turns.summary())
    return saver.finish()


def _maker(parts: Components, cfg: SampleConfig, jobs: Sequence[Job], on_decision: OnDecision) -> Maker:
    """What makes the clips of a batch of ``jobs``."""
    if cfg.goes_on:
        return LongClips(parts, cfg, build_sampler(parts, on_decision), any(job.ref for job in jobs))
    api, cond_type = build_api(parts, on_decision), kind_of(cfg, jobs)

    def make(batch: Sequence[Job], on_step: OnStep) -> Tensor:
        return api(
            cfg.sampling,
            cond_type,
            seed=[job.seed for job in batch],
            text=[job.text for job in batch],
            neg=[job.neg for job in batch],
            ref=[job.ref for job in batch],
            on_step=on_step,
        )

    return make


def share_out(parts: Components, cfg: SampleConfig, jobs: Sequence[Job]) -> Iterator[tuple[Sequence[Job], bool]]:
    """This process's batches, and whether it keeps what it makes of them: as many on every process.

    Sharded weights are gathered by all: one without a batch left repeats the last, and keeps nothing.
    """
    batches = [jobs[i : i + cfg.batch_size] for i in range(0, len(jobs), cfg.batch_size)]
    degree, rank = parts.mesh.data_degree, parts.mesh.data_rank
    for index in range(rank, -(-len(batches) // degree) * degree, degree):
        yield batches[min(index, len(batches) - 1)], index < len(batches)


def kind_of(cfg: SampleConfig, jobs: Sequence[Job]) -> str:
    """What the references of a whole job give; t2v, which takes a pass less, where no clip has any."""
    return cfg.cond_type if any(job.ref for job in jobs) else "t2v"
