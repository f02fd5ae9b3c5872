"""DiT, Latte and PixArt equal diffusers' models on random weights, where these mean the same.

diffusers' Latte is the one for prompts, whose blocks share one modulation and read text: with attention to the text
that adds nothing, and the same table for all, it is a case of ours.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from opensora.models.dit import DiTConfig
from opensora.models.families import build_model, family_of
from opensora.models.latte import LatteConfig
from opensora.models.pixart import PixArtConfig, PixArtMSConfig, PixArtSigmaConfig
from opensora.models.weights.patches import PUBLISHED
from opensora.models.weights.reader import load_into
from opensora.models.weights.writer import convert_state_dict, save_state_dict
from opensora.utils.tokens import image_ids, pack, unpack

LIMIT = 1e-5
D, HEADS, SIDE, TEXT = 48, 4, 12, 10  # width, heads, side in latents, width of a text token


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).abs().max() / truth.abs().max())


def random_weights(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def ours(cfg: Any, published: dict[str, Tensor]) -> nn.Module:
    """Our model with weights under the family's names."""
    format, model = family_of(cfg).weights, build_model(cfg)
    model.load_state_dict(convert_state_dict(published, format, source=PUBLISHED, to=format.layout(cfg)))
    return model.eval()


def positions(latents: Tensor, *, factored: bool = False) -> Tensor:
    _, _, frames, height, width = latents.shape
    ids = image_ids((frames, height, width), (1, 2, 2)).expand(len(latents), -1, -1)
    return ids.unflatten(1, (frames, -1)) if factored else ids


def attention(source: dict[str, Tensor], there: str, here: str, *, fused: tuple[str, ...] = ("q", "k", "v")) -> Any:
    """to_q, to_k, to_v of diffusers as one layer, and its last one."""
    found = {}
    for kind in ("weight", "bias"):
        found[f"{here}.{kind}"] = torch.cat([source[f"{there}.to_{part}.{kind}"] for part in fused])
        found[f"{here.rpartition('.')[0]}.proj.{kind}"] = source[f"{there}.to_out.0.{kind}"]
    return found


def renamed(source: dict[str, Tensor], pairs: dict[str, str]) -> dict[str, Tensor]:
    return {f"{here}.{kind}": source[f"{there}.{kind}"] for here, there in pairs.items() for kind in ("weight", "bias")}


