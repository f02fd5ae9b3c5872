"""The configuration of a run: sections that live beside their owners, composed here and checked across.

The one door for OmegaConf, which merges the layers (included files, the file, overrides). What comes out is a tree
of frozen dataclasses in which every field is stated; nobody behind this module sees a ``DictConfig``.
"""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias, TypeVar

from omegaconf import OmegaConf

from acceleration.config import LoraConfig, OptimConfig, ParallelConfig
from opensora.datasets import DataConfig
from opensora.models import MODEL_SIZES, MODELS, MMDiTConfig
from opensora.models.text import TEXT_ENCODERS, ByteTextConfig, TextConfig
from opensora.models.vae import AUTOENCODERS, AutoencoderConfig, autoencoder_shape
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.utils.errors import UserError
from opensora.utils.logging import LogConfig, launched_rank
from opensora.utils.sampling import SamplingOption
from opensora.utils.typed import build, is_table, plain, section, types_at, wants_text
from opensora.utils.yaml_strict import COMMAND_LINE, Keys, Lines, parse_value, read_yaml, to_yaml_text

SAVED_NAME = "config.yaml"  # of the resolved configuration inside a run's folder
PEER_WAIT_S = 5.0  # how long other ranks leave the word to rank 0 before they speak themselves

VaeParallel: TypeAlias = Literal["auto", "on", "off"]
T = TypeVar("T")

