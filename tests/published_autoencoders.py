"""What published files of autoencoders hold: names and shapes, written out; and small files of the same layout.

Nothing here asks the code under test: HunyuanVideo's names are those of diffusers, the others follow the releases.
"""

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

Shapes = dict[str, tuple[int, ...]]
WIDTHS = (128, 256, 512, 512)


def conv(shapes: Shapes, name: str, outputs: int, inputs: int, *kernel: int, bias: bool = True) -> None:
    shapes[f"{name}.weight"] = (outputs, inputs, *kernel)
    if bias:
        shapes[f"{name}.bias"] = (outputs,)


def norm(shapes: Shapes, name: str, width: int) -> None:
    shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)


def hunyuan_vae(widths: tuple[int, ...] = WIDTHS, layers: int = 2, channels: int = 16) -> Shapes:
    """hunyuan_vae.safetensors."""
    from diffusers import AutoencoderKLHunyuanVideo

    with torch.device("meta"):
        model = AutoencoderKLHunyuanVideo(
            block_out_channels=widths, layers_per_block=layers, latent_channels=channels, norm_num_groups=widths[0] // 4
        )
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def ae(widths: tuple[int, ...] = WIDTHS, layers: int = 2, channels: int = 16) -> Shapes:
    """ae.safetensors."""
    shapes: Shapes = {}
    for side, count in (("encoder", layers), ("decoder", layers + 1)):
        deepest = widths[-1]
        ends = (3, widths[0], 2 * channels, deepest) if side == "encoder" else (channels, deepest, 3, widths[0])
        conv(shapes, f"{side}.conv_in", ends[1], ends[0], 3, 3)
        norm(shapes, f"{side}.norm_out", ends[3])
        conv(shapes, f"{side}.conv_out", ends[2], ends[3], 3, 3)
        for block in ("block_1", "block_2"):
            _flux_block(shapes, f"{side}.mid.{block}", deepest, deepest)
        norm(shapes, f"{side}.mid.attn_1.norm", deepest)
        for layer in ("q", "k", "v", "proj_out"):
            conv(shapes, f"{side}.mid.attn_1.{layer}", deepest, deepest, 1, 1)
        for level, width in enumerate(widths):
            neighbour = level - 1 if side == "encoder" else level + 1
            before = widths[min(max(neighbour, 0), len(widths) - 1)]
            stage = f"{side}.{'down' if side == 'encoder' else 'up'}.{level}"
            for block in range(count):
                _flux_block(shapes, f"{stage}.block.{block}", width, before if block == 0 else width)
            if side == "encoder" and level < len(widths) - 1:
                conv(shapes, f"{stage}.downsample.conv", width, width, 3, 3)
            if side == "decoder" and level > 0:
                conv(shapes, f"{stage}.upsample.conv", width, width, 3, 3)
    return shapes


def _flux_block(shapes: Shapes, name: str, width: int, before: int) -> None:
    norm(shapes, f"{name}.norm1", before)
    conv(shapes, f"{name}.conv1", width, before, 3, 3)
    norm(shapes, f"{name}.norm2", width)
    conv(shapes, f"{name}.conv2", width, width, 3, 3)
    if width != before:
        conv(shapes, f"{name}.nin_shortcut", width, before, 1, 1)


def video_dc_ae(
    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024),
    encoder: tuple[int, ...] = (2, 2, 2, 3, 3, 3),
    decoder: tuple[int, ...] = (3,) * 6,
    channels: int = 128,
) -> Shapes:
    """F32T4C128_AE.safetensors."""
    shapes: Shapes = {}
    last = len(widths) - 1
    conv(shapes, "encoder.project_in.conv", widths[0], 3, 3, 3, 3)
    conv(shapes, "encoder.project_out.main.op_list.0.conv", channels, widths[-1], 3, 3, 3)
    conv(shapes, "decoder.project_in.main.conv", widths[-1], channels, 3, 3, 3)
    norm(shapes, "decoder.project_out.op_list.0", widths[0])
    conv(shapes, "decoder.project_out.op_list.2.conv", 3, widths[0], 3, 3, 3)
    for stage, width in enumerate(widths):
        for block in range(encoder[stage]):
            _dc_block(shapes, f"encoder.stages.{stage}.op_list.{block}", width, attends=stage > 2)
        first = 0 if stage == last else 1
        for block in range(decoder[stage]):
            _dc_block(shapes, f"decoder.stages.{stage}.op_list.{first + block}", width, attends=stage > 2)
        if stage < last:
            down = f"encoder.stages.{stage}.op_list.{encoder[stage]}.main.conv"
            conv(shapes, down, widths[stage + 1], width, 3, 3, 3)
            conv(shapes, f"decoder.stages.{stage}.op_list.0.main.conv.conv", width, widths[stage + 1], 3, 3, 3)
    return shapes


