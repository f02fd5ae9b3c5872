"""A whole sampling job, as the command makes it: check, start, prompts, stills if there are any, clips, files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from acceleration.accounting import host_traffic
from acceleration.distributed import launcher_variables
from acceleration.distributed import mesh as meshes
from acceleration.distributed import runtime as runtimes
from acceleration.distributed.placement import host_names
from opensora.assembly.components import Components
from opensora.assembly.layout import check_attention, check_guidance, check_layout
from opensora.config.run import SampleConfig
from opensora.inference.check import check_sample
from opensora.inference.find import Source, find_source
from opensora.inference.pipeline import fit, kind_of, prepare_models, process_and_save
from opensora.inference.prompts import Job, read_jobs
from opensora.inference.refine import check_refine, refined
from opensora.inference.save import output_folder, unused_names
from opensora.inference.stills import check_stills, clips_of, make_stills
from opensora.utils.console import announce
from opensora.utils.files.user_files import try_output
from opensora.utils.prompt_suffix import published_suffix, with_suffix


def names_motion(cfg: SampleConfig, source: Source) -> bool:
    """Whether prompts end with words about frame rate and motion."""
    return source.prompt_suffix if cfg.prompt_suffix is None else cfg.prompt_suffix


def with_suffixes(
    cfg: SampleConfig, jobs: Sequence[Job], parts: Components, source: Source, motions: Mapping[int, int]
) -> tuple[list[Job], Components]:
    """Prompts with their words about frame rate and motion, where these are not what training's configuration says.

    Those of training, or for weights that come without a configuration those of the published sampler.

    Args:
        motions: scores by the number of the prompt, where each has its own.
    """
    wanted = names_motion(cfg, source)
    if not wanted or (source.conditioning is not None and not motions):
        return list(jobs), replace(parts, prompt_suffix=wanted)
    fps = cfg.sampling.fps if cfg.sampling.num_frames > 1 else None
    stated = None if cfg.sampling.motion_score == "dynamic" else cfg.sampling.motion_score
    rule = published_suffix if source.conditioning is None else with_suffix
    told = [replace(job, text=rule(job.text, fps, motions.get(job.row, stated))) for job in jobs]
    return told, replace(parts, prompt_suffix=False)


def sample(cfg: SampleConfig) -> list[str]:
    """The whole job: check, join the process group, load, sample, write, leave.

    Raises:
        UserError: what the user can mend, before the process group exists where possible.
    """
    jobs, source = read_jobs(cfg), find_source(cfg)
    world_size = launcher_variables.ranks_from_environment().world_size
    check_layout(cfg.parallel.mesh, world_size, source.model)
    check_attention(cfg.parallel.attention)
    references = kind_of(cfg, jobs) != "t2v" or cfg.still is not None
    check_guidance(cfg.parallel.mesh, world_size, cfg.sampling, references=references)
    check_sample(cfg, source, jobs, world_size)
    check_stills(cfg, source, jobs, world_size)
    check_refine(cfg, tells_motion=names_motion(cfg, source))
    try_output(output_folder(cfg), "save_dir", folder=True)
    parallel = cfg.parallel
    runtime = runtimes.start(parallel.timeout_s, mesh=parallel.mesh, interface=parallel.interface)
    jobs, motions = refined(clips_of(cfg), jobs)
    if cfg.still:
        jobs = make_stills(cfg, unused_names(cfg, jobs), runtime)
    cfg = clips_of(cfg)
    jobs, parts = with_suffixes(cfg, jobs, prepare_models(cfg, source, runtime), source, motions)
    fit(cfg.sampling, parts)
    announce(f"{len(jobs)} samples on {runtime.world_size} processes, {runtime.device.type}")
    if len(set(hosts := host_names(runtime.peers))) > 1:
        launched = [peer.rank for peer in runtime.peers]
        announce(host_traffic.summary(meshes.resolve(parallel.mesh, runtime.world_size), hosts, launched, {}))
    files = process_and_save(parts, cfg, jobs)
    runtimes.stop()
    return files