ModelConfig: TypeAlias = MMDiTConfig
MODEL_CONFIGS: dict[str, type] = {kind: entry[0] for kind, entry in MODELS.items()}
AUTOENCODER_CONFIGS: dict[str, type] = {kind: entry[0] for kind, entry in AUTOENCODERS.items()}
TEXT_ENCODER_CONFIGS: dict[str, type] = {kind: entry[0] for kind, entry in TEXT_ENCODERS.items()}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long a run trains and what it leaves behind."""

    steps: int  # optimizer updates in all, whatever the number of interruptions
    log_every: int = 10  # steps between two records in metrics.jsonl
    checkpoint_every: int = 1000  # steps between two checkpoints; the last step always has one
    checkpoint_async: bool = True  # another process writes while training goes on
    checkpoint_keep: int = 3  # newest complete checkpoints that stay; 0: all
    resume: Literal["auto", "none"] | str = "auto"  # newest complete checkpoint if any, a fresh start, or a path
    vae_parallel: VaeParallel = "auto"  # on: processes share out the tiles of what they code; auto: on for learned VAEs
    init_from: str | None = None  # safetensors file or export folder to start from, or to adapt with lora.rank > 0
    preflight: bool = True  # compare code, settings and devices of all processes, and look for slow links, at the start
    export: bool = True  # write the weights for sampling when the run is finished; with lora.rank > 0 the adapters
    export_live: bool = False  # those of the last step, also where there is a moving average

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: allowed are integers >= 1")
        if self.checkpoint_keep < 0:
            raise ValueError(f"checkpoint_keep={self.checkpoint_keep}: allowed are integers >= 0; 0 keeps all")
        if not self.resume:
            raise ValueError("resume='': allowed are auto, none, or the path of a checkpoint")


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Pictures of what the model makes while it trains, in samples/ of the run's folder."""

    every: int = 0  # steps between two rounds of samples; 0: none
    prompts: tuple[str, ...] = ()  # one clip each
    sampling: SamplingOption = field(default_factory=SamplingOption)

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every={self.every}: allowed are integers >= 0; 0 makes no samples")
        if self.every and not self.prompts:
            raise ValueError("prompts: missing; give validate.prompts=[TEXT, ...], or validate.every=0")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a run does when numbers go wrong, processes stand still, or copies of its state differ."""

    max_bad: int = (
        5  # updates in a row left out for a loss or gradient that is not finite, or spikes; then it goes back
    )
    max_returns: int = 2  # times to go back to an older checkpoint for one trouble before the run stops
    spike_sigma: float = 0.0  # leave out an update whose loss or gradient norm is so many deviations high; 0: none
    spike_window: int = 128  # good updates that mean and standard deviation are of
    replicas_every: int = 1000  # steps between two comparisons of the copies of the state; 0: none
    straggler: float = 1.5  # name a process that takes so many times as long as the median; 0: none
    hang_s: float | None = None  # longest part of a step, or exchange; null: 0.8 parallel.timeout_s; 0: no watchdog
    start_s: float = 1800.0  # longest that building, loading, and a part of the first step may take
    aside_s: float = 3600.0  # longest that saving, sampling or exporting may take

    def __post_init__(self) -> None:
        for name in ("max_bad", "max_returns", "replicas_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: allowed are integers >= 0")
        if self.spike_sigma < 0:
            raise ValueError(f"spike_sigma={self.spike_sigma}: allowed are numbers >= 0; 0 leaves out no spike")
        if self.spike_window < 8:
            raise ValueError(f"spike_window={self.spike_window}: allowed are integers >= 8")
        if self.straggler and self.straggler <= 1:
            raise ValueError(f"straggler={self.straggler}: allowed are numbers > 1; 0 names no process")
        if self.hang_s is not None and self.hang_s < 0:
            raise ValueError(f"hang_s={self.hang_s}: allowed are numbers >= 0; 0 is no watchdog")
        for name in ("start_s", "aside_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: allowed are numbers > 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    name: str  # the run's folder is output/name
    output: str = "outputs"  # folder of all runs
    seed: int = 42  # every draw is a function of this, the step and the sample
    model: ModelConfig = section(MODEL_CONFIGS, sizes=MODEL_SIZES)  # the denoiser
    vae: AutoencoderConfig = section(AUTOENCODER_CONFIGS)  # the autoencoder
    text: TextConfig = section(TEXT_ENCODER_CONFIGS)  # the text encoder
    flow: RectifiedFlowConfig = field(default_factory=RectifiedFlowConfig)
    data: DataConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if not self.name or self.name in (".", "..") or set(self.name) & set("/\\\0\n"):
            raise ValueError(f"name={self.name!r}: allowed is the name of a folder, without a slash")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: allowed are integers from 0 to 2^63-1")
        if not self.data.table:
            raise ValueError("data.table: missing; give the path of a clip table (csv or parquet)")
        if not self.data.buckets:
            raise ValueError("data.buckets: missing; give a table such as {256px: {1: [1.0, 8], 33: [1.0, 2]}}")
        check_fit(self.model, self.vae, self.text)
        if self.parallel.mesh.cfg != 1:
            raise ValueError(f"parallel.mesh.cfg={self.parallel.mesh.cfg}: allowed is 1; guidance is for sampling")
        if self.data.tokens_per_sequence:
            self._check_packs()
        if self.lora.rank and self.train.init_from is None:
            raise ValueError(
                f"lora.rank={self.lora.rank}: adapters need weights to adapt; give train.init_from=PATH, or lora.rank=0"
            )
        if self.lora.rank and self.parallel.engine != "native":
            raise ValueError(f"lora.rank={self.lora.rank}: allowed with parallel.engine=native only")
        if self.parallel.engine == "colossalai" and self.parallel.zero == 3 and self.optim.kind != "adamw":
            raise ValueError(
                f"optim.kind={self.optim.kind}: allowed with parallel.engine=colossalai and zero=3 is adamw"
            )
        if self.optim.warmup_steps > self.train.steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps}: allowed are at most train.steps={self.train.steps}"
            )

    def _check_packs(self) -> None:
        """That samples of several buckets can share a sequence."""
        key = f"data.tokens_per_sequence={self.data.tokens_per_sequence}"
        if self.parallel.mesh.ring != 1:
            raise ValueError(
                f"{key}: with parallel.mesh.ring={self.parallel.mesh.ring} allowed is 0; use parallel.mesh.ulysses"
            )
        if self.parallel.mesh.dynamic:
            raise ValueError(f"{key}: with parallel.mesh.dynamic=true allowed is 0; use the one or the other")
        if not getattr(MODELS[self.model.kind][1], "takes_packs", False):
            raise ValueError(f"{key}: model.kind={self.model.kind} takes one sample per sequence; allowed is 0")

    @property
    def folder(self) -> Path:
        """Where this run keeps everything."""
        return Path(self.output) / self.name


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """One sampling job."""

    weights: str  # run folder, export folder or safetensors file
    use_ema: bool = True  # of a run that kept a moving average: sample from it
    lora: str | None = None  # adapters to add to the weights: a LoRA file, or folder of a LoRA run's export or of peft
    lora_scale: float = 1.0  # how much of the adapters to add; 0: none
    model: ModelConfig | None = section(MODEL_CONFIGS, sizes=MODEL_SIZES, optional=True)  # null: as saved with weights
    vae: AutoencoderConfig | None = section(AUTOENCODER_CONFIGS, optional=True)  # null: as saved with weights
    text: TextConfig | None = section(TEXT_ENCODER_CONFIGS, optional=True)  # null: as saved with weights
    sampling: SamplingOption = field(default_factory=SamplingOption)
    prompt: str | None = None  # one prompt
    prompts: tuple[str, ...] = ()  # several
    prompt_csv: str | None = None  # a table with the columns text, and optionally name and neg, or a .txt of lines
    num_sample: int = 1  # videos per prompt, with seeds seed, seed+1, ...
    save_dir: str = "samples"  # videos, stills, prompts and the contact sheet
    overwrite: bool = False  # replace files of an earlier job in save_dir; false: this job's get other names
    batch_size: int = 1  # prompts denoised together
    precision: Literal["bf16", "fp32", "fp64"] = "bf16"  # fp64: to compare layouts
    vae_parallel: VaeParallel = "auto"  # on: processes share out the tiles of what they code; auto: on for learned VAEs
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights='': wanted a run folder, an export folder or a safetensors file")
        for name in ("num_sample", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: allowed are integers >= 1")
        if self.parallel.engine != "native":
            raise ValueError(f"parallel.engine={self.parallel.engine}: allowed is native; the others are for training")
        if self.parallel.mesh.dynamic:
            raise ValueError("parallel.mesh.dynamic=true: allowed is false; in sampling all share every clip")
        if self.prompt is None and not self.prompts and self.prompt_csv is None:
            raise ValueError("prompt: missing; give --prompt TEXT, prompts=[TEXT, ...] or prompt_csv=FILE")


def check_fit(model: ModelConfig, vae: AutoencoderConfig, text: TextConfig) -> None:
    """That the denoiser reads what the autoencoder and the text encoder write.

    The widths of T5 and CLIP are known only with their files, and are checked when those are loaded.

    Raises:
        ValueError: a width of the model that does not fit, with the one that does.
    """
    channels = autoencoder_shape(vae).channels * model.patch_size**2
    if model.in_channels != channels:
        raise ValueError(
            f"model.in_channels={model.in_channels}: vae.kind={vae.kind} with model.patch_size={model.patch_size} "
            f"gives {channels} channels per token; set model.in_channels={channels}"
        )
    if not isinstance(text, ByteTextConfig):
        return
    for key in ("context_in_dim", "vec_in_dim"):
        if getattr(model, key) != text.dim:
            raise ValueError(
                f"model.{key}={getattr(model, key)}: text.kind={text.kind} gives {text.dim}; set model.{key}={text.dim}"
            )


def load_config(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """A configuration from a YAML file and command-line overrides; reads files, writes nothing.

    ``include: FILE`` or ``include: [FILE, ...]`` at the top of a file names files, relative to it, that it builds on.
    Later layers win key by key; a section that changes its ``kind``, and a free mapping such as the bucket table, is
    replaced as a whole.

    Args:
        overrides: ``section.key=value``, ``--section.key=value`` or ``--section.key value``.

    Raises:
        UserError: one line with the key path or the file, what was found, and what is allowed.
    """
    layer, lines = _read_with_includes(cls, Path(path), ())
    for keys, value in _parse_overrides(cls, overrides):
        added: Any = value
        for key in reversed(keys):
            added = {key: added}
        layer = _merge(cls, layer, added, lines, addressed=keys)
        lines[keys] = COMMAND_LINE
    return build(cls, layer, lines)


def config_from_argv(cls: type[T], argv: Sequence[str], description: str) -> T:
    """``CONFIG.yaml [overrides]`` as typed on a command line; ``--help`` explains it and exits."""
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"{description}\n\nusage: CONFIG.yaml [section.key=value | --section.key value | --section.key=value] ...\n"
            "All keys with their defaults: docs/configuration.md"
        )
        raise SystemExit(0 if argv else 2)
    if argv[0].startswith("-") or ("=" in argv[0] and not Path(argv[0]).exists()):
        raise UserError(f"{argv[0]}: the configuration file comes first, overrides after it")
    return load_config(cls, argv[0], argv[1:])


def to_yaml(cfg: Any) -> str:
    """The resolved configuration; ``load_config`` reads it back to an equal one."""
    return to_yaml_text(plain(cfg))


def save(cfg: Any, path: str | Path) -> None:
    """Write ``to_yaml(cfg)``; the file is complete or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(to_yaml(cfg), encoding="utf-8")
    os.replace(aside, path)


