"""A whole sampling job, as the command makes it: check, start, prompts, stills if there are any, clips, files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from acceleration.accounting import host_traffic
from acceleration.distributed import launcher_variables
from acceleration.distributed import mesh as meshes
from acceleration.distributed import runtime as runtimes
from acceleration.distributed.placement import host_names
from opensora.assembly.components import Components
from opensora.assembly.layout import check_guidance, check_kernels, check_layout
from opensora.config.run import SampleConfig
from opensora.inference.batches import kind_of, sample_jobs
from opensora.inference.check import check_sample
from opensora.inference.find import find_source, names_motion
from opensora.inference.load import load_components
from opensora.inference.opensora_1x.check import scored
from opensora.inference.pipeline import fit
from opensora.inference.prompts import Job, final_prompt, read_jobs
from opensora.inference.refine import check_refine, refined
from opensora.inference.save import output_folder, unused_names
from opensora.inference.stills import check_stills, clips_of, make_stills
from opensora.models.families import describe
from opensora.utils.console import announce
from opensora.utils.files.user_files import try_output


def with_motions(
    cfg: SampleConfig, jobs: Sequence[Job], parts: Components, motions: Mapping[int, int]
) -> tuple[list[Job], Components]:
    """Prompts with their words about frame rate and motion, where they have scores of their own.

    Args:
        motions: scores by the number of the prompt.
    """
    if not motions or not parts.prompt_suffix:
        return list(jobs), parts
    rule: dict[str, Any] = {"suffix": True, "published": parts.published_prompts}
    told = [
        replace(job, text=final_prompt(job.text, cfg.sampling, motion=motions.get(job.row), **rule)) for job in jobs
    ]
    return told, replace(parts, prompt_suffix=False)


def sample(cfg: SampleConfig) -> list[str]:
    """The whole job: check, join the process group, load, sample, write, leave.

    Raises:
        UserError: what the user can mend, before the process group exists where possible.
    """
    jobs, source = read_jobs(cfg), find_source(cfg)
    world_size = launcher_variables.ranks_from_environment().world_size
    check_layout(cfg.parallel.mesh, world_size, source.model)
    check_kernels(cfg.parallel)
    references = describe(source.model).three_passes(kind_of(cfg, jobs) != "t2v" or cfg.still is not None)
    check_guidance(cfg.parallel.mesh, world_size, cfg.sampling, references=references)
    check_sample(cfg, source, jobs, world_size)
    check_stills(cfg, source, jobs, world_size)
    check_refine(cfg, tells_motion=names_motion(cfg, source))
    for folder in (Path(cfg.save_dir), output_folder(cfg)):
        try_output(folder, "save_dir", folder=True)
    parallel = cfg.parallel
    runtime = runtimes.start(parallel.timeout_s, mesh=parallel.mesh, interface=parallel.interface)
    jobs, motions = refined(clips_of(cfg), jobs)
    jobs = scored(cfg, source, jobs)
    text = None
    if cfg.still:
        jobs, text = make_stills(cfg, unused_names(cfg, jobs), runtime)
    cfg = clips_of(cfg)
    jobs, parts = with_motions(cfg, jobs, load_components(cfg, source, runtime, text), motions)
    fit(cfg.sampling, parts)
    announce(f"{len(jobs)} samples on {runtime.world_size} processes, {runtime.device.type}")
    if len(set(hosts := host_names(runtime.peers))) > 1:
        launched = [peer.rank for peer in runtime.peers]
        announce(host_traffic.summary(meshes.resolve(parallel.mesh, runtime.world_size), hosts, launched, {}))
    files = sample_jobs(parts, cfg, jobs)
    runtimes.stop()
    return files
