"""Files of the published layouts and sizes load strictly, and a process reads its pieces alone.

The files are written here from the published names and shapes, as headers with nothing behind them: a file system keeps
no block of what was never written, and reads it as zeros.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from acceleration.diagnostics.memory_usage import Allocations
from opensora.assembly.initial_weights import check_weights
from opensora.models.families import MODEL_SIZES, build_model, family_of
from opensora.models.mmdit import MMDiTConfig
from opensora.models.text import TEXT_ENCODERS, T5ClipConfig
from opensora.models.text.weights import open_clip, open_t5
from opensora.models.weights.reader import WeightFile, load_state_dict_for
from opensora.utils.errors import UserError

Shapes = dict[str, tuple[int, ...]]
PROCESSES = 256
BYTES = {"BF16": 2, "F16": 2, "F32": 4}
SIZE: MMDiTConfig = MODEL_SIZES["mmdit"]["11b"]
FLUX_DEV = replace(SIZE, guidance_embed=True, cond_embed=False, fused_qkv=True, rope_layout="interleaved")
OPEN_SORA_2 = replace(SIZE, guidance_embed=False, cond_embed=True, fused_qkv=False, rope_layout="half")


def write_zeros(path: Path, shapes: Shapes, dtype: str = "BF16") -> Path:
    """A safetensors file of zeros that takes no more disk than its header."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def denoiser(*, fused: bool, guidance: bool, cond: bool, width: int = 3072) -> Shapes:
    """SEMANTICS of the 11B model and of Flux dev: 19 double and 38 single blocks, 24 heads of 128."""
    found: list[tuple[str, tuple[int, ...]]] = [*linear("img_in", 64, width), *linear("txt_in", 4096, width)]
    embedders = [("time_in", 256), ("vector_in", 768), *([("guidance_in", 256)] if guidance else [])]
    for name, inputs in embedders:
        found += [*linear(f"{name}.in_layer", inputs, width), *linear(f"{name}.out_layer", width, width)]
    if cond:
        found += linear("cond_in", 68, width)
    parts = [("qkv", 3)] if fused else [("q_proj", 1), ("k_proj", 1), ("v_proj", 1)]
    for block in range(19):
        for stream in ("img", "txt"):
            start = f"double_blocks.{block}.{stream}"
            found += linear(f"{start}_mod.lin", width, 6 * width)
            for name, count in parts:
                found += linear(f"{start}_attn.{name}", width, count * width)
            found += [(f"{start}_attn.norm.{norm}_norm.scale", (128,)) for norm in ("query", "key")]
            found += linear(f"{start}_attn.proj", width, width)
            found += [*linear(f"{start}_mlp.0", width, 4 * width), *linear(f"{start}_mlp.2", 4 * width, width)]
    single = [("linear1", 7)] if fused else [("q_proj", 1), ("k_proj", 1), ("v_mlp", 5)]
    for block in range(38):
        start = f"single_blocks.{block}"
        for name, count in single:
            found += linear(f"{start}.{name}", width, count * width)
        found += [*linear(f"{start}.linear2", 5 * width, width), *linear(f"{start}.modulation.lin", width, 3 * width)]
        found += [(f"{start}.norm.{norm}_norm.scale", (128,)) for norm in ("query", "key")]
    found += [*linear("final_layer.linear", width, 64), *linear("final_layer.adaLN_modulation.1", width, 2 * width)]
    return dict(found)


