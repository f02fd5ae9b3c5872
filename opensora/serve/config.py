"""The configuration of the service: ``configs/serve/demo.yaml``. Imports no torch, as the web process does not."""

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from opensora.utils.limits import Limits

DEMO = "configs/sample/demo.yaml"
_SIZE = re.compile(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model under the name that requests call it by."""

    sample: str = DEMO  # configuration for sampling; what it states is the default of a request
    weights: str | None = None  # run folder, export folder or safetensors file; null: as the configuration says
    options: dict[str, Any] = field(default_factory=dict)  # more keys of the configuration, as sampling.num_steps: 20
    loras: dict[str, str] = field(default_factory=dict)  # name in requests -> LoRA file, or folder of an export
    sizes: tuple[str, ...] = ()  # WxH that the page offers; (): the configuration's area at 16:9, 1:1 and 9:16
    max_frames: int = 0  # longest clip; 0: what fits the memory of a device

    LIMITS: ClassVar[Limits] = {"max_frames": (1_000_000, "hours of video")}

    def __post_init__(self) -> None:
        for size in self.sizes:
            if not _SIZE.fullmatch(size):
                raise ValueError(f"sizes={size}: must be WIDTHxHEIGHT in pixels, as 256x256")
        if self.max_frames < 0:
            raise ValueError(f"max_frames={self.max_frames}: must be an integer >= 0; 0 is what fits the memory")


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """The group of processes that samples."""

    processes: int = 1  # torchrun starts so many; 0: none here, another command has --worker-only
    batch_size: int = 8  # like jobs that are denoised together
    exact: bool = (
        True  # a clip has the same bits in a batch as alone: where it would not, one by one; false: it may not
    )
    batch_wait_s: float = 0.2  # longest that a job waits for others of its batch, while others wait
    lease_s: float = 60.0  # a job whose group has not been heard of for so long goes to another
    attempts: int = 3  # of one job; then it is failed
    grace_s: float = 60.0  # after SIGTERM the running job may end; then it goes back into the queue

    LIMITS: ClassVar[Limits] = {
        "processes": (4096, "one host has no more"),
        "batch_size": (1024, "they are denoised together, in memory"),
        "batch_wait_s": (60.0, "people wait"),
        "lease_s": (86400.0, "a lost job would wait for a day"),
        "attempts": (100, "what fails so often never ends well"),
        "grace_s": (86400.0, "a stop would take a day"),
    }

    def __post_init__(self) -> None:
        for name, least in (("processes", 0), ("batch_size", 1), ("attempts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be an integer >= {least}")
        for name, above in (("batch_wait_s", False), ("lease_s", True), ("grace_s", False)):
            value = getattr(self, name)
            if value < 0 or (above and value < 1):
                raise ValueError(f"{name}={value}: must be a number >= {1 if above else 0}")


@dataclass(frozen=True, kw_only=True)
class QuotaConfig:
    """How much may be asked and kept."""

    queued: int = 1000  # jobs that wait, of all keys
    queued_per_key: int = 50  # jobs that wait, of one
    body_mib: float = 20.0  # of a request
    image_pixels: int = 50_000_000  # of a reference
    keep_hours: float = 0.0  # finished jobs and their files are removed after so long; 0: kept
    keep_gib: float = 0.0  # most that all files may take; the oldest go first; 0: no limit
    free_gib: float = 1.0  # a job is refused (507) where the disk has less left

    LIMITS: ClassVar[Limits] = {
        "queued": (1_000_000, "they are listed"),
        "queued_per_key": (1_000_000, "they are listed"),
        "body_mib": (4096.0, "it is read into memory"),
        "image_pixels": (500_000_000, "it is decoded in memory"),
        "keep_hours": (1e6, "a century"),
        "keep_gib": (1e9, "no disk is so large"),
        "free_gib": (1e9, "no disk is so large"),
    }

    def __post_init__(self) -> None:
        for name in ("queued", "queued_per_key", "image_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be an integer >= 1")
        for name in ("body_mib", "keep_hours", "keep_gib", "free_gib"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number >= 0")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Web process, queue, files and workers of one service."""

    models: dict[str, ServedModel] = field(default_factory=lambda: {"demo": ServedModel()})  # the first is the default
    weights: str | None = None  # of the first model, in place of what its entry says
    out: str = "outputs/serve"  # queue, videos, references
    queue: str = ""  # "": SQLite in out, for one host; postgresql://...: for many, which share out
    host: str = "127.0.0.1"  # address that the web process listens on; another than this host's own needs keys
    port: int = 8000  # 0: a free one, which is said
    keys: str | None = None  # file with one API key per line; null: none are asked for
    origins: tuple[str, ...] = ()  # web pages of other addresses that may call the API (CORS)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    quota: QuotaConfig = field(default_factory=QuotaConfig)

    LIMITS: ClassVar[Limits] = {"port": (65535, "TCP has no more")}

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models={}: must name one model or more, as models: {demo: {sample: FILE}}")
        if self.port < 0:
            raise ValueError(f"port={self.port}: must be an integer from 0 to 65535")
        if not self.out:
            raise ValueError("out='': must be the folder for queue and videos")
        if self.host not in LOOPBACK and self.keys is None:
            raise ValueError(
                f"host={self.host}: others could use the service; must have keys=FILE (one API key per line), "
                "or be 127.0.0.1"
            )
