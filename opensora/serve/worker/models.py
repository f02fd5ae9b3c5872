"""The models of a group under their names: checked before the process group exists, loaded by all processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch

from acceleration.distributed.runtime import Runtime
from acceleration.sharding.adapter_swap import AdapterFile, AdapterSwap
from opensora.assembly.components import Components
from opensora.assembly.initial_weights import AdapterSource
from opensora.assembly.layout import check_guidance, check_kernels, check_layout
from opensora.assembly.turns import TEXT
from opensora.config.load import load_config
from opensora.config.run import SampleConfig
from opensora.config.schema import build, plain
from opensora.inference.check import check_jobs, check_models, check_option
from opensora.inference.find import Source, find_source, read_adapters
from opensora.inference.load import load_components, text_of, verify_export
from opensora.inference.pipeline import Sampler, build_sampler
from opensora.inference.prompts import Job as Clip
from opensora.inference.references import SEPARATOR
from opensora.inference.watermark import Watermark, read_watermark
from opensora.models.families import describe
from opensora.sampling.guidance import passes_per_step
from opensora.sampling.options import SamplingOption
from opensora.serve.config import ServeConfig, ServedModel
from opensora.serve.jobs import Job
from opensora.serve.store import Store
from opensora.utils.errors import UserError

Shape: TypeAlias = tuple[Any, ...]  # all that the kernels of a clip may depend on
FIRST_KIND = "i2v_head"  # what a reference is where nothing is said


@dataclass(kw_only=True)
class Prepared:
    """A model before it is loaded."""

    name: str
    cfg: SampleConfig
    source: Source
    served: ServedModel
    loras: Mapping[str, AdapterFile]

    def option(self, job: Job) -> SamplingOption:
        """What a request chooses, and the model's own choice of all else.

        Raises:
            UserError: a field that is none, or a value that it cannot have.
        """
        option: SamplingOption = build(SamplingOption, {**plain(self.cfg.sampling), **job.request["sampling"]})
        return option

    def fps(self, job: Job) -> float:
        """Of its file."""
        return self.option(job).fps if self.cfg.save_fps is None else self.cfg.save_fps

    def kind(self, job: Job) -> str:
        """What the references of a job give, as the command has it."""
        return str(job.request.get("cond_type") or FIRST_KIND) if job.references else "t2v"

    def three_passes(self, kind: str) -> bool:
        """Whether a step of a clip with references of this kind is guided by these, too."""
        return describe(self.source.model).three_passes(kind != "t2v")

    def neg(self, job: Job) -> str:
        return str(job.request.get("neg") or self.cfg.neg)


@dataclass(kw_only=True)
class Model(Prepared):
    """A model at work."""

    parts: Components
    world_size: int
    batches: dict[tuple[Shape, int], bool] = field(default_factory=dict)  # (shape, clips) -> may be made together

    @cached_property
    def sampler(self) -> Sampler:
        return build_sampler(self.parts)

    @cached_property
    def watermark(self) -> Watermark | None:
        return read_watermark(self.cfg.watermark)

    @cached_property
    def adapters(self) -> AdapterSwap:
        on_host = self.cfg.offload == "blocks"
        return AdapterSwap(self.parts.model, torch.device("cpu") if on_host else self.parts.device)

    def use_lora(self, name: str | None) -> None:
        """The weights are those of ``lora=FILE`` of the command, to the bit.

        Raises:
            UserError: no such file is configured.
        """
        if name is not None and name not in self.loras:
            raise UserError(f"lora={name}: must be one of {', '.join(self.loras) or 'none, as none is configured'}")
        if name != self.adapters.now and self.parts.turns is not None and self.cfg.offload != "none":
            self.parts.turns.take(TEXT)  # the denoiser's weights are then where they stay
        self.adapters.use(name, self.loras[name] if name is not None else None)

    def shape(self, job: Job) -> Shape:
        """Equal for clips of which one may stand for the others where bits are compared."""
        option, kind = self.option(job), self.kind(job)
        passes = passes_per_step(option, references=self.three_passes(kind))
        size = (option.width, option.height, option.num_frames)
        return (*size, kind, passes, option.noise, option.cache, option.solver, option.method, option.use_flaw_fix)

    def check(self, jobs: list[Job], references: list[list[str]]) -> None:
        """All that the command would refuse.

        Raises:
            UserError.
        """
        option, kind = self.option(jobs[0]), self.kind(jobs[0])
        check_guidance(self.cfg.parallel.mesh, self.world_size, option, references=self.three_passes(kind))
        check_option("sampling", option, self.cfg, self.source, samples=len(jobs), world_size=self.world_size)
        chosen: dict[str, Any] = {"sampling": option, "cond_type": kind}
        cfg = replace(self.cfg, **chosen)
        check_jobs(cfg, self.source, [self._clip(job, ref) for job, ref in zip(jobs, references, strict=True)])

    def _clip(self, job: Job, ref: list[str]) -> Clip:
        called: dict[str, Any] = {"name": job.id, "wanted": job.id, "row": 0, "number": None, "copy": None, "seed": 0}
        return Clip(text=job.prompt, neg=self.neg(job), ref=SEPARATOR.join(ref), **called)


def prepare(cfg: ServeConfig, world_size: int) -> list[Prepared]:
    """All that can be refused before a process group exists.

    Raises:
        UserError: the model's name, and the key of its configuration.
    """
    if SEPARATOR in cfg.out:
        raise UserError(f"out={cfg.out}: must have no {SEPARATOR!r} in it, which stands between references")
    first = next(iter(cfg.models))
    found = []
    for name, served in cfg.models.items():
        given = replace(served, weights=cfg.weights) if cfg.weights and name == first else served
        try:
            found.append(_prepared(name, given, cfg, world_size))
        except UserError as error:
            raise UserError(f"models.{name}: {error}") from None
    return found


def sample_config(served: ServedModel, out: str) -> SampleConfig:
    """The configuration for sampling of a served model; prompts come with requests.

    Raises:
        UserError: it has what a service does not do.
    """
    words = [f"{key}={_text(value)}" for key, value in served.options.items()]
    if served.weights is not None:
        words.append(f"weights={served.weights}")
    cfg = load_config(SampleConfig, served.sample, words)
    for key, given in (("still", cfg.still is not None), ("loop", cfg.goes_on), ("lora", cfg.lora is not None)):
        if given:
            instead = "name it in loras" if key == "lora" else "a request makes one clip"
            raise UserError(f"{served.sample}: {key}: must be left out for a service; {instead}")
    return replace(cfg, save_dir=str(Path(out) / "videos"), prompt=None, prompts=(), prompt_csv=None, ref=None)


def _text(value: Any) -> str:
    """A value as it would be typed."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _prepared(name: str, served: ServedModel, cfg: ServeConfig, world_size: int) -> Prepared:
    sample = sample_config(served, cfg.out)
    source = find_source(sample)
    check_layout(sample.parallel.mesh, world_size, source.model)
    check_kernels(sample.parallel)
    check_guidance(sample.parallel.mesh, world_size, sample.sampling, references=False)
    check_models(sample, source)
    check_option("sampling", sample.sampling, sample, source, samples=1, world_size=world_size)
    read_watermark(sample.watermark)
    return Prepared(name=name, cfg=sample, source=source, served=served, loras=_loras(served, sample, source))