def _dc_block(shapes: Shapes, name: str, width: int, *, attends: bool) -> None:
    if not attends:
        conv(shapes, f"{name}.main.conv1.conv", width, width, 3, 3, 3)
        conv(shapes, f"{name}.main.conv2.conv", width, width, 3, 3, 3, bias=False)
        norm(shapes, f"{name}.main.conv2.norm", width)
        return
    context, local = f"{name}.context_module.main", f"{name}.local_module.main"
    conv(shapes, f"{context}.qkv.conv", 3 * width, width, 1, 1, 1, bias=False)
    conv(shapes, f"{context}.aggreg.0.0", 3 * width, 1, 5, 5, 5, bias=False)
    conv(shapes, f"{context}.aggreg.0.1", 3 * width, 32, 1, 1, 1, bias=False)
    conv(shapes, f"{context}.proj.conv", width, 2 * width, 1, 1, 1, bias=False)
    norm(shapes, f"{context}.proj.norm", width)
    conv(shapes, f"{local}.inverted_conv.conv", 8 * width, width, 1, 1, 1)
    conv(shapes, f"{local}.depth_conv.conv", 8 * width, 1, 3, 3, 3)
    conv(shapes, f"{local}.point_conv.conv", width, 4 * width, 1, 1, 1, bias=False)
    norm(shapes, f"{local}.point_conv.norm", width)


def sd_vae(widths: tuple[int, ...] = WIDTHS, layers: int = 2, channels: int = 4) -> Shapes:
    """diffusion_pytorch_model.safetensors of stabilityai/sd-vae-ft-ema, in the names of now."""
    shapes = ae(widths, layers, channels)
    shapes = {_in_diffusers(name, len(widths)): _without_dots(name, shape) for name, shape in shapes.items()}
    conv(shapes, "quant_conv", 2 * channels, 2 * channels, 1, 1)
    conv(shapes, "post_quant_conv", channels, channels, 1, 1)
    return shapes


def _in_diffusers(name: str, levels: int) -> str:
    parts = name.split(".")
    if parts[1] in ("down", "up"):
        level = int(parts[2]) if parts[1] == "down" else levels - 1 - int(parts[2])
        kind = {"block": "resnets", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}[parts[3]]
        name = ".".join([parts[0], f"{parts[1]}_blocks", str(level), kind, *parts[4:]])
    renamed = {"mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1"}
    renamed |= {"mid.attn_1.norm": "mid_block.attentions.0.group_norm", "mid.attn_1.proj_out": "mid.attn_1.to_out.0"}
    renamed |= {f"mid.attn_1.{x}.": f"mid.attn_1.to_{x}." for x in "qkv"}
    renamed |= {"mid.attn_1": "mid_block.attentions.0", "nin_shortcut": "conv_shortcut", ".norm_out": ".conv_norm_out"}
    for old, new in renamed.items():
        name = name.replace(old, new)
    return name


