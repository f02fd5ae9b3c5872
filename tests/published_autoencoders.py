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


PUBLISHED = {"hunyuan": hunyuan_vae, "flux2d": ae, "dc_ae": video_dc_ae}
SMALL: dict[str, Shapes] = {
    "flux2d": ae((64, 64), 1, 4),  # groups of two channels: torch normalizes no group of one at a single pixel
    "dc_ae": video_dc_ae((4, 4, 8, 32, 32, 32), (1,) * 6, (1,) * 6, 8),
}


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
    stated = {"norm_num_groups": 2} if kind == "hunyuan" else {}
    save_file(tensors, path, {"config": json.dumps(stated)})
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
