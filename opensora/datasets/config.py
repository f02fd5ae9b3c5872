"""The ``data:`` section of a run."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from PIL import ImageColor

from opensora.datasets.buckets.cost import CostConfig
from opensora.datasets.buckets.resolutions import area_of
from opensora.datasets.buckets.sizes_1x import RULES as RULES_1X
from opensora.datasets.decode.common import Colour
from opensora.utils.files.untrusted import parsing, short
from opensora.utils.limits import SECONDS, Limits

MAX_FRAMES = 100_000  # of a bucket: an hour at 28 frames a second
MAX_BATCH = 65_536  # of a bucket; samples of a micro-batch are in memory together
MAX_INTERVAL = 10_000  # frames: minutes of a clip
_MOST_COLOUR = 100  # characters

BucketRule: TypeAlias = Literal[
    "even", "open_sora_2", "open_sora_1_0", "open_sora_1_1", "open_sora_1_2", "open_sora_1_3"
]


@dataclass(frozen=True, kw_only=True)
class BucketRow:
    """One line of the bucket table: clips of ``frames`` frames at ``resolution``."""

    resolution: str
    frames: int
    keep: float  # probability that a clip which fits is taken at this resolution
    accept: float  # probability that a clip which fits is taken at this length
    batch_size: int | None  # None: as many samples as the budgets allow


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, into which shapes, and how much of it makes a step."""

    table: str | list[str] = ""  # clip table: a csv or parquet file, a glob, or a list of these
    root: str = ""  # folder that relative clip paths start at; empty: the folder of the table
    index: str = ""  # folder for what is built from the table once; empty: .clip_index beside the table
    buckets: dict[str, dict[int, Any]] = field(default_factory=dict)
    # {resolution: {frames: [keep_prob, batch_size]}} or {frames: [[keep_prob, length_prob], batch_size]};
    # batch_size auto: as many samples as tokens_per_batch and cost_per_batch allow, at least one
    tokens_per_batch: int = 0  # most image tokens of an auto micro-batch: what fits in memory; 0: no such limit
    cost_per_batch: float = 0.0  # most that an auto micro-batch may cost, in the unit of data.cost; 0: no such limit
    cost: CostConfig = field(default_factory=CostConfig)  # time of a micro-batch, from its tokens
    probability: Literal["skip", "accept"] = "skip"  # what length_prob is the probability of
    bucket_rule: BucketRule = "even"
    # even: clips of a shape are divided by just these probabilities, and take the size of nearest ratio by its
    # logarithm; open_sora_2 and the others: every clip draws by itself, as the published code does, from a list of all
    # of the table. Those of 1.x have their own resolutions (144p to 4k, 256 to 2880; 1.3: also 360p_16d; 1.0: single
    # sizes, height first, as 256x256), and their clips are spread over a window (frame_interval)
    frame_interval: int | None = None  # bucket_rule open_sora_1_x: n frames are spread evenly over a window of n times
    # as many frames; null: 1. Other rules: every k-th frame, so that at most 24 a second remain
    unused_rows: Literal["error", "report"] = "error"  # a line of the bucket table that no clip fits
    micro_batches: int = 1  # per optimizer step, over all data-parallel processes, whatever their number
    balance_group: int = (
        1  # micro-batches joined to equal costs: steps are even on micro_batches / balance_group processes; 1: on any
    )
    tokens_per_sequence: int = 0  # join samples of any buckets, up to so many image tokens; 0: one bucket each
    crop: Literal["center", "random"] = "center"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # of scaled clips; bilinear: from the four nearest
    # pixels, as Open-Sora 1.x does; stills are always bicubic, antialiased
    prompt_suffix: bool = False  # append frame rate, motion score and camera motion, as far as known, to the caption
    workers: int = 2  # decoding processes per training process; 0 decodes in the training process
    prefetch: int = 2  # micro-batches each worker prepares ahead
    prefetch_mib: int = 4096  # what these may hold in memory together, per training process; one is always prepared
    worker_timeout_s: int = 300  # longest time in which no worker reads a clip before the run fails
    decoder: Literal["pyav", "decord", "torchcodec"] = "pyav"  # the latter two: optional packages, for plain clips
    decode_threads: int = 1  # per worker
    background: str = "white"  # shown through where a picture is transparent: a name as in CSS, or #rrggbb
    decode_timeout_s: float = 60.0  # for one sample; one that takes longer counts as unreadable
    max_bad_share: float = 0.01  # of the last 1000 samples of a process that may be unreadable before the run stops
    features: str = ""  # folder of opensora.cli.precompute: read latents and text features instead of files
    cache_mib: int = 0  # decoded windows that a training process keeps, for data sets that are read many times

    LIMITS: ClassVar[Limits] = {
        **dict.fromkeys(("micro_batches", "balance_group"), (10**6, "all are planned ahead")),
        **dict.fromkeys(("tokens_per_batch", "tokens_per_sequence"), (10**9, "no device holds more")),
        "cost_per_batch": (1e12, "0 sets no limit"),
        "frame_interval": (MAX_INTERVAL, "no clip is so long"),
        "workers": (1024, "each is a process"),
        "prefetch": (10_000, "prefetch_mib bounds them by memory"),
        **dict.fromkeys(("prefetch_mib", "cache_mib"), (2**24, "that is 16 TiB of a machine's memory")),
        **dict.fromkeys(("worker_timeout_s", "decode_timeout_s"), SECONDS),
        "decode_threads": (256, "each worker starts as many"),
    }

    def __post_init__(self) -> None:
        names: Any = [self.table] if isinstance(self.table, str) else self.table
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"table={self.table!r}: must be a path, a glob, or a list of these")
        _check_choice("probability", self.probability, ("skip", "accept"))
        _check_choice("bucket_rule", self.bucket_rule, get_args(BucketRule))
        self._check_rule()
        _check_choice("unused_rows", self.unused_rows, ("report", "error"))
        _check_choice("crop", self.crop, ("center", "random"))
        _check_choice("interpolation", self.interpolation, ("bicubic", "bilinear"))
        _check_choice("decoder", self.decoder, ("pyav", "decord", "torchcodec"))
        parse_colour(self.background)
        for name in (
            "micro_batches",
            "balance_group",
            "prefetch",
            "prefetch_mib",
            "worker_timeout_s",
            "decode_threads",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be an integer >= 1")
        if self.micro_batches % self.balance_group:
            raise ValueError(
                f"balance_group={self.balance_group}: must be a divisor of micro_batches={self.micro_batches}; "
                "micro_batches over the number of data-parallel processes suits"
            )
        for name in ("workers", "cache_mib", "tokens_per_batch", "cost_per_batch", "tokens_per_sequence"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number >= 0")
        if self.tokens_per_sequence and self.balance_group == 1:
            raise ValueError(
                f"balance_group=1: with tokens_per_sequence={self.tokens_per_sequence} must be a divisor of "
                f"micro_batches={self.micro_batches} from 2 on: so many are laid into sequences together"
            )
        if not 0 < self.decode_timeout_s < self.worker_timeout_s:
            raise ValueError(
                f"decode_timeout_s={self.decode_timeout_s:g}: must be a number above 0 and below "
                f"worker_timeout_s={self.worker_timeout_s}"
            )
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share={self.max_bad_share:g}: must be a number from 0 to 1")
        automatic = [row for row in bucket_rows(self) if row.batch_size is None]
        if automatic and not (self.tokens_per_batch or self.cost_per_batch):
            row = automatic[0]
            raise ValueError(
                f"buckets.{row.resolution}.{row.frames}: batch size auto needs a budget, give tokens_per_batch "
                "(memory) or cost_per_batch (time)"
            )

    @property
    def interval(self) -> int:
        """Frames of a window for each that is used, by the rules of Open-Sora 1.x."""
        return self.frame_interval or 1

    def _check_rule(self) -> None:
        """What the pairs of the bucket table are, and which clips have a window of their own."""
        rule = self.bucket_rule
        if rule == "open_sora_2" and self.probability == "accept":
            raise ValueError(
                "probability=accept: with bucket_rule=open_sora_2 must be skip, which is what that rule's pairs are"
            )
        if self.frame_interval is not None and rule not in RULES_1X:
            raise ValueError(
                f"frame_interval={self.frame_interval}: must be null with bucket_rule={rule}, which goes by the frame "
                f"rate; it is for {', '.join(RULES_1X)}"
            )
        if self.frame_interval is not None and self.frame_interval < 1:
            raise ValueError(f"frame_interval={self.frame_interval}: must be an integer >= 1, or null")
        pairs = rule in RULES_1X and any(is_pair(row) for rows in self.buckets.values() for row in rows.values())
        if pairs and rule in ("open_sora_1_0", "open_sora_1_1"):
            raise ValueError(
                f"buckets: with bucket_rule={rule} must have one probability a row, [keep_prob, batch_size]"
            )
        if pairs and self.probability == "skip":
            raise ValueError(
                f"probability=skip: with bucket_rule={rule} must be accept, which is what that rule's pairs are"
            )


def parse_colour(text: str) -> Colour:
    """
    Raises:
        ValueError: no colour, for the key ``background``.
    """
    allowed = "must be a colour such as white, black, gray or #8080ff"
    refusal = ValueError(f"background={short(repr(text), 40)}: {allowed}")
    with parsing(lambda _: refusal):
        parts = ImageColor.getrgb(text)
    if len(text) > _MOST_COLOUR or len(parts) != 3 or not all(0 <= part <= 255 for part in parts):
        raise refusal
    return parts


def bucket_rows(cfg: DataConfig) -> tuple[BucketRow, ...]:
    """The bucket table as rows in the order they are tried: larger areas first, then longer clips.

    Raises:
        ValueError: a row that cannot be read, with its key.
    """
    rows = [
        _parse_row(resolution, frames, value, cfg)
        for resolution, lengths in cfg.buckets.items()
        for frames, value in lengths.items()
    ]
    # Of equal areas the one whose name sorts first; in Open-Sora 1.x the one that is written first.
    names = list(cfg.buckets) if cfg.bucket_rule in RULES_1X else sorted(cfg.buckets)
    area = {name: area_of(name, cfg.bucket_rule) for name in names}
    return tuple(sorted(rows, key=lambda row: (-area[row.resolution], names.index(row.resolution), -row.frames)))


def is_pair(value: Any) -> bool:
    """Whether a row of the bucket table is written with two probabilities."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], (list, tuple))


def _parse_row(resolution: str, frames: int, value: Any, cfg: DataConfig) -> BucketRow:
    key = f"buckets.{resolution}.{frames}"
    try:
        area_of(resolution, cfg.bucket_rule)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    if not isinstance(frames, int) or not 1 <= frames <= MAX_FRAMES:
        raise ValueError(f"{key}: the number of frames must be an integer >= 1 and at most {MAX_FRAMES}")
    shape = "write [keep_prob, batch_size] or [[keep_prob, length_prob], batch_size]"
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"{key}={value!r}: {shape}")
    probabilities, batch_size = value
    paired = isinstance(probabilities, (list, tuple))
    pair = list(probabilities) if paired else [probabilities]
    if len(pair) != (2 if paired else 1) or not all(_is_probability(p) for p in pair):
        raise ValueError(f"{key}={value!r}: probabilities are numbers from 0 to 1; {shape}")
    if paired and frames == 1:
        raise ValueError(
            f"{key}={value!r}: an image has no other length to fall back to, write [keep_prob, batch_size]"
        )
    if batch_size == "auto":
        batch_size = None
    elif batch_size is None and cfg.bucket_rule in RULES_1X and pair == [0]:
        batch_size = 1  # a row that no clip is drawn for
    elif isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= MAX_BATCH:
        raise ValueError(
            f"{key}={value!r}: the batch size must be an integer >= 1 and at most {MAX_BATCH}, or auto; {shape}"
        )
    length = float(pair[1]) if paired else None
    accept = 1.0 if length is None else length if cfg.probability == "accept" else 1.0 - length
    return BucketRow(resolution=resolution, frames=frames, keep=float(pair[0]), accept=accept, batch_size=batch_size)


def _is_probability(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= 1.0


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