def _without_dots(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution of the attention is a matrix."""
    return shape[:2] if "mid.attn_1" in name and len(shape) == 4 else shape


def opensora_v1_2(widths: tuple[int, ...] = WIDTHS, layers: int = 2, filters: int = 128, blocks: int = 4) -> Shapes:
    """model.safetensors of hpcai-tech/OpenSora-VAE-v1.2."""
    shapes: Shapes = {f"spatial_vae.module.{name}": shape for name, shape in sd_vae(widths, layers).items()}
    shapes["scale"] = shapes["shift"] = (1, 4, 1, 1, 1)
    levels = [filters * factor for factor in (1, 2, 2, 4)]
    encoder, decoder = "temporal_vae.encoder", "temporal_vae.decoder"
    conv(shapes, f"{encoder}.conv_in.conv", filters, 4, 3, 3, 3, bias=False)
    conv(shapes, f"{decoder}.conv1.conv", levels[-1], 4, 3, 3, 3)
    for level, width in enumerate(levels):
        for side, before in ((encoder, ([filters, *levels])[level]), (decoder, ([*levels, levels[-1]])[level + 1])):
            for block in range(blocks):
                _temporal_block(shapes, f"{side}.block_res_blocks.{level}.{block}", width, width if block else before)
        if level in (1, 2):
            conv(shapes, f"{encoder}.conv_blocks.{level}.conv", width, width, 3, 3, 3)
            above = levels[level + 1]
            conv(shapes, f"{decoder}.conv_blocks.{level}.conv", 2 * above, above, 3, 3, 3)
    for side in (encoder, decoder):
        for block in range(blocks):
            _temporal_block(shapes, f"{side}.res_blocks.{block}", levels[-1], levels[-1])
    norm(shapes, f"{encoder}.norm1", levels[-1])
    norm(shapes, f"{decoder}.norm1", filters)
    conv(shapes, f"{encoder}.conv2.conv", 8, levels[-1], 1, 1, 1)
    conv(shapes, f"{decoder}.conv_out.conv", 4, filters, 3, 3, 3)
    conv(shapes, "temporal_vae.quant_conv.conv", 8, 8, 1, 1, 1)
    conv(shapes, "temporal_vae.post_quant_conv.conv", 4, 4, 1, 1, 1)
    return shapes


def _temporal_block(shapes: Shapes, name: str, width: int, before: int) -> None:
    norm(shapes, f"{name}.norm1", before)
    conv(shapes, f"{name}.conv1.conv", width, before, 3, 3, 3, bias=False)
    norm(shapes, f"{name}.norm2", width)
    conv(shapes, f"{name}.conv2.conv", width, width, 3, 3, 3, bias=False)
    if width != before:
        conv(shapes, f"{name}.conv3.conv", width, before, 1, 1, 1, bias=False)


def opensora_v1_3(widths: tuple[int, ...] = WIDTHS, layers: int = 2, first: int = 128, channels: int = 16) -> Shapes:
    """model.safetensors of hpcai-tech/OpenSora-VAE-v1.3."""
    shapes: Shapes = {}
    last = widths[-1]
    conv(shapes, "encoder.conv_in.conv", first, 3, 3, 3, 3)
    conv(shapes, "encoder.conv_out.conv", 2 * channels, last, 3, 3, 3)
    conv(shapes, "decoder.conv_in.conv", last, channels, 3, 3, 3)
    conv(shapes, "decoder.conv_out", 3, widths[0], 3, 3, 3)
    norm(shapes, "encoder.norm_out", last)
    norm(shapes, "decoder.norm_out", widths[0])
    for side in ("encoder", "decoder"):
        for block in ("block_1", "block_2"):
            _causal_block(shapes, f"{side}.mid.{block}", last, last)
        norm(shapes, f"{side}.mid.attn_1.norm", last)
        for layer in ("q", "k", "v", "proj_out"):
            conv(shapes, f"{side}.mid.attn_1.{layer}.conv", last, last, 1, 1, 1)
    for level, width in enumerate(widths):
        for block in range(layers):
            before = ([first, *widths])[level] if block == 0 else width
            _causal_block(shapes, f"encoder.down.{level}.block.{block}", width, before)
        for block in range(layers + 1):
            before = ([*widths, last])[level + 1] if block == 0 else width
            _causal_block(shapes, f"decoder.up.{level}.block.{block}", width, before)
    conv(shapes, "encoder.down.0.downsample.conv", widths[0], widths[0], 3, 3)
    conv(shapes, "decoder.up.1.upsample.conv", widths[1], widths[1], 3, 3)
    for level in (1, 2):
        conv(shapes, f"encoder.down.{level}.downsample.conv.conv", widths[level], widths[level], 3, 3, 3)
        up = f"decoder.up.{level + 1}.upsample.conv3d"
        for number in (1, 2):
            conv(shapes, f"{up}.conv{number}.conv", widths[level + 1], widths[level + 1], 3, 3, 3)
            norm(shapes, f"{up}.norm{number}", widths[level + 1])
    return shapes


def _causal_block(shapes: Shapes, name: str, width: int, before: int) -> None:
    norm(shapes, f"{name}.norm1", before)
    conv(shapes, f"{name}.conv1.conv", width, before, 3, 3, 3)
    norm(shapes, f"{name}.norm2", width)
    conv(shapes, f"{name}.conv2.conv", width, width, 3, 3, 3)
    if width != before:
        conv(shapes, f"{name}.nin_shortcut.conv", width, before, 1, 1, 1)


PUBLISHED = {
    "hunyuan": hunyuan_vae,
    "flux2d": ae,
    "dc_ae": video_dc_ae,
    "sd": sd_vae,
    "opensora_v1_2": opensora_v1_2,
    "opensora_v1_3": opensora_v1_3,
}
SMALL: dict[str, Shapes] = {
    "flux2d": ae((64, 64), 1, 4),  # groups of two channels: torch normalizes no group of one at a single pixel
    "dc_ae": video_dc_ae((4, 4, 8, 32, 32, 32), (1,) * 6, (1,) * 6, 8),
    "sd": sd_vae((4, 4, 8, 8), 1, 4),
    "opensora_v1_2": opensora_v1_2((4, 4, 8, 8), 1, 4, 1),
    "opensora_v1_3": opensora_v1_3((32, 32, 32, 32), 1, 32),
}
GROUPS = {"hunyuan": {"norm_num_groups": 2}, "sd": {"norm_num_groups": 2}}
GROUPS["opensora_v1_2"] = {"norm_num_groups": 2, "num_groups": 2}


def small_shapes(kind: str) -> Shapes:
    return hunyuan_vae((8, 8, 8, 8), 1, 4) if kind == "hunyuan" else SMALL[kind]


def write_small(kind: str, path: Path, **changed: tuple[int, ...] | None) -> Path:
    """A small autoencoder with drawn weights. ``changed``: tensors of other shapes, new ones, or None: none."""
    generator = torch.Generator().manual_seed(0)
    shapes = {**small_shapes(kind), **changed}
    tensors = {}
    for name, shape in shapes.items():
        if shape is not None:
            size = max(1, prod(shape[1:])) ** -0.5 if len(shape) > 1 else 0.1
            one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensors[name] = torch.randn(shape, generator=generator) * size + one
    if "scale" in tensors:
        tensors["scale"] += 2
    save_file(tensors, path, {"config": json.dumps(GROUPS.get(kind, {}))})
    return path


def write_zeros(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A file of these tensors in bf16, all zeros, which takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path
