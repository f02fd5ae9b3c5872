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


EXACT = {**FP64, **SGD}
# Text features are fp32, and attention over them has other sums on the device: that is the difference that is left.
CASES: dict[str, Case] = {
    "zero3 adamw fp32": Case(sampled=({}, {"guidance": 1.0}, {"text_osci": True}), near=1e-5),
    "zero0": Case({**EXACT, "parallel.zero": 0}, quick=False),
    "zero1": Case({**EXACT, "parallel.zero": 1}, quick=False),
    "zero2, no conditions, separate projections, half-split rope": Case(
        {
            **EXACT,
            "parallel.zero": 2,
            "model.cond_embed": "false",
            "model.fused_qkv": "false",
            "model.rope_layout": "half",
        },
        sampled=GUIDED,
    ),
    "optimizer on the host": Case({**FP64, "parallel.offload": "optimizer"}),
    "parameters on the host": Case({**FP64, "parallel.offload": "parameters"}, sampled=GUIDED),
    "recompute full": Case({**EXACT, "parallel.recompute.kind": "full"}, quick=False),
    "recompute full, inputs on the host": Case(
        {**EXACT, "parallel.recompute.kind": "full", "parallel.recompute.offload": "true"}
    ),
    "recompute first": Case(
        {**EXACT, "parallel.recompute.kind": "first", "parallel.recompute.blocks": 1}, quick=False
    ),
    "recompute every, prefetch": Case(
        {**EXACT, "parallel.recompute.kind": "every", "parallel.prefetch": 1}, quick=False
    ),
    "recompute selective, bf16": Case({**BF16, "parallel.recompute.kind": "selective"}, sampled=GUIDED, near=2e-2),
    "recompute selective, attention on the host": Case(
        {**EXACT, "parallel.recompute.kind": "selective", "parallel.recompute.offload": "true"}
    ),
    "attention cuda, fp32, masks": Case({"parallel.attention": "cuda", "text.mask": "true"}, sampled=GUIDED, near=1e-4),
    "attention cudnn, bf16": Case({**BF16, "parallel.attention": "cudnn"}, near=2e-2, quick=False),
    "attention math, masks": Case({**EXACT, "parallel.attention": "math", "text.mask": "true"}, quick=False),
    "masks": Case({**EXACT, "text.mask": "true"}, sampled=GUIDED, quick=False),
    "packed": Case({**EXACT, **PACKED}),
    "packed, masks": Case({**EXACT, **PACKED, "text.mask": "true"}),
    "packed, bf16, selective": Case({**BF16, **PACKED, "parallel.recompute.kind": "selective"}, near=2e-2),
    "guidance as an input": Case({**EXACT, "model.guidance_embed": "true"}, sampled=({"method": "distill"},)),
    "2 processes, ulysses": Case({**EXACT, "parallel.mesh.ulysses": 2}, world=2, sampled=GUIDED, quick=False),
    "2 processes, ring": Case({**EXACT, "parallel.mesh.ring": 2}, world=2, sampled=GUIDED, quick=False),
    "2 processes, tensor": Case({**EXACT, "parallel.mesh.tensor": 2}, world=2, sampled=GUIDED, quick=False),
    "2 processes, dynamic": Case({**EXACT, "parallel.mesh.ulysses": 2, "parallel.mesh.dynamic": "true"}, world=2),
    "2 processes, hybrid sharding": Case({**EXACT, "parallel.mesh.replicate": 2}, world=2, quick=False),
    "2 processes, packed over ulysses": Case({**EXACT, **PACKED, "parallel.mesh.ulysses": 2}, world=2, quick=False),
}

# (phase, "file:function", kind) -> why. Everything else is a fault. "upload" and "download" are copies between the
# device and memory that is not pinned; CUDA waits for what was asked of the device before.
Place = tuple[str, str, str]
GUARD = "opensora/train/health/anomaly_guard.py:_global"
PREPARE = "opensora/train/preparation.py"
BYTES = "opensora/models/text/bytes.py"
PACK = "opensora/train/packed_tokens.py:concat_packed"
WAITS: dict[Place, str] = {
    ("step", GUARD, "download"): "loss and gradient norm, once an update: the guard decides whether it is made",
    ("step", f"{PREPARE}:encode", "upload"): "pixels; from the loader they come pinned, and nothing waits",
    ("step", f"{PREPARE}:_encoded", "upload"): "noise and times, drawn on the CPU so that layouts and devices agree",
    ("step", f"{PREPARE}:<genexpr>", "upload"): "which samples lose their text",
    ("step", f"{PREPARE}:_cut", "upload"): "of a packed sequence, the sample of every token",
    ("step", f"{BYTES}:_word_rows", "upload"): "bytes of a prompt that was not encoded before",
    ("step", f"{BYTES}:encode", "upload"): "lengths of the prompts, where padding is masked",
    ("step", PACK, "shape"): "text that is masked takes no place in a packed sequence: its length is counted",
    ("step", PACK, "download"): "the same lengths, for what follows from them on the CPU",
    ("step", "acceleration/sequence/segments.py:of", "upload"): "order of the tokens of a packed sequence",
    ("step", "acceleration/sequence/segments.py:ends", "upload"): "where samples begin in it, for kernels that want that",
    ("step", "acceleration/optim/cpu_optimizer.py:step", "download"): "gradients, to the optimizer on the host",
    ("step", "acceleration/engines/native.py:_update", "download"): "parameters on the host: the factor of clipping",
    ("step", "acceleration/sharding/fsdp.py:to_mesh_device", "upload"): "parameters on the host: parts of their norm",
    ("sample", "opensora/sampling/noise.py:get_noise", "upload"): "start noise, once a clip",
    ("sample", f"{BYTES}:_word_rows", "upload"): "a prompt, once a clip",
    ("sample", f"{BYTES}:encode", "upload"): "the same",
}
