"""The MMDiT of one sample, from tokens to velocities, over a dict of weights with separate projections."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

from tests.reference import draws

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The options of the model that formulas depend on."""

    heads: int
    axes: tuple[int, int, int]  # rotary channels of a head for (t, h, w)
    depth: int
    depth_single: int
    rope: Literal["interleaved", "half"]
    theta: float = 10000.0


def velocity(
    weights: Weights,
    shape: Shape,
    *,
    img: Tensor,
    ids: Tensor,
    txt: Tensor,
    vec: Tensor,
    time: Tensor,
    cond: Tensor | None,
    guidance: float | None,
) -> Tensor:
    """(N, C) for image tokens (N, C) at coordinates (N, 3), text (L, D), pooled text (D,) and a time in [0, 1]."""
    img, txt, vec, time = img.double(), txt.double(), vec.double(), time.double()
    modulation = _mlp_embedder(weights, "time_in", _waves(time)) + _mlp_embedder(weights, "vector_in", vec)
    if guidance is not None:
        modulation = modulation + _mlp_embedder(weights, "guidance_in", _waves(torch.tensor(guidance).double()))
    x = _linear(weights, "img_in", img)
    if cond is not None:
        x = x + _linear(weights, "cond_in", cond.double())
    y = _linear(weights, "txt_in", txt)
    angles = _angles(torch.cat([torch.zeros(len(y), 3), ids]).double(), shape)
    for block in range(shape.depth):
        x, y = _double(weights, f"double_blocks.{block}", x, y, modulation, angles, shape)
    both = torch.cat([y, x])
    for block in range(shape.depth_single):
        both = _single(weights, f"single_blocks.{block}", both, modulation, angles, shape)
    shift, scale = _linear(weights, "final_layer.adaLN_modulation.1", silu(modulation)).chunk(2)
    return _linear(weights, "final_layer.linear", (1 + scale) * _norm(both[len(y) :]) + shift)


def _double(
    w: Weights, name: str, img: Tensor, txt: Tensor, modulation: Tensor, angles: Tensor, shape: Shape
) -> tuple[Tensor, Tensor]:
    """Two streams with weights of their own, one attention over cat(text, image)."""
    parts, heads = {}, []
    for stream, x in (("txt", txt), ("img", img)):
        parts[stream] = _linear(w, f"{name}.{stream}_mod.lin", silu(modulation)).chunk(6)
        shift, scale = parts[stream][:2]
        h = (1 + scale) * _norm(x) + shift
        heads.append([_linear(w, f"{name}.{stream}_attn.{p}_proj", h) for p in "qkv"])
        for i, norm in ((0, "query_norm"), (1, "key_norm")):
            heads[-1][i] = _head_norm(heads[-1][i], w[f"{name}.{stream}_attn.norm.{norm}.scale"], shape)
    q, k, v = (torch.cat(pair) for pair in zip(*heads, strict=True))
    attended = _attention(q, k, v, angles, shape).split([len(txt), len(img)])
    updated = {}
    for (stream, x), a in zip((("txt", txt), ("img", img)), attended, strict=True):
        _, _, gate, shift, scale, mlp_gate = parts[stream]
        x = x + gate * _linear(w, f"{name}.{stream}_attn.proj", a)
        inner = gelu(_linear(w, f"{name}.{stream}_mlp.0", (1 + scale) * _norm(x) + shift), approximate="tanh")
        updated[stream] = x + mlp_gate * _linear(w, f"{name}.{stream}_mlp.2", inner)
    return updated["img"], updated["txt"]


def _single(w: Weights, name: str, x: Tensor, modulation: Tensor, angles: Tensor, shape: Shape) -> Tensor:
    """One stream; attention and MLP side by side. ``v_mlp`` is v and the inner layer of the MLP in one."""
    shift, scale, gate = _linear(w, f"{name}.modulation.lin", silu(modulation)).chunk(3)
    h = (1 + scale) * _norm(x) + shift
    q = _head_norm(_linear(w, f"{name}.q_proj", h), w[f"{name}.norm.query_norm.scale"], shape)
    k = _head_norm(_linear(w, f"{name}.k_proj", h), w[f"{name}.norm.key_norm.scale"], shape)
    v_mlp = _linear(w, f"{name}.v_mlp", h)
    v, inner = v_mlp[:, : x.shape[1]], v_mlp[:, x.shape[1] :]
    attended = _attention(q, k, v, angles, shape)
    return x + gate * _linear(w, f"{name}.linear2", torch.cat([attended, gelu(inner, approximate="tanh")], dim=1))


