"""The configuration of a run: sections that live beside their owners, composed here and checked across.

Layers (included files, the file, overrides) are plain data, merged key by key: no interpolation, no references. What
comes out is a tree of frozen dataclasses in which every field is stated. Python scripts may hand in a dict or an
OmegaConf configuration in place of a file, and get one back by ``to_omegaconf``.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

from acceleration.config import LoraConfig, OptimConfig, ParallelConfig, check_apex
from opensora.conditioning import ConditioningConfig
from opensora.config.given_frames import check_given_frames
from opensora.config.given_frames import reads_no_references as reads_no_references
from opensora.config.opensora_1x import ReleaseSampling
from opensora.config.other_models import LowNoiseConfig
from opensora.config.other_models import StillConfig as StillConfig
from opensora.config.validation import CondType, ValidateConfig
from opensora.datasets import DataConfig
from opensora.models.base import ModelConfig, Width, Widths
from opensora.models.families import MODEL_CONFIGS, MODEL_SIZES, describe, family_of, has_frozen_parameters
from opensora.models.image import IMAGE_ENCODER_CONFIGS, ImageEncoderConfig, NoImageEncoder, check_reads_pictures
from opensora.models.text import TEXT_ENCODER_CONFIGS, TextConfig, num_classes, text_widths
from opensora.models.vae import AUTOENCODER_CONFIGS, AUTOENCODERS, AutoencoderConfig, autoencoder_shape
from opensora.sampling.options import SamplingOption
from opensora.schedulers import OBJECTIVE_CONFIGS, ObjectiveConfig, build_objective
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.schedulers.rectified_flow_v1 import RectifiedFlowV1Config
from opensora.utils.chat import RefineConfig
from opensora.utils.files.untrusted import short
from opensora.utils.limits import SECONDS, STEPS, Limits
from opensora.utils.metrics_log import LogConfig
from opensora.utils.names import name_problem
from opensora.utils.sections import section

SAVED_NAME = "config.yaml"  # of the resolved configuration inside a run's folder
MAX_NAME = 200  # bytes of a run's name; file systems take 255, and jobs and logs are named after it

LORA_SCALE = 1000.0  # the most, either way

LossReduction: TypeAlias = Literal["elements", "samples"]
VaeParallel: TypeAlias = Literal["auto", "on", "off"]


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
    loss_reduction: LossReduction = "elements"  # the loss is the mean over all latent values of a step; samples: over
    # those of a sample, and then over samples (Open-Sora 1.x)
    export_live: bool = False  # those of the last step, also where there is a moving average

    LIMITS: ClassVar[Limits] = dict.fromkeys(("steps", "log_every", "checkpoint_every", "checkpoint_keep"), STEPS)

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be an integer >= 1")
        if self.checkpoint_keep < 0:
            raise ValueError(f"checkpoint_keep={self.checkpoint_keep}: must be an integer >= 0; 0 keeps all")
        if self.init_from == "":
            raise ValueError("init_from='': must be a safetensors file or an export folder, or null")
        if self.loss_reduction not in ("elements", "samples"):
            raise ValueError(f"loss_reduction={self.loss_reduction}: must be elements or samples")
        if not self.resume:
            raise ValueError("resume='': must be one of auto, none, or the path of a checkpoint")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a run does when numbers go wrong, processes stand still, or copies of its state differ."""

    max_bad: int = (
        5  # updates in a row left out for a loss or gradient that is not finite, or spikes; then it goes back
    )
    max_rollbacks: int = 2  # times to go back to an older checkpoint for one trouble before the run stops
    spike_sigma: float = 0.0  # leave out an update whose loss or gradient norm is so many deviations high; 0: none
    spike_window: int = 128  # good updates that mean and standard deviation are of
    replicas_every: int = 1000  # steps between two comparisons of the copies of the state; 0: none
    straggler: float = 1.5  # name a process that takes so many times as long as the median; 0: none
    hang_s: float | None = None  # longest part of a step, or exchange; null: 0.8 parallel.timeout_s; 0: no watchdog
    start_s: float = 1800.0  # longest that building, loading, and a part of the first step may take
    save_s: float = 3600.0  # longest that saving, sampling or exporting may take

    LIMITS: ClassVar[Limits] = {
        **dict.fromkeys(("max_bad", "max_rollbacks", "spike_window"), (10**6, "a run is beyond help long before")),
        "spike_sigma": (1e6, "no number is so far off; 0 leaves out no spike"),
        "replicas_every": STEPS,
        "straggler": (1e6, "0 names no process"),
        **dict.fromkeys(("hang_s", "start_s", "save_s"), SECONDS),
    }

    def __post_init__(self) -> None:
        for name in ("max_bad", "max_rollbacks", "replicas_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be an integer >= 0")
        if self.spike_sigma < 0:
            raise ValueError(f"spike_sigma={self.spike_sigma}: must be a number >= 0; 0 leaves out no spike")
        if self.spike_window < 8:
            raise ValueError(f"spike_window={self.spike_window}: must be an integer >= 8")
        if self.straggler and self.straggler <= 1:
            raise ValueError(f"straggler={self.straggler}: must be a number > 1; 0 names no process")
        if self.hang_s is not None and self.hang_s < 0:
            raise ValueError(f"hang_s={self.hang_s}: must be a number >= 0; 0 is no watchdog")
        for name in ("start_s", "save_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number > 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    name: str  # the run's folder is output/name: no path, no dot or dash in front, no dot or space behind, no device
    output: str = "outputs"  # folder of all runs
    seed: int = 42  # every draw is a function of this, the step and the sample
    model: ModelConfig = section(MODEL_CONFIGS, sizes=MODEL_SIZES)  # the denoiser
    vae: AutoencoderConfig = section(AUTOENCODER_CONFIGS)  # the autoencoder
    text: TextConfig = section(TEXT_ENCODER_CONFIGS)  # the text encoder
    # of first frames, for models that read tokens of a reference picture
    image_encoder: ImageEncoderConfig = section(IMAGE_ENCODER_CONFIGS, default=NoImageEncoder)
    objective: ObjectiveConfig = section(OBJECTIVE_CONFIGS, default=RectifiedFlowConfig)  # what is learned, and when
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    data: DataConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if problem := name_problem(self.name, most=MAX_NAME):
            raise ValueError(f"name={short(repr(self.name))}: must be the name of a folder; this one {problem}")
        if not self.output:
            raise ValueError("output='': must be the folder of all runs; . is this one")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: must be an integer from 0 to 2^63-1")
        if not self.data.table:
            raise ValueError("data.table: missing; give the path of a clip table (csv or parquet)")
        if not self.data.buckets:
            raise ValueError("data.buckets: missing; give a table such as {256px: {1: [1.0, 8], 33: [1.0, 2]}}")
        check_fit(self.model, self.vae, self.text, self.image_encoder)
        if isinstance(self.objective, RectifiedFlowV1Config):
            self._check_lengths(self.objective)
        check_objective(self.model, self.objective)
        if self.lora.targets is None:  # what is saved states every value
            object.__setattr__(self, "lora", replace(self.lora, targets=family_of(self.model).lora_targets))
        check_given_frames(self.conditioning, self.model, self.data)
        if num_classes(self.text) and self.data.prompt_suffix:
            raise ValueError("data.prompt_suffix=true: must be false with text.kind=classes, which reads numbers")
        if self.parallel.mesh.cfg != 1:
            raise ValueError(f"parallel.mesh.cfg={self.parallel.mesh.cfg}: must be 1; guidance is for sampling")
        if self.data.tokens_per_sequence:
            self._check_packs()
        if self.lora.rank and self.train.init_from is None:
            raise ValueError(
                f"lora.rank={self.lora.rank}: adapters need weights to adapt; give train.init_from=PATH, or lora.rank=0"
            )
        if self.lora.rank and self.parallel.engine != "native":
            raise ValueError(f"lora.rank={self.lora.rank}: allowed with parallel.engine=native only")
        if self.parallel.engine != "native" and has_frozen_parameters(self.model):
            raise ValueError(
                f"parallel.engine={self.parallel.engine}: model.kind={self.model.kind} has parameters that are not "
                "trained (its null text, or what model.freeze names), which native alone keeps; must be native"
            )
        if self.lora.offload != "none" and self.parallel.offload == "parameters":
            raise ValueError("parallel.offload=parameters: must be none or optimizer with lora.offload=blocks")
        cache = self.validate.sampling.cache.kind
        if self.parallel.engine != "native" and self.parallel.zero == 3 and cache not in ("none", "pyramid_attention"):
            raise ValueError(  # these engines know no block that is passed by while others run it
                f"validate.sampling.cache.kind={cache}: with parallel.engine={self.parallel.engine} and zero=3 must be "
                "none or pyramid_attention"
            )
        if self.parallel.engine == "colossalai" and self.parallel.zero == 3 and self.optim.kind != "adamw":
            raise ValueError(
                f"optim.kind={self.optim.kind}: allowed with parallel.engine=colossalai and zero=3 is adamw"
            )
        check_apex(self.optim, self.parallel)
        if self.optim.warmup_steps > self.train.steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps}: must be at most train.steps={self.train.steps}"
            )

    def _check_lengths(self, objective: RectifiedFlowV1Config) -> None:
        """That clips of all buckets have times."""
        for resolution, rows in self.data.buckets.items():
            for frames in rows:
                try:
                    objective.check_frames(int(frames))
                except ValueError as error:
                    raise ValueError(f"data.buckets.{resolution}.{frames}: {error}") from None

    def _check_packs(self) -> None:
        """That samples of several buckets can share a sequence."""
        key = f"data.tokens_per_sequence={self.data.tokens_per_sequence}"
        if self.parallel.mesh.ring != 1:
            raise ValueError(
                f"{key}: with parallel.mesh.ring={self.parallel.mesh.ring} must be 0; use parallel.mesh.ulysses"
            )
        if self.parallel.mesh.dynamic:
            raise ValueError(f"{key}: with parallel.mesh.dynamic=true must be 0; use the one or the other")
        if not describe(self.model).packs:
            raise ValueError(f"{key}: model.kind={self.model.kind} takes one sample per sequence; must be 0")

    @property
    def folder(self) -> Path:
        """Where this run keeps everything."""
        return Path(self.output) / self.name


