"""What a path to sample from holds: a run, an export or a file, and adapters beside them; nothing is built yet."""

import dataclasses
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from acceleration.checkpoint import newest
from acceleration.checkpoint.atomic_dir import MANIFEST
from acceleration.checkpoint.listing import candidates
from acceleration.config import LoraConfig
from opensora.assembly.adapter_files import fitted_adapters
from opensora.assembly.initial_weights import check_weights
from opensora.conditioning import ConditioningConfig
from opensora.config.load import load_config
from opensora.config.other_models import LowNoiseConfig
from opensora.config.run import SAVED_NAME, RunConfig, SampleConfig
from opensora.config.schema import shown
from opensora.models.base import ModelConfig
from opensora.models.families import family_of, read_hub_config
from opensora.models.image import NoImageEncoder
from opensora.models.text.placement import PLACEMENT
from opensora.models.vae import WORK
from opensora.models.weights.adapter_fit import FittedAdapter
from opensora.models.weights.adapters import is_adapter
from opensora.schedulers import OBJECTIVE_CONFIGS, ObjectiveConfig, build_objective
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files import digests
from opensora.utils.files.published_files import how_to_fetch
from opensora.utils.files.safetensors_files import fingerprint
from opensora.utils.files.user_files import absence

# Keys of autoencoders and text encoders that say where they are and in which pieces they work, not what they give.
OF_WORK = frozenset((*PLACEMENT, *WORK))


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """What is added to the weights: exported adapters, or those of a LoRA run's checkpoint."""

    lora: LoraConfig | None  # of a run; None: as ``exported`` says
    exported: FittedAdapter | None
    checkpoint: Path | None  # a step directory, where ``exported`` is None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Weights on disk, and what they are weights of."""

    path: Path
    checkpoint: Path | None  # a step directory of a run; None: safetensors at ``path``
    adapters: Adapters | None
    model: ModelConfig
    vae: Any
    text: Any
    image_encoder: Any = field(default_factory=NoImageEncoder)
    objective: ObjectiveConfig  # that it was trained with
    conditioning: ConditioningConfig | None  # likewise; None: nothing says so
    prompt_suffix: bool  # training told the model frame rate and motion score
    low_noise: "LowNoise | None" = None  # a second expert

    @property
    def time_range(self) -> tuple[float, float]:
        """The times that the model was trained at, in parts of the latest."""
        return getattr(build_objective(self.objective), "time_range", (0.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class LowNoise:
    """The expert for low noise."""

    source: Source
    boundary: float


def find_source(cfg: SampleConfig) -> Source:
    """What ``cfg.weights`` holds; sections that ``cfg`` gives replace those saved with the weights.

    A LoRA run and its export hold adapters: the weights are then those they were trained beside.

    Raises:
        UserError: nothing there, a run without a complete checkpoint, weights that come without a configuration, or
            adapters that do not fit them.
    """
    path = Path(cfg.weights)
    if reason := absence(path):
        give = f"give a run folder, an export folder or a safetensors file{how_to_fetch(path)}"
        raise UserError(f"weights={path}: {reason}; {give}")
    kind, run = part_of_run(path)
    if run is not None and not candidates(path / "checkpoints"):
        raise UserError(f"weights={path}: is {kind}; give the run's folder, weights={run}, whose newest one is read")
    of_lora = part_of_run(Path(cfg.lora)) if cfg.lora else ("", None)
    if of_lora[1] is not None:
        raise UserError(
            f"lora={cfg.lora}: is {of_lora[0]}; give lora={of_lora[1] / 'exported'}, or weights={of_lora[1]}"
        )
    saved = saved_config(path if path.is_dir() else path.parent)
    sections: dict[str, Any] = {
        name: getattr(cfg, name) or (getattr(saved, name) if saved else None) for name in ("model", "vae", "text")
    }
    picture = cfg.image_encoder or (saved.image_encoder if saved else None) or NoImageEncoder()
    sections["model"] = sections["model"] or read_hub_config(path if path.is_dir() else path.parent)
    for name, value in sections.items():
        if value is None:
            if path.is_dir() and not any(path.glob("*.safetensors*")) and _newest(path) is None:
                raise UserError(f"weights={path}: no weights there; give a run folder, an export or a safetensors file")
            raise UserError(f"{name}: missing; {path} has no {SAVED_NAME} beside the weights, so say {name}.kind=...")
    checkpoint = _newest(path)
    if saved and cfg.model:
        _check_as_trained(cfg.model, saved.model, path, is_file=checkpoint is None)
    objective = _objective(cfg, saved) or default_objective(sections["model"])
    held = _held_adapters(path, checkpoint, saved, sections["model"])
    adapters = read_adapters(Path(cfg.lora), sections["model"], "lora") if cfg.lora else None
    if held:
        if adapters:
            raise UserError(f"lora={cfg.lora}: {path} holds adapters already; give the weights that they belong to")
        adapters, base = held
        if base is None or absence(base):
            raise UserError(
                f"weights={path}: its adapters belong to {base}, which is not there; give weights= and lora="
            )
        path, checkpoint = Path(base), None
    if adapters and adapters.exported and checkpoint is None:
        exported = adapters.exported.adapter
        wanted = exported.metadata.get("base")
        if wanted and wanted != fingerprint(path):
            announce(f"{path}: not the weights that the adapters of {exported.path} were trained beside")
    if checkpoint is None:
        check_weights("weights", path, sections["model"])  # what does not fit is said before anything is built
        digests.read_digests(path if path.is_dir() else path.parent)  # and so is a list that cannot be read
    source = Source(
        path=path,
        checkpoint=checkpoint,
        adapters=adapters,
        objective=objective,
        conditioning=saved.conditioning if saved else None,
        prompt_suffix=_trained_with_motion(saved),
        image_encoder=picture,
        **sections,
    )
    return replace(source, low_noise=_low_noise(cfg, cfg.low_noise, source)) if cfg.low_noise else source


def low_noise_job(cfg: SampleConfig, low: LowNoiseConfig) -> SampleConfig:
    """The job as if the expert for low noise were its only model."""
    changes: dict[str, Any] = {name: getattr(low, name) for name in ("weights", "use_ema", "lora", "lora_scale")}
    sampling = replace(cfg.sampling, guidance_low=None)
    return replace(cfg, low_noise=None, sampling=sampling, **changes)


def _low_noise(cfg: SampleConfig, low: LowNoiseConfig, high: Source) -> LowNoise:
    """The second expert of a job, which fits the first.

    Raises:
        UserError: it is not there, has another shape, or nothing says where its times begin.
    """
    try:
        found = find_source(low_noise_job(cfg, low))
    except UserError as error:
        raise UserError(f"low_noise.{error}" if str(error).startswith(("weights=", "lora=")) else str(error)) from None
    for name in ("model", "vae", "text"):
        if difference := _difference(getattr(found, name), getattr(high, name)):
            raise UserError(f"low_noise.weights={low.weights}: has {name}.{difference}; experts must be of one shape")
    _check_turns(cfg, low, found, high)
    if found.objective.kind != high.objective.kind:
        raise UserError(
            f"low_noise.weights={low.weights}: was trained with objective.kind={found.objective.kind}, weights with "
            f"{high.objective.kind}; experts must be of one kind"
        )
    return LowNoise(source=found, boundary=low.boundary or _boundary(found, high))


def _check_turns(cfg: SampleConfig, low: LowNoiseConfig, found: Source, high: Source) -> None:
    """That neither expert was trained at the times of the other alone.

    Raises:
        UserError: one was; most likely they are swapped.
    """
    meet = high.time_range[1] if high.time_range[1] <= found.time_range[0] else None  # as experts that are swapped do
    boundary = low.boundary or meet
    if boundary is None:
        return
    for key, one, meant in (
        (f"weights={cfg.weights}", high, f"from {boundary:g} on"),
        (f"low_noise.weights={low.weights}", found, f"below {boundary:g}"),
    ):
        first, last = one.time_range
        if last <= boundary if one is high else first >= boundary:
            times = f"times from {first:g} to {last:g} alone"
            raise UserError(
                f"{key}: was trained at {times}, and would make the steps {meant}; swap the two, or give another"
            )


def _difference(here: Any, there: Any) -> str:
    """The first key whose values are others, as in ``depth=2, weights have 4``; empty: they are alike. Keys of where
    weights are and how they are worked with are not looked at: what the first expert has is used."""
    if here == there:
        return ""
    if type(here) is not type(there):
        return f"kind={here.kind}, weights have {there.kind}"
    names = (
        field.name
        for field in dataclasses.fields(here)
        if field.name not in OF_WORK and not field.name.endswith("path")
    )
    key = next((name for name in names if getattr(here, name) != getattr(there, name)), None)
    if key is None:
        return ""
    return f"{key}={shown(getattr(here, key))}, weights have {shown(getattr(there, key))}"


def _boundary(low: Source, high: Source) -> float:
    """Where the times meet that two experts were trained at."""
    ends = low.time_range[1], high.time_range[0]
    if ends[0] == ends[1]:
        return ends[0]
    raise UserError(
        f"low_noise.boundary: missing; weights were trained at times from {ends[1]:g} on, low_noise.weights up to "
        f"{ends[0]:g}; say where the second takes over, as low_noise.boundary=0.875"
    )


def _check_as_trained(given: ModelConfig, trained: ModelConfig, path: Path, *, is_file: bool) -> None:
    """That a job's own section ``model`` is what the weights were trained as; the number of heads changes no shape.

    Args:
        is_file: the weights are in files, not in the checkpoint of a run.

    Raises:
        UserError: a key that is not, with the value to set.
    """
    changed, family = [], family_of(trained)
    free = family.per_job | (family.fitted if is_file else frozenset())
    names = [one.name for one in dataclasses.fields(trained)]  # type: ignore[arg-type]
    for key in sorted(names, key=lambda name: name != "kind"):
        here, there = getattr(given, key, None), getattr(trained, key)
        if here == there:
            continue
        if key not in free:
            says = f"{path} was trained with {shown(there)}"
            raise UserError(f"model.{key}={shown(here)}: {says}; set model.{key}={shown(there)}, or leave model out")
        changed.append(f"model.{key}={shown(here)} (trained with {shown(there)})")
    if changed:
        announce(", ".join(changed))


def source_of(cfg: SampleConfig) -> Source:
    """What the weights are of: by their files, or where these are not there by the configuration alone.

    Raises:
        UserError: neither says it.
    """
    try:
        return find_source(cfg)
    except UserError:
        if (source := as_configured(cfg)) is None:
            raise
        return source


def as_configured(cfg: SampleConfig) -> Source | None:
    """What the weights would be of, by the configuration alone; None: it leaves that to them."""
    if cfg.model is None or cfg.vae is None or cfg.text is None:
        return None
    source = Source(
        path=Path(cfg.weights),
        checkpoint=None,
        adapters=None,
        model=cfg.model,
        vae=cfg.vae,
        text=cfg.text,
        image_encoder=cfg.image_encoder or NoImageEncoder(),
        objective=cfg.objective or default_objective(cfg.model),
        conditioning=None,
        prompt_suffix=False,
    )
    if cfg.low_noise is None:
        return source
    return replace(source, low_noise=LowNoise(source=source, boundary=cfg.low_noise.boundary or source.time_range[0]))


def names_motion(cfg: SampleConfig, source: Source) -> bool:
    """Whether prompts end with words about frame rate and motion."""
    return source.prompt_suffix if cfg.prompt_suffix is None else cfg.prompt_suffix


def prompt_suffix(cfg: SampleConfig) -> tuple[bool, bool]:
    """(whether prompts end with words about frame rate and motion, whether in the form of the family's own sampler), by
    what is saved with the weights."""
    path = Path(cfg.weights)
    saved = None if absence(path) else saved_config(path if path.is_dir() else path.parent)
    told = _trained_with_motion(saved) if cfg.prompt_suffix is None else cfg.prompt_suffix
    return told, saved is None


def _trained_with_motion(saved: RunConfig | None) -> bool:
    return bool(saved and saved.data.prompt_suffix)


def _objective(cfg: SampleConfig, saved: RunConfig | None) -> ObjectiveConfig | None:
    """What the weights were trained with: options as ``cfg`` says, of the kind that is saved with them; None: neither.

    Raises:
        UserError: they were trained with another kind, whose steps are of other things.
    """
    if cfg.objective and saved and cfg.objective.kind != saved.objective.kind:
        raise UserError(
            f"objective.kind={cfg.objective.kind}: weights={cfg.weights} were trained with objective.kind="
            f"{saved.objective.kind}; leave it out, or in a file of the family give the scheduler of the training run"
        )
    return cfg.objective or (saved.objective if saved else None)


def default_objective(model: ModelConfig) -> ObjectiveConfig:
    """What weights without a configuration beside them were trained with: as those that the family publishes."""
    return OBJECTIVE_CONFIGS[family_of(model).objective]()


def part_of_run(path: Path) -> tuple[str, Path | None]:
    """(what ``path`` is of a training run, the run's folder), for messages; None: nothing where checkpoints are."""
    whole = Path(os.path.abspath(path))
    if candidates(path / "checkpoints"):
        return "the folder of a run", path
    if candidates(path):
        return "the checkpoints of a run", whole.parent
    if os.path.lexists(path / MANIFEST) and (whole in candidates(whole.parent) or any(path.glob("shard-*"))):
        return "one checkpoint of a run", whole.parents[1]
    return "", None


def saved_config(path: Path) -> RunConfig | None:
    """What a run or an export says of itself; None where it says nothing."""
    if not (path / SAVED_NAME).is_file():
        return None
    try:
        return load_config(RunConfig, path / SAVED_NAME)
    except UserError as error:
        digests.verify(path, [SAVED_NAME])  # then damage is the better reason
        raise UserError(
            f"weights={path}: {error}; a run's next start writes its {SAVED_NAME} anew, an export's is exported again"
        ) from None


def _newest(run: Path) -> Path | None:
    """The newest checkpoint of a run; None for anything else."""
    if not (run / "checkpoints").is_dir():
        return None
    try:
        checkpoint = newest(run / "checkpoints")
    except ValueError as error:
        raise UserError(f"weights={run}: {error}") from None
    if checkpoint is None:
        raise UserError(f"weights={run}: the run has no checkpoint yet; train it, or give an export folder")
    last = candidates(run / "checkpoints")[-1]
    if last != checkpoint:
        announce(f"weights={run}: {last.name} is damaged; {checkpoint.name} is sampled from instead")
    return checkpoint


def _held_adapters(
    path: Path, checkpoint: Path | None, saved: RunConfig | None, model: ModelConfig
) -> tuple[Adapters, str | None] | None:
    """The adapters of a LoRA run or of its export, and where their base is; None where whole weights are."""
    if is_adapter(path):
        adapters = read_adapters(path, model, "weights")
        assert adapters.exported is not None
        return adapters, adapters.exported.adapter.base or (saved.train.init_from if saved else None)
    if checkpoint and saved and saved.lora.rank:
        return Adapters(lora=saved.lora, exported=None, checkpoint=checkpoint), saved.train.init_from
    return None


def read_adapters(path: Path, model: ModelConfig, key: str) -> Adapters:
    """``fitted_adapters``, as what is added to weights."""
    return Adapters(lora=None, exported=fitted_adapters(path, model, key), checkpoint=None)