def _attention(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, shape: Shape) -> Tensor:
    q, k, v = (part.unflatten(1, (shape.heads, -1)).transpose(0, 1) for part in (q, k, v))  # (H, L, Dh)
    q, k = _rotated(q, angles, shape), _rotated(k, angles, shape)
    weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return (weights @ v).transpose(0, 1).flatten(1)


def _angles(ids: Tensor, shape: Shape) -> Tensor:
    """(L, Dh/2): position * theta^(-2 i / channels of the axis), axis by axis."""
    columns = [
        ids[:, axis] * shape.theta ** (-i / dim) for axis, dim in enumerate(shape.axes) for i in range(0, dim, 2)
    ]
    return torch.stack(columns, dim=1)


def _rotated(x: Tensor, angles: Tensor, shape: Shape) -> Tensor:
    """Pairs of channels turned by their angle: (2d, 2d+1) interleaved, (d, Dh/2 + d) half-split."""
    if shape.rope == "interleaved":
        a, b = x[..., 0::2], x[..., 1::2]
    else:
        a, b = x.chunk(2, dim=-1)
    turned = (a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos())
    return torch.stack(turned, dim=-1).flatten(-2) if shape.rope == "interleaved" else torch.cat(turned, dim=-1)


def _head_norm(x: Tensor, scale: Tensor, shape: Shape) -> Tensor:
    heads = x.unflatten(1, (shape.heads, -1))
    return (heads / (heads.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * scale).flatten(1)


def _norm(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=1e-6)


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _mlp_embedder(w: Weights, name: str, x: Tensor) -> Tensor:
    return _linear(w, f"{name}.out_layer", silu(_linear(w, f"{name}.in_layer", x)))


def _waves(t: Tensor) -> Tensor:
    """256 channels: cos, then sin, of 1000 t 10000^(-i / 128)."""
    angles = 1000 * t * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    return torch.cat([angles.cos(), angles.sin()])


def initial(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Weights that a run starts from: norms one; biases, modulations, cond_in and the last layer zero; every other
    matrix uniform with variance 1 / inputs, drawn in fp32 with the key (seed, "init", name)."""
    found = {}
    for name, size in shapes.items():
        zero = name.endswith(".bias") or name.startswith(("cond_in", "final_layer")) or ".lin." in f"{name}."
        if name.endswith(".scale"):
            found[name] = torch.ones(size, dtype=torch.float64)
        elif zero or "_mod.lin" in name or "modulation.lin" in name:
            found[name] = torch.zeros(size, dtype=torch.float64)
        else:
            bound = math.sqrt(3 / size[1])
            generator = torch.Generator().manual_seed(draws.key(seed, "init", name))
            found[name] = torch.empty(size).uniform_(-bound, bound, generator=generator).double()
    return found


def adapters(weights: Weights, rank: int, seed: int) -> dict[str, Tensor]:
    """What adapters of all attention and MLP layers start from: A uniform within 1 / sqrt(inputs), B zero."""
    found = {}
    for name in weights:
        layer, _, kind = name.rpartition(".")
        parts = layer.split(".")
        double = parts[0] == "double_blocks" and len(parts) == 4 and parts[2].endswith(("_attn", "_mlp"))
        single = parts[0] == "single_blocks" and len(parts) == 3
        if kind == "weight" and (double or single):
            outputs, inputs = weights[name].shape
            a, bound = f"{layer}.lora_A.weight", 1 / math.sqrt(inputs)
            generator = torch.Generator().manual_seed(draws.key(seed, "init", a))
            found[a] = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator).double()
            found[f"{layer}.lora_B.weight"] = torch.zeros(outputs, rank, dtype=torch.float64)
    return found


def with_adapters(weights: Weights, trained: Weights, scale: float) -> dict[str, Tensor]:
    """W + scale B A where there is an adapter."""
    found = dict(weights)
    for name in trained:
        layer, a, _ = name.partition(".lora_A.weight")
        if a:
            found[f"{layer}.weight"] = (
                weights[f"{layer}.weight"] + scale * trained[f"{layer}.lora_B.weight"] @ trained[name]
            )
    return found
