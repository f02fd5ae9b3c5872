"""How well does each autoencoder code clips: PSNR per autoencoder and channel count.

    python -m benchmarks.autoencoders [--media DIR] [--hunyuan DIR] [--flux2d DIR]

PSNR is 10 log10(4 / mean squared error) in [-1, 1] over all clips of a set. Sets: rendered shapes (32x32, 17 frames),
and, with --media, the first 17 frames of every video in DIR at --height x --width. The last line is JSON.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.shapes.render import combinations, draw_spec, render
from opensora.datasets.decode.api import VIDEO_SUFFIXES, DecodeError, read_frames
from opensora.models.vae import (
    AutoencoderConfig,
    DCTConfig,
    Flux2DConfig,
    HunyuanConfig,
    build_autoencoder,
)

FRAMES = 17


def to_pixels(frames: np.ndarray) -> Tensor:
    """(T, H, W, 3) uint8 -> (1, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def shape_clips(count: int, frames: int) -> list[Tensor]:
    """Rendered clips, every direction among them."""
    specs = [draw_spec(0, "benchmark", i, combinations(), [(32, 32)], [frames]) for i in range(count)]
    return [to_pixels(render(spec)) for spec in specs]


def media_clips(folder: Path, height: int, width: int) -> Iterator[Tensor]:
    """The first frames of the videos of a folder; a file that is too short or unreadable is left out, and named."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            try:
                yield to_pixels(read_frames(str(path), 0, FRAMES, resize=lambda *_: (height, width)))
            except DecodeError as error:
                print(f"left out: {error}")


def configs(args: argparse.Namespace) -> dict[str, AutoencoderConfig]:
    """Name -> autoencoder to measure."""
    chosen: dict[str, AutoencoderConfig] = {}
    for channels in (16, 32, 48, 64, 96, 128, 300):
        chosen[f"dct 4x8x8 {channels}"] = DCTConfig(spatial=8, channels=channels)
    for channels in (4, 8, 16, 32, 64):
        chosen[f"dct 4x4x4 {channels}"] = DCTConfig(spatial=4, channels=channels)
    if args.hunyuan:
        chosen["hunyuan"] = HunyuanConfig(path=args.hunyuan)
    if args.flux2d:
        chosen["flux2d"] = Flux2DConfig(path=args.flux2d)
    return chosen


def measure(cfg: AutoencoderConfig, clips: list[Tensor]) -> dict[str, float]:
    """PSNR of the round trip, and the mean and standard deviation of the latents."""
    autoencoder = build_autoencoder(cfg, "cpu", torch.float32)
    latents = [autoencoder.encode(clip) for clip in clips]
    errors = [(autoencoder.decode(z) - clip).square().mean() for z, clip in zip(latents, clips, strict=True)]
    values = torch.cat([z.flatten() for z in latents])
    error = torch.stack(errors).mean().item()
    return {
        "psnr": 10 * math.log10(4 / max(error, 1e-12)),
        "latent_std": values.std().item(),
        "compression": sum(clip.numel() for clip in clips) / values.numel(),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--media", type=Path, help="folder with videos")
    parser.add_argument("--height", type=int, default=144)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--clips", type=int, default=60, help="rendered clips")
    parser.add_argument("--hunyuan", default="", help="local folder of HunyuanVideo's autoencoder")
    parser.add_argument("--flux2d", default="", help="local folder of Flux's autoencoder")
    args = parser.parse_args()
    sets = {"shapes": shape_clips(args.clips, FRAMES), "shape stills": shape_clips(args.clips, 1)}
    if args.media:
        sets["media"] = list(media_clips(args.media, args.height, args.width))
        sets["media stills"] = [clip[:, :, :1] for clip in sets["media"]]
    print(f"{'autoencoder':<18} {'set':<13} {'PSNR dB':>8} {'latent std':>11} {'values in/out':>14} {'s':>6}")
    rows = []
    for name, cfg in configs(args).items():
        for kind, clips in sets.items():
            start = time.perf_counter()
            row = {"autoencoder": name, "set": kind, "clips": len(clips), **measure(cfg, clips)}
            rows.append(row)
            print(
                f"{name:<18} {kind:<13} {row['psnr']:>8.2f} {row['latent_std']:>11.2f} {row['compression']:>14.1f} "
                f"{time.perf_counter() - start:>6.1f}"
            )
    print(json.dumps({"benchmark": "autoencoders", "rows": rows}))


if __name__ == "__main__":
    main()