def exported(model: nn.Module, cfg: Any, state: dict[str, Tensor], folder: Path) -> None:
    """A file in the family's names has its weights, and loads strictly."""
    format, path = family_of(cfg).weights, folder / "model.safetensors"
    save_state_dict(model.state_dict(), path, format, source=format.layout(cfg), to=PUBLISHED)
    written = load_file(path)
    assert written.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(written[name].flatten(), value.flatten()), name
    again = build_model(cfg)
    report = load_into(again, path, format, to=format.layout(cfg))
    assert report.fits and not report.left_at_init
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_dit_equals_diffusers(tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    theirs = DiTTransformer2DModel(HEADS, D // HEADS, 4, 8, 2, sample_size=SIDE, num_embeds_ada_norm=7, norm_eps=1e-6)
    w = random_weights(theirs)
    for name in list(w):  # every block of theirs has embedders of its own
        if ".norm1.emb." in name:
            w[name] = w[f"transformer_blocks.0.{name.split('.', 2)[2]}"]
    theirs.load_state_dict(w, strict=False)
    for found in theirs.transformer_blocks:  # theirs divides by 127 where DiT divides by 128
        found.norm1.emb.time_proj.downscale_freq_shift = 0
    emb = "transformer_blocks.0.norm1.emb"
    top = {"x_embedder.proj": "pos_embed.proj", "t_embedder.mlp.0": f"{emb}.timestep_embedder.linear_1"}
    top |= {"t_embedder.mlp.2": f"{emb}.timestep_embedder.linear_2", "final_layer.linear": "proj_out_2"}
    state = renamed(w, top | {"final_layer.adaLN_modulation.1": "proj_out_1"})
    state["y_embedder.embedding_table.weight"] = w[f"{emb}.class_embedder.embedding_table.weight"]
    for i in range(2):
        block, of = f"blocks.{i}", f"transformer_blocks.{i}"
        state |= attention(w, f"{of}.attn1", f"{block}.attn.qkv")
        mlp = {f"{block}.mlp.fc1": f"{of}.ff.net.0.proj", f"{block}.mlp.fc2": f"{of}.ff.net.2"}
        state |= renamed(w, mlp | {f"{block}.adaLN_modulation.1": f"{of}.norm1.linear"})
    cfg = DiTConfig(hidden_size=D, depth=2, num_heads=HEADS, condition="label_7", no_temporal_pos_emb=True)
    model = ours(cfg, state)
    x, t, y = torch.randn(2, 4, SIDE, SIDE), torch.tensor([3, 977]), torch.tensor([2, 7])  # 7: no class
    with torch.no_grad():
        truth = theirs.eval()(x, t, y).sample
        stills = x[:, :, None]
        found = model(pack(stills, 2), t, y, positions=positions(stills))
    assert relative(unpack(found, (1, SIDE, SIDE), 2)[:, :, 0], truth) <= LIMIT
    exported(model, cfg, state, tmp_path)


@pytest.mark.parametrize("grid", [(4, 7), (6, 6), (1, 3)])
@pytest.mark.parametrize("kind", [PixArtConfig, PixArtMSConfig, PixArtSigmaConfig])
def test_pixart_equals_diffusers(kind: Any, grid: tuple[int, int], tmp_path: Path) -> None:
    """Of grids that are square or not, with texts of several lengths; told the size of the image or not."""
    told_sizes = kind is PixArtMSConfig
    from diffusers import PixArtTransformer2DModel

    theirs = PixArtTransformer2DModel(
        HEADS,
        D // HEADS,
        num_layers=2,
        cross_attention_dim=D,
        sample_size=SIDE,
        interpolation_scale=2,
        use_additional_conditions=told_sizes,
        caption_channels=TEXT,
    )
    w = random_weights(theirs)
    single = "adaln_single"
    top = {"x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out", "t_block.1": f"{single}.linear"}
    embedders = {"t_embedder": "timestep_embedder"}
    if told_sizes:
        embedders |= {"csize_embedder": "resolution_embedder", "ar_embedder": "aspect_ratio_embedder"}
    for here, there in embedders.items():
        top |= {f"{here}.mlp.{2 * i}": f"{single}.emb.{there}.linear_{i + 1}" for i in range(2)}
    top |= {f"y_embedder.y_proj.fc{i}": f"caption_projection.linear_{i}" for i in (1, 2)}
    state = renamed(w, top)
    state["final_layer.scale_shift_table"] = w["scale_shift_table"]
    state["y_embedder.y_embedding"] = torch.zeros(5, TEXT)
    for i in range(2):
        block, of = f"blocks.{i}", f"transformer_blocks.{i}"
        state |= attention(w, f"{of}.attn1", f"{block}.attn.qkv")
        state |= attention(w, f"{of}.attn2", f"{block}.cross_attn.kv_linear", fused=("k", "v"))
        mlp = {f"{block}.mlp.fc1": f"{of}.ff.net.0.proj", f"{block}.mlp.fc2": f"{of}.ff.net.2"}
        state |= renamed(w, mlp | {f"{block}.cross_attn.q_linear": f"{of}.attn2.to_q"})
        state[f"{block}.scale_shift_table"] = w[f"{of}.scale_shift_table"]
    cfg = kind(
        hidden_size=D,
        depth=2,
        num_heads=HEADS,
        caption_channels=TEXT,
        model_max_length=5,
        space_scale=2.0,
        base_size=SIDE,
        no_temporal_pos_emb=True,
    )
    model = ours(cfg, state)
    height, width = 2 * grid[0], 2 * grid[1]
    x, t = torch.randn(2, 4, height, width), torch.tensor([3.0, 977.0])
    y, mask = torch.randn(2, 5, TEXT), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    info = {"hw": torch.tensor([[64.0, 112.0], [512.0, 896.0]]), "ar": torch.tensor([[0.57], [1.7]])}
    added = {"resolution": info["hw"], "aspect_ratio": info["ar"]} if told_sizes else {}
    added = added or {"resolution": None, "aspect_ratio": None}
    stills = x[:, :, None]
    with torch.no_grad():
        truth = theirs.eval()(x, y, t, added, encoder_attention_mask=mask).sample
        found = model(
            pack(stills, 2),
            t,
            y,
            mask,
            info if told_sizes else None,
            positions=positions(stills),
            grid=(1, *grid),
        )
    assert relative(unpack(found, (1, height, width), 2)[:, :, 0], truth) <= LIMIT
    exported(model, cfg, state, tmp_path)


def test_latte_equals_diffusers() -> None:
    """At one time: their last layer knows no weights for it."""
    from diffusers import LatteTransformer3DModel

    frames, pairs = 5, 2
    theirs = LatteTransformer3DModel(
        HEADS,
        D // HEADS,
        4,
        8,
        pairs,
        cross_attention_dim=D,
        attention_bias=True,
        sample_size=SIDE,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT,
        video_length=frames,
    )
    w = random_weights(theirs)
    for name in list(w):
        if ".attn2.to_out.0." in name:  # text adds nothing
            w[name] = torch.zeros_like(w[name])
    theirs.load_state_dict(w, strict=False)
    time = "adaln_single.emb.timestep_embedder"
    top = {"x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out"}
    state = renamed(w, top | {f"t_embedder.mlp.{2 * i}": f"{time}.linear_{i + 1}" for i in range(2)})
    state["y_embedder.embedding_table.weight"] = torch.zeros(4, D)
    for i in range(2 * pairs):
        block, of = f"blocks.{i}", f"{'temporal_' if i % 2 else ''}transformer_blocks.{i // 2}"
        state |= attention(w, f"{of}.attn1", f"{block}.attn.qkv")
        state |= renamed(w, {f"{block}.mlp.fc1": f"{of}.ff.net.0.proj", f"{block}.mlp.fc2": f"{of}.ff.net.2"})
        state[f"{block}.adaLN_modulation.1.weight"] = w["adaln_single.linear.weight"]
        table = w[f"{of}.scale_shift_table"].flatten()
        state[f"{block}.adaLN_modulation.1.bias"] = w["adaln_single.linear.bias"] + table
    t = torch.tensor([421, 421])
    with torch.no_grad():
        vector = theirs.adaln_single.emb.timestep_embedder(theirs.adaln_single.emb.time_proj(t[:1]))[0]
    state["final_layer.adaLN_modulation.1.weight"] = torch.zeros(2 * D, D)
    state["final_layer.adaLN_modulation.1.bias"] = (w["scale_shift_table"] + vector).flatten()
    model = ours(LatteConfig(hidden_size=D, depth=2 * pairs, num_heads=HEADS, condition="label_3"), state)
    x, y = torch.randn(2, 4, frames, SIDE, SIDE), torch.randn(2, 6, TEXT)
    with torch.no_grad():
        truth = theirs.eval()(x, t, y).sample
        tokens = pack(x, (1, 2, 2)).unflatten(1, (frames, -1))
        found = model(tokens, t, torch.tensor([0, 3]), positions=positions(x, factored=True))
    assert relative(unpack(found.flatten(1, 2), (frames, SIDE, SIDE), 2), truth) <= LIMIT