def _loras(served: ServedModel, cfg: SampleConfig, source: Source) -> dict[str, AdapterFile]:
    if served.loras and source.adapters is not None:
        raise UserError(f"loras: must be empty, as {cfg.weights} holds adapters already")
    if served.loras and source.low_noise is not None:
        raise UserError("loras: must be empty with low_noise; merge them into the weights of the experts")
    if served.loras and cfg.offload == "blocks":
        raise UserError("loras: must be empty with offload=blocks; use offload=models")
    found = {}
    for name, path in served.loras.items():
        exported = read_adapters(Path(path), source.model, f"loras.{name}").exported
        assert exported is not None
        found[name] = AdapterFile(
            sizes=exported.sizes(),
            values=AdapterSource(exported),
            scale=cfg.lora_scale,
            differences=exported.differences,
        )
    return found


def load(prepared: list[Prepared], runtime: Runtime) -> dict[str, Model]:
    """Models on the devices, the text encoder once for all that read the same. Collective.

    Raises:
        UserError: weights that do not fit, or are not those that were exported.
    """
    models: dict[str, Model] = {}
    for one in prepared:
        verify_export(*(Path(path) for path in one.served.loras.values()))
        before = next(iter(models.values()), None)
        text = text_of(before.parts, before.source) if before else None
        parts = load_components(one.cfg, one.source, runtime, text, name=f"{one.name} " if before else "")
        models[one.name] = Model(**vars(one), parts=parts, world_size=runtime.world_size)
    return models


def paths(store: Store, jobs: list[Job]) -> list[list[str]]:
    """The files of the references of every job."""
    return [[str(store.reference(name)) for name in job.references] for job in jobs]