def t5_xxl(*, decoder: bool) -> Shapes:
    """T5 v1.1 XXL: 24 layers of 4096, 64 heads of 64, gated feed-forward of 10240."""
    found: Shapes = {"shared.weight": (32128, 4096)}
    halves = [("encoder", ["SelfAttention", "DenseReluDense"])]
    if decoder:
        halves.append(("decoder", ["SelfAttention", "EncDecAttention", "DenseReluDense"]))
        found["lm_head.weight"] = (32128, 4096)
    for half, layers in halves:
        found[f"{half}.embed_tokens.weight"] = (32128, 4096)
        found[f"{half}.final_layer_norm.weight"] = (4096,)
        found[f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
        for block in range(24):
            for number, layer in enumerate(layers):
                start = f"{half}.block.{block}.layer.{number}"
                found[f"{start}.layer_norm.weight"] = (4096,)
                if layer == "DenseReluDense":
                    found |= {f"{start}.{layer}.{name}.weight": (10240, 4096) for name in ("wi_0", "wi_1")}
                    found[f"{start}.{layer}.wo.weight"] = (4096, 10240)
                else:
                    found |= {f"{start}.{layer}.{name}.weight": (4096, 4096) for name in "qkvo"}
    return found


def clip_l() -> Shapes:
    """CLIP ViT-L/14, the half that reads: 12 layers of 768, 77 positions of 49,408 tokens; and some of its eyes."""
    start = "text_model.encoder.layers"
    found: Shapes = {
        "logit_scale": (),
        "text_projection.weight": (768, 768),
        "visual_projection.weight": (768, 1024),
        "vision_model.embeddings.class_embedding": (1024,),
        "text_model.embeddings.position_embedding.weight": (77, 768),
        "text_model.embeddings.token_embedding.weight": (49408, 768),
        **dict.fromkeys(("text_model.final_layer_norm.weight", "text_model.final_layer_norm.bias"), (768,)),
    }
    for layer in range(12):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= linear(f"{start}.{layer}.self_attn.{name}", 768, 768)
        found |= dict(linear(f"{start}.{layer}.mlp.fc1", 768, 3072)) | dict(
            linear(f"{start}.{layer}.mlp.fc2", 3072, 768)
        )
        for norm in ("layer_norm1", "layer_norm2"):
            found |= {f"{start}.{layer}.{norm}.{part}": (768,) for part in ("weight", "bias")}
    return found


def count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def check_pieces(file: WeightFile, module: torch.nn.Module, stored: Shapes, dtype: str, every: int) -> None:
    """That process 1 of ``PROCESSES`` reads its rows of every so many tensors, and holds no more than them beside what
    is mapped of a file, one tensor at a time."""
    kept: list[torch.Tensor] = []
    chosen = list(module.state_dict().items())[::every]
    with Allocations() as seen:
        for name, tensor in chosen:
            rows = -(-tensor.shape[0] // PROCESSES)
            part = torch.empty(min(rows, tensor.shape[0] - rows), *tensor.shape[1:], dtype=torch.bfloat16)
            assert file.read_part(name, (rows, *(0 for _ in tensor.shape[1:])), part)
            kept.append(part)
    assert all(not part.any() for part in kept)
    held, whole = sum(part.nbytes for part in kept), sum(2 * tensor.numel() for _, tensor in chosen)
    mapped = max(math.prod(shape) for shape in stored.values()) * BYTES[dtype]
    assert held < 1.05 * whole / PROCESSES and seen.peak <= held + mapped + 8 * max(part.nbytes for part in kept)


EVERY = [7, pytest.param(1, marks=pytest.mark.slow)]


DENOISERS = {
    "flux1-dev": (FLUX_DEV, {"fused": True, "guidance": True, "cond": False}, 11_901_408_320),
    "Open_Sora_v2": (
        OPEN_SORA_2,
        {"fused": False, "guidance": False, "cond": True},
        11_901_408_320 - 10_229_760 + 211_968,
    ),
}


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers(name: str, every: int, tmp_path: Path) -> None:
    """Whole into the layout they are in and into ours; one of 64 processes reads a 64th."""
    cfg, layout, parameters = DENOISERS[name]
    shapes = denoiser(**layout)
    assert count(shapes) == parameters
    path = write_zeros(tmp_path / f"{name}.safetensors", shapes)
    check_weights("weights", path, cfg)
    ours = replace(cfg, fused_qkv=not cfg.fused_qkv, rope_layout="half")
    check_weights("weights", path, ours)
    with torch.device("meta"):
        model = build_model(ours)
    format = family_of(ours).weights
    file, report = load_state_dict_for(model, path, format, to=format.layout(ours))
    assert report.fits and sum(math.prod(shape) for shape in file.shapes.values()) == parameters
    check_pieces(file, model, shapes, "BF16", every)
    del shapes["final_layer.linear.bias"]
    write_zeros(path, {**shapes, "final_layer.linear.more": (1,)})
    with pytest.raises(
        UserError, match=r"1 missing: final_layer\.linear\.bias; 1 unexpected: final_layer\.linear\.more"
    ):
        check_weights("weights", path, cfg)


CONFIGS: dict[str, dict[str, Any]] = {
    "t5": {
        **{"model_type": "t5", "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24},
        **{"num_heads": 64, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    },
    "clip": {
        "model_type": "clip",
        "text_config": {
            **{"model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072, "vocab_size": 49408},
            **{"num_hidden_layers": 12, "num_attention_heads": 12},
        },
    },
}


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("decoder", [True, False])
def test_text_encoders(decoder: bool, every: int, tmp_path: Path) -> None:
    """T5 in fp32 in four shards with an index, with its decoder or without; CLIP in one file."""
    for name, stated in CONFIGS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(stated))
    shapes = t5_xxl(decoder=decoder)
    names, where = list(shapes), {}
    for number in range(4):
        part = f"model-{number + 1:05d}-of-00004.safetensors"
        write_zeros(tmp_path / "t5" / part, {name: shapes[name] for name in names[number::4]}, "F32")
        where |= dict.fromkeys(names[number::4], part)
    (tmp_path / "t5" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    write_zeros(tmp_path / "clip" / "model.safetensors", clip_l(), "F32")
    cfg = T5ClipConfig(t5_path=str(tmp_path / "t5"), clip_path=str(tmp_path / "clip"))
    TEXT_ENCODERS[cfg.kind].check(cfg)
    t5, clip = open_t5("t5_path", cfg.t5_path), open_clip("clip_path", cfg.clip_path)
    for opened, stored, parameters in ((t5, shapes, 4_762_310_656), (clip, clip_l(), 123_060_480)):
        assert sum(tensor.numel() for tensor in opened.module.parameters()) == parameters
        check_pieces(opened.file, opened.module, stored, "F32", every)
