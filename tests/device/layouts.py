"""Every option of the way that a step takes on a device, and how often the host may wait on it."""

from dataclasses import dataclass, field
from typing import Any

FP64 = {f"parallel.precision.{name}": "fp64" for name in ("compute", "reduce", "master")}
SGD = {"optim.kind": "sgd", "optim.lr": 0.05}
PACKED = {"data.tokens_per_sequence": 200, "data.micro_batches": 2, "data.balance_group": 2}
BF16 = {"parallel.precision.compute": "bf16"}
GUIDED: tuple[dict[str, Any], ...] = ({},)


@dataclass(frozen=True)
class Case:
    """One configuration, and how near it comes to the same on the CPU."""

    changes: dict[str, Any] = field(default_factory=dict)
    world: int = 1
    sampled: tuple[dict[str, Any], ...] = ()  # options of SamplingOption
    near: float = 1e-6  # relative, of loss and norm; prompts are encoded in fp32
    quick: bool = True


def slow(*changes: dict[str, Any], world: int = 1, near: float = 1e-6) -> Case:
    """One option by itself."""
    merged = {key: value for change in changes for key, value in change.items()}
    return Case(merged, world=world, sampled=GUIDED, near=near, quick=False)


# Text features are fp32, and attention over them has other sums on the device: that is the difference that is left.
EXACT = {**FP64, **SGD}
MASKS = {"text.mask": "true"}
FULL, FIRST, EVERY, SELECTIVE = ({"parallel.recompute.kind": kind} for kind in ("full", "first", "every", "selective"))
ON_HOST = {"parallel.recompute.offload": "true"}
CASES: dict[str, Case] = {
    # Each option is in one of the first; by itself it is in one of the others.
    "zero3 adamw fp32": Case(sampled=({}, {"guidance": 1.0}), near=1e-5),
    "zero2, optimizer and inputs on the host, half-split rope, no conditions": Case(
        {
            **FP64,
            **FULL,
            **ON_HOST,
            "parallel.zero": 2,
            "parallel.offload": "optimizer",
            "model.rope_layout": "half",
            "model.fused_qkv": "false",
            "model.cond_embed": "false",
        }
    ),
    "parameters on the host, recompute first, guidance as an input": Case(
        {
            **EXACT,
            **FIRST,
            "parallel.recompute.blocks": 1,
            "parallel.offload": "parameters",
            "parallel.prefetch": 1,
            "model.guidance_embed": "true",
        },
        sampled=({"method": "distill"},),
    ),
    "packed, masks, selective, attention on the host": Case({**EXACT, **PACKED, **MASKS, **SELECTIVE, **ON_HOST}),
    "packed, bf16, selective": slow(BF16, PACKED, SELECTIVE, near=2e-2),
    "attention cuda, fp32, masks": Case({**MASKS, "parallel.attention": "cuda"}, sampled=GUIDED, near=1e-4),
    "2 processes, dynamic": Case({**EXACT, "parallel.mesh.ulysses": 2, "parallel.mesh.dynamic": "true"}, world=2),
    # minutes
    "zero0": slow(EXACT, {"parallel.zero": 0}),
    "zero1": slow(EXACT, {"parallel.zero": 1}),
    "zero3": slow(EXACT),
    "optimizer on the host": slow(EXACT, {"parallel.offload": "optimizer"}),
    "parameters on the host": slow(EXACT, {"parallel.offload": "parameters"}),
    "recompute full": slow(EXACT, FULL),
    "recompute full, inputs on the host": slow(EXACT, FULL, ON_HOST),
    "recompute first": slow(EXACT, FIRST, {"parallel.recompute.blocks": 1}),
    "recompute every, prefetch": slow(EXACT, EVERY, {"parallel.prefetch": 1}),
    "recompute every, inputs on the host": slow(EXACT, EVERY, ON_HOST),
    "recompute selective": slow(EXACT, SELECTIVE),
    "recompute selective, attention on the host": slow(EXACT, SELECTIVE, ON_HOST),
    "bf16": slow(BF16, near=2e-2),
    "bf16, selective": slow(BF16, SELECTIVE, near=2e-2),
    "attention cudnn, bf16": slow(BF16, {"parallel.attention": "cudnn"}, near=2e-2),
    "attention math, masks": slow(EXACT, MASKS, {"parallel.attention": "math"}),
    "masks": slow(EXACT, MASKS),
    "packed": slow(EXACT, PACKED),
    "packed, masks": slow(EXACT, PACKED, MASKS),
    "2 processes, zero3": slow(EXACT, world=2),
    "2 processes, ulysses": slow(EXACT, {"parallel.mesh.ulysses": 2}, world=2),
    "2 processes, ring": slow(EXACT, {"parallel.mesh.ring": 2}, world=2),
    "2 processes, tensor": slow(EXACT, {"parallel.mesh.tensor": 2}, world=2),
    "2 processes, hybrid sharding": slow(EXACT, {"parallel.mesh.replicate": 2}, world=2),
    "2 processes, packed over ulysses": slow(EXACT, PACKED, {"parallel.mesh.ulysses": 2}, world=2),
}

# (phase, "file:function", kind) -> why. Everything else is a fault. "upload" and "download" are copies between the
# device and memory that is not pinned; CUDA waits for what was asked of the device before.
Place = tuple[str, str, str]
GUARD = "opensora/train/health/anomaly_guard.py:_global"
ENCODERS = "opensora/assembly/encoders.py"
BYTES = "opensora/models/text/bytes.py"
FSDP = "torch/_fsdp_collectives.py:foreach_reduce"
PACK = "opensora/train/packed_tokens.py:concat_packed"
WAITS: dict[Place, str] = {
    ("step", GUARD, "download"): "loss and gradient norm, once an update: the guard decides whether it is made",
    ("step", f"{ENCODERS}:encode", "upload"): "pixels; from the loader they come pinned, and nothing waits",
    ("step", f"{BYTES}:_word_rows", "upload"): "bytes of a prompt that was not encoded before",
    ("step", f"{BYTES}:encode", "upload"): "lengths of the prompts, where padding is masked",
    ("step", PACK, "shape"): "text that is masked takes no place in a packed sequence: its length is counted",
    ("step", PACK, "download"): "the same lengths, for what follows from them on the CPU",
    ("step", "acceleration/sequence/segments.py:of", "upload"): "order of the tokens of a packed sequence",
    ("step", "acceleration/sequence/segments.py:ends", "upload"): "where samples begin in it, for some kernels",
    ("step", "acceleration/optim/cpu_optimizer.py:step", "download"): "gradients, to the optimizer on the host",
    ("step", "acceleration/engines/native.py:_update", "download"): "parameters on the host: the factor of clipping",
    ("step", "acceleration/sharding/fsdp.py:to_mesh_device", "upload"): "parameters on the host: parts of their norm",
    ("step", FSDP, "download"): "parameters on the host: gradients that are added to those of earlier micro-batches",
    ("sample", "opensora/sampling/noise.py:get_noise", "upload"): "start noise, once a clip",
    ("sample", f"{BYTES}:_word_rows", "upload"): "a prompt, once a clip",
    ("sample", f"{BYTES}:encode", "upload"): "the same",
}