@dataclass(frozen=True, kw_only=True)
class SampleConfig(ReleaseSampling):
    """One sampling job."""

    weights: str  # run folder, export folder or safetensors file
    low_noise: LowNoiseConfig | None = None  # a second expert, which makes the steps of low noise
    use_ema: bool = True  # of a run that kept a moving average: sample from it
    lora: str | None = None  # adapters to add to the weights: a LoRA file, or folder of a LoRA run's export or of peft
    lora_scale: float = 1.0  # how much of the adapters to add; 0: none
    model: ModelConfig | None = section(MODEL_CONFIGS, sizes=MODEL_SIZES, optional=True)  # null: as saved with weights
    vae: AutoencoderConfig | None = section(AUTOENCODER_CONFIGS, optional=True)  # null: as saved with weights
    text: TextConfig | None = section(TEXT_ENCODER_CONFIGS, optional=True)  # null: as saved with weights
    # null: as saved with weights, or none
    image_encoder: ImageEncoderConfig | None = section(IMAGE_ENCODER_CONFIGS, optional=True)
    objective: ObjectiveConfig | None = section(OBJECTIVE_CONFIGS, optional=True)  # null: as saved with weights
    sampling: SamplingOption = field(default_factory=SamplingOption)
    prompt: str | None = None  # one prompt
    prompts: tuple[str, ...] = ()  # several
    prompt_csv: str | None = None  # csv or parquet with text, and optionally name, neg and ref; or a .txt of lines
    start_index: int = 0  # of the first prompt that is sampled; all are numbered from the start of the table
    end_index: int | None = None  # of the first prompt that is not; null: all are
    neg: str = ""  # what clips that name nothing themselves move away from
    cond_type: CondType = (
        "t2v"  # what references give: the first, the last or both frames; the first or last 33 frames, or 65 (easy)
    )
    ref: str | None = None  # references of prompt and prompts, images or clips of any size, as "a.png;b.mp4"
    still: StillConfig | None = None  # first make a still of every prompt, then go on from it (cond_type=i2v_head)
    prompt_suffix: bool | None = None  # words about frame rate and motion after prompts; null: as the model was trained
    refine: RefineConfig = field(default_factory=RefineConfig)
    num_sample: int = 1  # videos per prompt, with seeds seed, seed+1, ...
    save_dir: str = "samples"  # videos, stills, prompts and the contact sheet
    save_prefix: str = ""  # what the names of files begin with
    prompt_as_path: bool = False  # files are called as their prompts
    overwrite: bool = False  # replace files of an earlier job in save_dir; false: this job's get other names
    crf: int = 18  # of libx264, 0 to 51: 18 shows no loss, more of it makes smaller files
    watermark: str | None = None  # a picture that is laid over the lower right corner of what is made
    batch_size: int = 1  # prompts denoised together
    precision: Literal["bf16", "fp32", "fp64"] = "bf16"  # fp64: to compare layouts
    vae_parallel: VaeParallel = "auto"  # on: processes share out the tiles of what they code; auto: on for learned VAEs
    # models: text encoder, denoiser, autoencoder take turns on the GPU; blocks: those of the denoiser do, too
    offload: Literal["none", "models", "blocks"] = "none"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    LIMITS: ClassVar[Limits] = {
        **ReleaseSampling.LIMITS,
        "num_sample": (100_000, "names and seeds are counted up for every one of them"),
        "batch_size": (65_536, "they are denoised together, in memory"),
        "crf": (51, "libx264 has no more"),
        **dict.fromkeys(("start_index", "end_index"), (10**9, "no table is so long")),
        "lora_scale": (LORA_SCALE, "the adapters would drown the weights"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_scale < -LORA_SCALE:
            raise ValueError(f"lora_scale={self.lora_scale}: must be a number from -{LORA_SCALE} to {LORA_SCALE}")
        if not self.weights:
            raise ValueError("weights='': must be a run folder, an export folder or a safetensors file")
        if not self.save_dir:
            raise ValueError("save_dir='': must be the folder to write to; . is this one")
        for name in ("lora", "prompt_csv", "ref", "watermark"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}='': must be a path, or null")
        for name in ("num_sample", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be an integer >= 1")
        if self.crf < 0:
            raise ValueError(f"crf={self.crf}: must be an integer from 0 to 51")
        if self.start_index < 0:
            raise ValueError(f"start_index={self.start_index}: must be an integer >= 0")
        if self.end_index is not None and self.end_index <= self.start_index:
            raise ValueError(
                f"end_index={self.end_index}: must be above start_index={self.start_index}, or null for all"
            )
        if self.sampling.guidance_low is not None and self.low_noise is None:
            raise ValueError(
                f"sampling.guidance_low={self.sampling.guidance_low}: must be null without low_noise, a second expert"
            )
        if self.parallel.engine != "native":
            raise ValueError(f"parallel.engine={self.parallel.engine}: must be native; the others are for training")
        if self.offload != "none" and self.parallel.offload != "none":
            raise ValueError(f"parallel.offload={self.parallel.offload}: must be none with offload={self.offload}")
        if self.parallel.mesh.dynamic:
            raise ValueError("parallel.mesh.dynamic=true: must be false; in sampling all share every clip")
        if self.ref is not None and self.prompt is None and not self.prompts:
            raise ValueError("ref: is for prompt and prompts; clips of prompt_csv have theirs in its column ref")


def check_fit(
    model: ModelConfig, vae: AutoencoderConfig, text: TextConfig, image_encoder: ImageEncoderConfig | None = None
) -> None:
    """That the denoiser reads what the autoencoder and the encoders write. ``image_encoder`` None: is not looked at.

    The widths of T5 and CLIP are in their files: ``opensora.models.text.check_text_encoder`` looks there.

    Raises:
        ValueError: a width of the model that does not fit, with the one that does.
    """
    check_patch(vae, model)
    check_classes(model, text)
    if image_encoder is not None:
        check_reads_pictures(image_encoder, model)
    latents = Width(autoencoder_shape(vae).channels, f"vae.kind={vae.kind}")
    given = Widths(latents, *(Width(size, f"text.kind={text.kind}") for size in text_widths(text)))
    try:
        family_of(model).check(model, given)
    except ValueError as error:
        raise ValueError(f"model.{error}") from None


def check_classes(model: ModelConfig, text: TextConfig) -> None:
    """That the denoiser reads classes where the text encoder gives these, as many, and texts where it gives features.

    Raises:
        ValueError: it does not.
    """
    given, wanted = num_classes(text), describe(model).num_classes
    if wanted and not given:
        raise ValueError(f"text.kind={text.kind}: must be classes with model.kind={model.kind}, which reads {wanted}")
    if given and not wanted:
        raise ValueError(
            f"text.kind={text.kind}: model.kind={model.kind} reads no classes as configured; must be another"
        )
    if given != wanted:
        raise ValueError(f"text.num_classes={given}: must be {wanted}, as the model has")


def check_patch(vae: AutoencoderConfig, model: ModelConfig) -> None:
    """That tokens span no more pixels than the autoencoder is meant for.

    Raises:
        ValueError: the model's patch is larger.
    """
    wanted, found = AUTOENCODERS[vae.kind].patch, describe(model).patch
    if wanted is not None and found != (1, wanted, wanted):
        name = "patch_size" if hasattr(model, "patch_size") else "patch"
        side = autoencoder_shape(vae).stride[2]
        raise ValueError(
            f"model.{name}={getattr(model, name, found)}: must be {wanted} with vae.kind={vae.kind}, whose latents "
            f"span {side}x{side} pixels"
        )


def check_objective(model: ModelConfig, objective: ObjectiveConfig) -> None:
    """That the model predicts what the objective needs.

    Raises:
        ValueError: it does not.
    """
    built, denoising = build_objective(objective), describe(model)
    needed, found = built.outputs, denoising.outputs
    if found < needed:
        raise ValueError(
            f"objective.kind={objective.kind}: needs {needed} values per latent, model.kind={model.kind} predicts "
            f"{found}; choose another objective, or a model with a learned variance"
        )
    latest, wanted = getattr(built, "latest_time", 1.0), {"unit": 1, "steps": 1000}.get(denoising.times)
    if wanted is not None and (wanted == 1) != (latest == 1):
        raise ValueError(
            f"objective.kind={objective.kind}: has times up to {latest:g}, model.kind={model.kind} reads times up to "
            f"{wanted}; choose another objective"
        )
