"""The ``validate:`` section of a run."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

from opensora.sampling.options import SamplingOption
from opensora.utils.limits import STEPS, Limits

CondType: TypeAlias = Literal[
    "t2v", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head", "v2v_tail", "v2v_head_easy", "v2v_tail_easy"
]


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """What a run looks at while it trains: clips of fixed prompts, in samples/ of its folder, and the loss on clips
    that it is not trained on. Neither changes the training."""

    every: int = 0  # steps between two rounds; 0: none
    use_ema: bool = True  # of a run that keeps a moving average: look at that
    prompts: tuple[str, ...] = ()  # one clip each
    prompt_csv: str | None = None  # a table as for sampling: text, and optionally name, neg and ref; or a .txt of lines
    cond_type: CondType = "t2v"  # what references give, see sampling
    ref: str | None = None  # references of prompts, images or clips of any size, as "a.png;b.mp4"
    batch_size: int | None = None  # prompts denoised together; null: all
    sampling: SamplingOption = field(default_factory=SamplingOption)
    table: str | list[str] = ""  # held-out clip table: csv or parquet file, glob, or a list of these; empty: no loss
    root: str = ""  # folder that its relative clip paths start at; empty: the folder of the table
    samples: int = 64  # of the table, at most: as many from every bucket as it has, or as from the others
    bins: int = 5  # equal parts of the time from 0 (data) to 1 (noise); every sample is seen at one time in each
    seed: int = 0  # of noise, times and crops, which are the same in every round, run and layout

    LIMITS: ClassVar[Limits] = {
        "every": STEPS,
        "batch_size": (65_536, "they are denoised together, in memory"),
        "samples": (10**6, "each is encoded in every round"),
        "bins": (1000, "the model runs once in each, for every sample"),
    }

    def __post_init__(self) -> None:
        names: Any = [self.table] if isinstance(self.table, str) else self.table
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"table={self.table!r}: must be a path, a glob, or a list of these")
        if self.every < 0:
            raise ValueError(f"every={self.every}: must be an integer >= 0; 0 validates nothing")
        for name in ("samples", "bins", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be an integer >= 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: must be an integer from 0 to 2^63-1")
        for name in ("prompt_csv", "ref"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}='': must be a path, or null")
        if self.ref is not None and not self.prompts:
            raise ValueError("ref: is for prompts; clips of prompt_csv have theirs in its column ref")
        if self.every and not (self.makes_clips or self.table):
            raise ValueError(
                "prompts: missing; give validate.prompts=[TEXT, ...], validate.prompt_csv=FILE or validate.table=FILE, "
                "or validate.every=0"
            )

    @property
    def makes_clips(self) -> bool:
        """Whether prompts are sampled."""
        return bool(self.prompts or self.prompt_csv)
