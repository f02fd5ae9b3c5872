"""The ``engine:`` section: who does the work."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from opensora.utils.limits import Limits


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """It changes no byte of the table."""

    kind: Literal["local", "ray"] = "local"  # local: processes of this machine; Slurm: launch/submit.py pipeline
    workers: int = 0  # processes at a time; 0: local: one for each core, ray: as many as the cluster has room for
    address: str = ""  # ray: of a running cluster, such as auto or ray://host:10001; empty: one on this machine

    LIMITS: ClassVar[Limits] = {"workers": (4096, "each is a process")}

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers={self.workers}: must be an integer >= 0")
        if self.address and self.kind != "ray":
            raise ValueError(f"address={self.address}: only engine.kind=ray has one")
