"""A worker group of a service inside a test: its configuration, jobs in its queue, and processes that work until there
are none left. ``run_distributed(work, world, config, hook)`` is a group; hooks are what breaks in it."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from opensora.serve.config import ServeConfig
from opensora.serve.jobs import FINISHED, Job, JobQueue, NewJob
from opensora.serve.queues import open_queue
from opensora.serve.store import Store

SAMPLE = """
weights: opensora/pretrained/shapes
precision: {precision}
sampling: {{width: 32, height: 24, num_frames: 5, num_steps: 3, guidance: 2.0, guidance_img: 1.0, fps: 8}}
parallel: {{zero: 3, timeout_s: 60, mesh: {mesh}}}
"""
SERVE = """
models:
  shapes: {{sample: {sample}, max_frames: 9, sizes: [32x24], loras: {loras}}}
out: {out}
workers:
  {{batch_size: {batch_size}, exact: {exact}, batch_wait_s: 0.1, lease_s: {lease_s}, grace_s: {grace_s}, attempts: 3}}
"""
PROMPT = "a red circle moves left on a gray background"
DEFAULTS = {"width": 32, "height": 24, "num_frames": 5}
Hook = Callable[[], None]


def configured(
    folder: Path,
    *,
    precision: str = "fp64",
    mesh: str = "{shard: 1, ulysses: -1}",
    loras: Mapping[str, Path] | None = None,
    batch_size: int = 1,
    exact: bool = True,
    lease_s: float = 60.0,
    grace_s: float = 60.0,
) -> Path:
    """The configuration of a service whose folder is ``folder/out``, with that of the command beside it."""
    sample = folder / "sample.yaml"
    sample.write_text(SAMPLE.format(precision=precision, mesh=mesh))
    listed = "{" + ", ".join(f"{name}: {path}" for name, path in (loras or {}).items()) + "}"
    path = folder / "serve.yaml"
    terms = {"batch_size": batch_size, "exact": str(exact).lower(), "lease_s": lease_s, "grace_s": grace_s}
    path.write_text(SERVE.format(sample=sample, out=folder / "out", loras=listed, **terms))
    return path


def queue_of(config: Path) -> tuple[JobQueue, Store]:
    cfg = ServeConfig(out=str(config.parent / "out"))
    store = Store(cfg.out)
    return open_queue(cfg, store), store


def asked(number: int, *, prompt: str = PROMPT, references: tuple[str, ...] = (), **request: Any) -> NewJob:
    """Job ``number``; other words than sampling's fields: lora, cond_type, neg."""
    others = {name: request.pop(name) for name in ("lora", "cond_type", "neg") if name in request}
    sampling = DEFAULTS | {"seed": number} | request
    alike = {name: value for name, value in sampling.items() if name != "seed"}
    return NewJob(
        id=f"video_{number:032x}",
        owner="",
        model="shapes",
        prompt=prompt,
        request={"sampling": sampling, **others},
        references=references,
        steps=sampling.get("num_steps", 3),
        batch_key=repr((sorted(alike.items()), sorted(others.items()))),
    )


def add(config: Path, *jobs: NewJob) -> None:
    queue, _ = queue_of(config)
    for job in jobs:
        queue.add(job, time.time(), most=10_000, most_of_owner=10_000)
    queue.close()


def jobs_in(config: Path) -> dict[int, Job]:
    """By the number that they were asked with."""
    queue, _ = queue_of(config)
    found, _ = queue.page("", limit=1000, after=None, order="asc")
    queue.close()
    return {int(job.id.removeprefix("video_"), 16): job for job in found}


def work(config: Path, hook: Hook | None = None, before: str | None = None) -> int:
    """What a process of a group does, until no job waits or runs. Called on every process.

    Args:
        hook: called first.
        before: the group before this one, as a supervisor numbers them: "name-0" is followed by "name-1".

    Returns:
        The exit code.
    """
    from opensora.serve.supervisor import GROUP
    from opensora.serve.worker import group

    if before is not None:
        base, _, number = before.rpartition("-")
        os.environ[GROUP] = f"{base}-{int(number) + 1}"
    group.when_asked = lambda cfg: _when_idle(config)
    if hook is not None:
        hook()
    return group.main([str(config)])


def _when_idle(config: Path) -> Callable[[], float | None]:
    looked = [0.0]

    def stopped() -> float | None:
        if not dist.is_initialized() or dist.get_rank() or time.monotonic() - looked[0] < 0.3:
            return None
        looked[0] = time.monotonic()
        queue, _ = queue_of(config)
        left = [state for (_, state), count in queue.counts().items() if count and state not in FINISHED]
        queue.close()
        return None if left else time.monotonic()

    return stopped


def named_group(name: str) -> Hook:
    """A hook: the group is called so, as a supervisor calls its first one."""

    def name_it() -> None:
        from opensora.serve.supervisor import GROUP

        os.environ[GROUP] = name

    return name_it


def command(config: Path, folder: Path, job: NewJob, references: list[str], lora: Path | None = None) -> bytes:
    """The file that the sampling command writes for a job. Called on every process, in a group of its own."""
    from opensora.config.load import load_config
    from opensora.config.run import SampleConfig
    from opensora.inference.job import sample

    words = [f"sampling.{name}={value}" for name, value in job.request["sampling"].items()]
    words += [
        f"save_dir={folder}",
        f"cond_type={job.request.get('cond_type', 't2v')}",
        f"neg={job.request.get('neg', '')}",
    ]
    words += [f"ref={';'.join(references)}"] if references else []
    words += [f"lora={lora}"] if lora else []
    cfg = load_config(SampleConfig, config.parent / "sample.yaml", [*words, f"prompt={job.prompt}"])
    files = sample(cfg)
    return b"".join(Path(file).read_bytes() for file in files if "contact_sheet" not in file)
