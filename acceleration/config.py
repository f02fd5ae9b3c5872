"""How a run is spread over processes: frozen configuration, checked before any process group exists.

``LIMITS`` of a class: the most that a field may be, and why not more; who reads a configuration holds it to them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

Limits: TypeAlias = Mapping[str, tuple[float, str]]

_BLOCKS = (10_000, "no model has more blocks")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Degrees of the named axes. Their product is the number of processes."""

    replicate: int = 1  # data-parallel copies of the sharded model (hybrid sharding)
    shard: int = -1  # data-parallel processes; -1: all that are left. State is cut over shard x cfg x ring x ulysses
    cfg: int = 1  # sampling only: processes that compute the passes of guidance at the same time; 2 or 3
    ring: int = 1  # processes that share one sample's tokens, passing keys and values around
    ulysses: int = 1  # processes that share one sample's tokens, exchanging heads for tokens in attention
    tensor: int = 1  # processes that share every layer's heads and hidden units, for the same tokens
    dynamic: bool = False  # training: samples are cut over as many processes of ulysses as pay; docs/parallel.md

    LIMITS: ClassVar[Limits] = dict.fromkeys(
        ("replicate", "shard", "ring", "ulysses", "tensor"), (10**6, "no launcher starts more processes")
    )

    def __post_init__(self) -> None:
        open_axes = []
        degrees = {name: degree for name, degree in vars(self).items() if name != "dynamic"}
        for name, degree in degrees.items():
            if degree == -1 and name != "replicate":
                open_axes.append(name)
            elif degree < 1:
                remaining = "" if name == "replicate" else ", or -1 for all remaining processes"
                raise ValueError(f"{name}={degree}: must be an integer >= 1{remaining}")
        if len(open_axes) > 1:
            both = " with ".join(f"{name}=-1" for name in open_axes)
            raise ValueError(f"{both}: only one axis can take all remaining processes")
        if self.cfg > 3:
            raise ValueError(f"cfg={self.cfg}: must be one of 1, 2 and 3, as guidance has at most three passes")
        if self.dynamic and self.ring != 1:
            raise ValueError(f"ring={self.ring}: allowed with dynamic=true is 1; use ulysses, or dynamic=false")
        if self.dynamic and self.ulysses == 1:
            raise ValueError("dynamic=true with ulysses=1 leaves nothing to choose: raise ulysses, or dynamic=false")


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """Gradient checkpointing: which blocks drop their activations and run again in backward."""

    kind: Literal["none", "full", "first", "every", "selective"] = "none"  # selective: all but attention runs again
    blocks: int = 0  # with kind=first: how many blocks, counted over all block lists in order
    every: int = 2  # with kind=every: one block of so many, counted the same way
    offload: bool = False  # what recomputed blocks keep waits on the CPU

    LIMITS: ClassVar[Limits] = {"blocks": _BLOCKS, "every": _BLOCKS}

    def __post_init__(self) -> None:
        if self.blocks < 0:
            raise ValueError(f"blocks={self.blocks}: must be an integer >= 0")
        if self.kind == "first" and self.blocks == 0:
            raise ValueError("blocks=0 with kind=first recomputes nothing: set blocks >= 1, or kind=none")
        if self.every < 2:
            raise ValueError(f"every={self.every}: must be an integer >= 2; kind=full recomputes every block")
        if self.offload and self.kind == "none":
            raise ValueError("offload=true with kind=none moves nothing: choose another kind, such as kind=full")


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """torch.compile of every block; what exchanges tensors between processes runs as it is."""

    enabled: bool = False
    backend: Literal["inductor", "aot_eager"] = "inductor"  # aot_eager makes no kernels: for tests
    dynamic: bool = True  # one graph for token counts of every bucket; false: one for each, at most eight


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Masters, optimizer state and EMA are kept in ``master``; blocks compute in ``compute``."""

    compute: Literal["bf16", "fp32", "fp64"] = "bf16"
    reduce: Literal["fp32", "bf16", "fp64"] = "fp32"  # gradient reduction
    master: Literal["fp32", "fp64", "bf16"] = "fp32"  # bf16 is for sampling: updates would be lost in rounding


Attention: TypeAlias = Literal["auto", "math", "cpu", "cuda", "cudnn", "flash_attn", "flash_attn_3", "flex"]
FusedKernel: TypeAlias = Literal["torch", "apex", "auto"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The whole layout of a run."""

    engine: Literal["native", "deepspeed", "colossalai"] = "native"  # docs/parallel.md says what each is for
    attention: Attention = "auto"  # kernel; auto: torch's for the device
    norm_kernel: FusedKernel = "torch"  # of layer norms and RMS norms; auto: NVIDIA apex's where it is installed
    zero: Literal[0, 1, 2, 3] = 2  # what is sharded; docs/parallel.md says what each keeps in memory
    mesh: MeshConfig = field(default_factory=MeshConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    offload: Literal["none", "optimizer", "parameters"] = "none"  # what is in CPU memory; docs/parallel.md says more
    prefetch: int = 0  # blocks gathered ahead of their use; 0: as FSDP2 does by itself, one ahead in backward
    timeout_s: int = 600  # longest wait for a peer before the run fails
    # GLOO_SOCKET_IFNAME wins over it; NCCL_SOCKET_IFNAME chooses that of nccl, which is left alone.
    interface: str = ""  # network interface of gloo; eth0,ens3: the first that a host has; empty: where hosts have met

    LIMITS: ClassVar[Limits] = {"prefetch": _BLOCKS, "timeout_s": (30 * 24 * 3600, "30 days")}

    def __post_init__(self) -> None:
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s={self.timeout_s}: must be an integer > 0")
        if self.prefetch < 0:
            raise ValueError(f"prefetch={self.prefetch}: must be an integer >= 0; 0 leaves it to FSDP2")
        if self.norm_kernel == "apex" and self.compile.enabled:
            raise ValueError(
                "norm_kernel=apex: must be torch or auto with compile.enabled=true, which fuses norms with what is "
                "around them"
            )
        if self.engine != "native":
            self._check_vendor()

    def _check_vendor(self) -> None:
        """That an engine that cuts the state by itself can do what is asked.

        Raises:
            ValueError: the key, what is allowed with this engine, and what would work.
        """
        engine, precision = self.engine, self.precision
        with_it, or_native = f"allowed with engine={engine}", "or engine=native"
        if self.mesh.tensor != 1:
            raise ValueError(f"mesh.tensor={self.mesh.tensor}: {with_it} is 1; use mesh.ulysses, {or_native}")
        if self.zero == 0 and (precision.compute == "bf16" or self.offload != "none"):
            only = "precision.compute=fp32 and offload=none only"
            raise ValueError(f"zero=0: {with_it} and {only}; set these, or zero=1, {or_native}")
        if self.zero == 0 and engine == "colossalai":
            self._check_one_type()
        elif precision.master != "fp32":
            raise ValueError(f"precision.master={precision.master}: {with_it} is fp32; use that, {or_native}")
        for name in ("compute", "reduce"):
            value = getattr(precision, name)
            if value == "fp64" != precision.master:
                raise ValueError(f"precision.{name}=fp64: {with_it} are fp32 and bf16; use one of them, {or_native}")
        if self.compile.enabled:
            raise ValueError(f"compile.enabled=true: {with_it} is false; use that, {or_native}")
        if self.offload == "parameters" or self.prefetch:
            name = "offload" if self.offload == "parameters" else "prefetch"
            allowed = "none and optimizer" if name == "offload" else "0"
            raise ValueError(f"{name}={getattr(self, name)}: {with_it} is {allowed}; use that, {or_native}")
        if self.zero == 3 and engine == "colossalai" and precision.compute != "bf16":
            raise ValueError(
                f"precision.compute={precision.compute}: {with_it} and zero=3 is bf16; use that, or zero=2"
            )

    def _check_one_type(self) -> None:
        """That weights are kept, computed with and summed in one type: ColossalAI's ZeRO 0 is torch's DDP."""
        p = self.precision
        for name in ("master", "reduce"):
            value = getattr(p, name)
            if value != p.compute:
                raise ValueError(
                    f"precision.{name}={value}: allowed with engine=colossalai and zero=0 is that of "
                    f"precision.compute, {p.compute}; use that, or engine=native"
                )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: train a small matrix product beside chosen layers, and leave the weights as they are."""

    rank: int = 0  # inner size of every adapter; 0: no adapters, all weights are trained
    alpha: float | None = None  # an adapter's output is scaled by alpha/rank; null: alpha=rank
    dropout: float = 0.0  # must be 0: blocks draw no random numbers, so that recomputation and layouts agree
    targets: tuple[str, ...] | None = None  # layers with an adapter: * stands for one part of a name, and what is not a
    # linear layer is passed over; null: those that the model's family names
    # blocks: frozen weights of blocks stream from pinned CPU memory, one block ahead, in forward and in backward
    offload: Literal["none", "blocks"] = "none"
    export_names: Literal["comfyui", "diffusers", "kohya", "peft"] = "comfyui"  # of exported adapters: docs/models.md

    LIMITS: ClassVar[Limits] = {"rank": (65536, "no layer is wider"), "alpha": (1e6, "products would overflow")}

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank={self.rank}: must be an integer >= 0; 0 switches adapters off")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha}: must be a number > 0, or null for alpha=rank")
        if self.dropout:
            raise ValueError(f"dropout={self.dropout}: must be 0, as blocks draw no random numbers")
        if self.offload != "none" and not self.rank:
            raise ValueError(
                f"offload={self.offload}: streams frozen weights, and with rank=0 all are trained; use "
                "parallel.offload=parameters, or rank > 0"
            )
        if self.targets is not None and not self.targets:
            raise ValueError(
                "targets=[]: must name layers, or be null for those that the model's family names; rank=0 is none"
            )

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and everything about it that varies with the step."""

    kind: Literal["adamw", "sgd"] = "adamw"
    kernel: FusedKernel = "torch"  # of adamw; apex: FusedAdam of NVIDIA apex; auto: that, where it is installed
    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # bound on the global gradient norm; 0: no bound
    warmup_steps: int = 0  # linear from 0 to lr, which the last of them has
    initial_lr: float | None = None  # warm-up is linear from here to lr, which the step after it has; null: from 0
    schedule: Literal["constant", "cosine"] = "constant"  # after warm-up
    min_lr: float = 0.0  # where cosine ends
    ema_decay: float = 0.0  # 0: no moving average of the weights
    ema_warmup: bool = True  # decay min(ema_decay, (1 + step) / (10 + step)), so that early averages forget the init

    LIMITS: ClassVar[Limits] = {
        **dict.fromkeys(("lr", "eps", "weight_decay", "min_lr", "initial_lr"), (1e3, "weights would overflow")),
        "clip_norm": (1e9, "0 sets no bound"),
        "warmup_steps": (10**9, "a step a second would take 30 years"),
    }

    def __post_init__(self) -> None:
        if self.kernel == "apex" and self.kind != "adamw":
            raise ValueError(f"kernel=apex: allowed with kind=adamw only, and this is {self.kind}; use kernel=torch")
        for name in ("lr", "eps", "weight_decay", "clip_norm", "warmup_steps", "min_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number >= 0")
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas={list(self.betas)}: must be two numbers in [0, 1)")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: must be a number in [0, 1); 0 switches it off")
        if self.initial_lr is not None and not 0 <= self.initial_lr <= self.lr:
            raise ValueError(f"initial_lr={self.initial_lr}: must be a number from 0 to lr={self.lr}, or null")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr}: must be a number <= lr={self.lr}")


def check_apex(optim: OptimConfig, parallel: ParallelConfig) -> None:
    """That the update is made where apex's Adam is, on masters of a type that it has.

    Raises:
        ValueError: the key that keeps it from that.
    """
    allowed = {"engine": ("native",), "offload": ("none",), "precision.master": ("fp32", "bf16")}
    found = {"engine": parallel.engine, "offload": parallel.offload, "precision.master": parallel.precision.master}
    for name, values in allowed.items():
        if optim.kernel == "apex" and found[name] not in values:
            raise ValueError(
                f"parallel.{name}={found[name]}: must be {' or '.join(values)} with optim.kernel=apex; or "
                "optim.kernel=torch"
            )
