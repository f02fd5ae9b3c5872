"""Latte and PixArt of ours and of diffusers, with the same weights and the same inputs: what step_1x.py compares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opensora.models.families import build_model, family_of
from opensora.models.latte import LatteConfig
from opensora.models.pixart import PixArtConfig
from opensora.models.weights.patches import PUBLISHED
from opensora.models.weights.writer import convert_state_dict
from opensora.utils.tokens import image_ids, pack, unpack

TIME = 421  # of all samples: diffusers' Latte adds it to its last layer, where ours has weights for it


@dataclass(frozen=True)
class Shape:
    """Of a model and of what it reads."""

    hidden: int
    heads: int
    depth: int
    batch: int
    frames: int
    side: int  # latents along a side of a frame
    text: int = 120  # tokens, those of PixArt; the samples hold others
    caption: int = 256  # channels of a text token

    def __str__(self) -> str:
        tokens = self.frames * (self.side // 2) ** 2
        return f"width {self.hidden}, {self.depth} blocks, batch {self.batch}, {self.frames} frames, {tokens} tokens"


@dataclass
class Rival:
    """A model, its arguments, and where its first layer is."""

    model: nn.Module
    given: dict[str, Any]
    first: nn.Parameter
    latents: Callable[[Tensor], Tensor]  # its output as (B, C, T, H, W)

    def output(self) -> Tensor:
        found = self.model(**self.given)
        return found[0] if isinstance(found, tuple) else found


def latte_pair(shape: Shape) -> tuple[nn.Module, nn.Module]:
    """(ours, diffusers'), with the same weights. On one time; see the module's docstring."""
    from diffusers import LatteTransformer3DModel

    theirs = LatteTransformer3DModel(
        shape.heads,
        shape.hidden // shape.heads,
        4,
        8,
        shape.depth // 2,
        attention_bias=True,
        sample_size=shape.side,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=shape.caption,
        video_length=shape.frames,
    )
    w = dict(theirs.named_parameters())
    state = renamed(w, TOP | {"y_embedder.embedding_table.weight": ""})
    state["y_embedder.embedding_table.weight"] = torch.zeros(2, shape.hidden)
    for index in range(shape.depth):
        there = f"{'temporal_' if index % 2 else ''}transformer_blocks.{index // 2}"
        state |= block_weights(w, f"blocks.{index}", there)
        state[f"blocks.{index}.adaLN_modulation.1.weight"] = w["adaln_single.linear.weight"]
        table = w[f"{there}.scale_shift_table"].flatten()
        state[f"blocks.{index}.adaLN_modulation.1.bias"] = w["adaln_single.linear.bias"] + table
    embedder = theirs.adaln_single.emb
    vector = embedder.timestep_embedder(embedder.time_proj(torch.tensor([TIME])))[0]
    state["final_layer.adaLN_modulation.1.weight"] = torch.zeros(2 * shape.hidden, shape.hidden)
    state["final_layer.adaLN_modulation.1.bias"] = (w["scale_shift_table"] + vector).flatten()
    cfg = LatteConfig(hidden_size=shape.hidden, depth=shape.depth, num_heads=shape.heads, condition="label_1")
    return loaded(cfg, state), theirs


def pixart_pair(shape: Shape) -> tuple[nn.Module, nn.Module]:
    """(ours, diffusers'), with the same weights."""
    from diffusers import PixArtTransformer2DModel

    theirs = PixArtTransformer2DModel(
        shape.heads,
        shape.hidden // shape.heads,
        num_layers=shape.depth,
        cross_attention_dim=shape.hidden,
        sample_size=shape.side,
        interpolation_scale=1,
        use_additional_conditions=False,
        caption_channels=shape.caption,
    )
    w = dict(theirs.named_parameters())
    texts = {f"y_embedder.y_proj.fc{i}": f"caption_projection.linear_{i}" for i in (1, 2)}
    state = renamed(w, TOP | texts | {"t_block.1": "adaln_single.linear"})
    state["final_layer.scale_shift_table"] = w["scale_shift_table"]
    state["y_embedder.y_embedding"] = torch.zeros(shape.text, shape.caption)
    for index in range(shape.depth):
        here, there = f"blocks.{index}", f"transformer_blocks.{index}"
        state |= block_weights(w, here, there)
        state |= joined(w, f"{there}.attn2", ("k", "v"), f"{here}.cross_attn.kv_linear")
        cross = {f"{here}.cross_attn.q_linear": "to_q", f"{here}.cross_attn.proj": "to_out.0"}
        state |= renamed(w, {ours: f"{there}.attn2.{name}" for ours, name in cross.items()})
        state[f"{here}.scale_shift_table"] = w[f"{there}.scale_shift_table"]
    cfg = PixArtConfig(
        hidden_size=shape.hidden,
        depth=shape.depth,
        num_heads=shape.heads,
        caption_channels=shape.caption,
        model_max_length=shape.text,
        base_size=shape.side,
        no_temporal_pos_emb=True,
    )
    return loaded(cfg, state), theirs


TIME_EMBEDDER = "adaln_single.emb.timestep_embedder"
TOP = {  # ours: diffusers'
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.linear": "proj_out",
    "t_embedder.mlp.0": f"{TIME_EMBEDDER}.linear_1",
    "t_embedder.mlp.2": f"{TIME_EMBEDDER}.linear_2",
}


def renamed(w: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Weights and biases of layers, under our names."""
    return {
        f"{here}.{kind}": w[f"{there}.{kind}"] for here, there in names.items() for kind in ("weight", "bias") if there
    }


def joined(w: dict[str, Tensor], there: str, parts: tuple[str, ...], here: str) -> dict[str, Tensor]:
    """Layers to q, k and v as one."""
    return {
        f"{here}.{kind}": torch.cat([w[f"{there}.to_{part}.{kind}"] for part in parts]) for kind in ("weight", "bias")
    }


def block_weights(w: dict[str, Tensor], here: str, there: str) -> dict[str, Tensor]:
    """Attention among tokens and MLP of a block."""
    names = {"attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
    return joined(w, f"{there}.attn1", ("q", "k", "v"), f"{here}.attn.qkv") | renamed(
        w, {f"{here}.{ours}": f"{there}.{name}" for ours, name in names.items()}
    )


def loaded(cfg: Any, published: dict[str, Tensor]) -> nn.Module:
    """Our model, with weights under the names of published files."""
    model, format = build_model(cfg), family_of(cfg).weights
    weights = {name: tensor.detach().clone() for name, tensor in published.items()}
    model.load_state_dict(convert_state_dict(weights, format, source=PUBLISHED, to=format.layout(cfg)))
    return model


def latte_rivals(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Rival]:
    ours, theirs = (nn.Module.to(model, device, dtype).train() for model in latte_pair(shape))
    x = drawn(shape.batch, 4, shape.frames, shape.side, shape.side).to(device, dtype)
    t = torch.full((shape.batch,), TIME, device=device)
    ids = image_ids((shape.frames, shape.side, shape.side), (1, 2, 2), device).expand(shape.batch, -1, -1)
    tokens = (part.unflatten(1, (shape.frames, -1)) for part in (pack(x, (1, 2, 2)), ids))
    label = torch.zeros(shape.batch, dtype=torch.int64, device=device)
    mine = dict(zip(("x", "positions"), tokens, strict=True)) | {"t": t, "y": label}
    text = drawn(shape.batch, 1, shape.caption).to(device, dtype)
    other = {"hidden_states": x, "timestep": t, "encoder_hidden_states": text, "return_dict": False}
    grid = (shape.frames, shape.side, shape.side)
    return {
        "ours": Rival(ours, mine, first_layer(ours), lambda found: unpack(found.flatten(1, 2), grid, 2)),
        "diffusers": Rival(theirs, other, theirs.pos_embed.proj.weight, lambda found: found),  # type: ignore[union-attr, arg-type]
    }


def pixart_rivals(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Rival]:
    ours, theirs = (nn.Module.to(model, device, dtype).train() for model in pixart_pair(shape))
    x = drawn(shape.batch, 4, shape.side, shape.side).to(device, dtype)
    t = torch.full((shape.batch,), TIME, device=device)
    text = drawn(shape.batch, shape.text, shape.caption).to(device, dtype)
    lengths = torch.linspace(1, shape.text, shape.batch).int()
    mask = (torch.arange(shape.text) < lengths[:, None]).to(device)
    grid, side = (1, shape.side, shape.side), shape.side // 2
    ids = image_ids(grid, (1, 2, 2), device).expand(shape.batch, -1, -1)
    mine: dict[str, Any] = {"x": pack(x[:, :, None], 2), "y": text, "mask": mask, "positions": ids}
    mine |= {"timestep": t, "grid": (1, side, side)}
    other: dict[str, Any] = {"hidden_states": x, "timestep": t, "encoder_hidden_states": text, "return_dict": False}
    other |= {"encoder_attention_mask": mask, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return {
        "ours": Rival(ours, mine, first_layer(ours), lambda found: unpack(found, grid, 2)),
        "diffusers": Rival(theirs, other, theirs.pos_embed.proj.weight, lambda found: found[:, :, None]),  # type: ignore[union-attr, arg-type]
    }


RIVALS = {"latte": latte_rivals, "pixart": pixart_rivals}


def first_layer(model: nn.Module) -> nn.Parameter:
    found: nn.Parameter = model.x_embedder.weight  # type: ignore[assignment, union-attr]
    return found


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