def config_hash(cfg: Any) -> str:
    """16 hex digits that change with any value of the configuration, the same on every machine."""
    text = json.dumps(plain(cfg), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_cli(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call ``main(argv)`` and exit with its code; a ``UserError`` becomes one line on stderr and exit code 2, an error
    that has an ``exit_code``, such as ``StartError`` of acceleration, a line of every rank that has it, and that code.

    Of several ranks only rank 0 speaks. The others wait before they exit, because a launcher that sees one process
    end kills the rest, and rank 0 must have had its say; one still alive then has an error of its own, and says it.
    """
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        line = " ".join(str(error).split())
        rank = launched_rank()
        if rank != 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(PEER_WAIT_S)
            line = f"rank {rank}: {line}"
        print(f"error: {line}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)
        if exit_code is None:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(exit_code) from None
    raise SystemExit(code or 0)


def _read_with_includes(cls: type, path: Path, chain: tuple[Path, ...]) -> tuple[dict[Any, Any], Lines]:
    """The merged content of a file and what it includes, and where each key was set."""
    if path.resolve() in chain:
        loop = " -> ".join(str(step.name) for step in (*chain, path))
        raise UserError(f"{path}: include goes round in a circle ({loop}); remove one of them")
    data, lines = read_yaml(path)
    included = data.pop("include", None)
    place = lines.pop(("include",), str(path))
    names = [included] if isinstance(included, str) else included or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"include={included!r} ({place}): wanted a path or a list of paths")
    layer: dict[Any, Any] = {}
    merged_lines: Lines = {}
    for name in names:
        target = path.parent / name
        if not target.is_file():
            raise UserError(f"include={name} ({place}): no such file; paths are relative to the file that includes")
        below, below_lines = _read_with_includes(cls, target, (*chain, path.resolve()))
        layer = _merge(cls, layer, below, merged_lines)
        merged_lines.update(below_lines)
    layer = _merge(cls, layer, data, merged_lines)
    merged_lines.update(lines)
    return layer, merged_lines


def _merge(
    cls: type, base: dict[Any, Any], layer: dict[Any, Any], lines: Lines, addressed: Keys = ()
) -> dict[Any, Any]:
    """``layer`` over ``base``. ``lines`` of ``base`` forgets what the layer replaces as a whole.

    ``addressed``: the one key path the layer sets; a mapping on the way to it is entered, not replaced.
    """
    kept = _without_replaced(cls, base, layer, (), lines, addressed)
    merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(kept), OmegaConf.create(layer)))
    assert isinstance(merged, dict)
    return merged


def _without_replaced(
    cls: type, base: Mapping[Any, Any], layer: Mapping[Any, Any], keys: Keys, lines: Lines, addressed: Keys
) -> dict[Any, Any]:
    kept: dict[Any, Any] = {}
    for key, old in base.items():
        path = (*keys, key)
        new = layer.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes_kind = "kind" in old and new.get("kind", old["kind"]) != old["kind"]
            is_whole = len(addressed) <= len(path) and any(is_table(hint) for hint in types_at(cls, path))
            if changes_kind or is_whole:
                for known in [known for known in lines if known[: len(path)] == path]:
                    del lines[known]
                continue
            kept[key] = _without_replaced(cls, old, new, path, lines, addressed)
        else:
            kept[key] = old
    return kept


def _parse_overrides(cls: type, overrides: Sequence[str]) -> list[tuple[Keys, Any]]:
    parsed: list[tuple[Keys, Any]] = []
    rest = list(overrides)
    while rest:
        word = rest.pop(0)
        dashed = word.startswith("--")
        name, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            if not dashed:
                raise UserError(f"{word}: not an override; write section.key=value or --section.key value")
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{word}: a value is missing; write {word} VALUE")
            text = rest.pop(0)
        keys = _keys(name.replace("-", "_") if dashed else name, word)
        parsed.append((keys, _override_value(cls, keys, text)))
    return parsed


def _keys(name: str, word: str) -> Keys:
    parts = name.split(".")
    if not all(parts):
        raise UserError(f"{word}: an empty key; write section.key=value")
    return tuple(int(part) if part.isdigit() else part for part in parts)


def _override_value(cls: type, keys: Keys, text: str) -> Any:
    """Text as it stands where the key takes text, so that a prompt needs no YAML quotes; else one YAML value."""
    hints = types_at(cls, keys)
    if any(wants_text(hint) for hint in hints):
        if text == "null" and any(type(None) in getattr(hint, "__args__", ()) for hint in hints):
            return None
        return text
    return parse_value(text, keys)
