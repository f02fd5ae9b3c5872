"""The way of a clip to one GPU: copies, what is drawn on the CPU, encoding, and clips read from files.

    python -m benchmarks.gpu.data [--frames 33] [--clips 24]

``copy``: uint8 pixels of a 256px clip to the GPU, from pinned and from plain memory. ``prepare``: noise, times and
tokens of such a batch, with the block transform as autoencoder; the GPU waits meanwhile, so it should be far below the
time of a step. ``read``: clips a second of the loader, from files that it renders first; needs PyAV.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from acceleration.distributed.mesh import view
from acceleration.sequence import SequenceParallel
from benchmarks.gpu.sampling import DrawnText
from opensora.assembly.encoders import Encoders
from opensora.assembly.token_layout import token_layout
from opensora.conditioning import ConditioningConfig
from opensora.datasets.buckets.bucket import Bucket
from opensora.datasets.loading.reader import Batch
from opensora.models.mmdit import MMDiTConfig
from opensora.models.vae.dct import DCTAutoencoder, DCTConfig
from opensora.schedulers.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from opensora.train.preparation import Preparation

CUDA = torch.device("cuda", 0)
HEIGHT, WIDTH = 192, 336  # 256px at 16:9


def timed(run: Any, rounds: int) -> float:
    """Mean seconds, after one that does not count."""
    run()
    torch.cuda.synchronize(CUDA)
    began = time.perf_counter()
    for _ in range(rounds):
        run()
    torch.cuda.synchronize(CUDA)
    return (time.perf_counter() - began) / rounds


def copies(frames: int, rounds: int = 20) -> dict[str, float]:
    """GB/s."""
    rates = {}
    for pinned in (True, False):
        pixels = torch.zeros(1, 3, frames, HEIGHT, WIDTH, dtype=torch.uint8, pin_memory=pinned)
        seconds = timed(lambda pixels=pixels: pixels.to(CUDA, non_blocking=True), rounds)
        rates["pinned_gb_s" if pinned else "plain_gb_s"] = pixels.numel() / seconds / 1e9
    return rates


def prepared(frames: int, cfg: MMDiTConfig, rounds: int = 3, size: tuple[int, int] = (HEIGHT, WIDTH)) -> float:
    """Seconds of a micro-batch of one clip, from pixels to tokens."""
    prepare = Preparation(
        encoders=Encoders(
            autoencoder=DCTAutoencoder(DCTConfig(channels=cfg.in_channels // cfg.patch_size**2), CUDA),
            text_encoder=DrawnText(cfg, CUDA),
            device=CUDA,
        ),
        objective=RectifiedFlow(RectifiedFlowConfig()),
        conditioning=ConditioningConfig(),
        model=cfg,
        layout=token_layout(cfg, SequenceParallel(view({}, device_type="cuda"))),
        seed=0,
    )
    batch = Batch(
        pixels=torch.zeros(1, 3, frames, *size, dtype=torch.uint8, pin_memory=True),
        prompts=["a clip"],
        sample_ids=(0,),
        bucket=Bucket("256px", frames, *size, 1),
        fps=torch.full((1,), 24.0),
        epoch=0,
        weight=1.0,
    )
    return timed(lambda: prepare(batch, 0), rounds)


def read(clips: int) -> dict[str, Any]:
    """Clips a second of the loader's workers, with the decoder of the platform."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--out", folder, "--clips", str(clips), "--images", "0"]
        command = [sys.executable, "-m", "data_pipeline.shapes", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return loaded(Path(folder) / "train.csv")


def loaded(table: Path) -> dict[str, Any]:
    """One pass of the loader over a table."""
    from opensora.config.load import load_config
    from opensora.config.run import RunConfig
    from opensora.train.step_data import open_batches, open_data

    buckets = "{32px: {5: [1.0, 1]}}"
    demo = Path(__file__).resolve().parents[2] / "configs/train/demo.yaml"
    cfg = load_config(RunConfig, demo, [f"data.table={table}", f"data.buckets={buckets}", "data.workers=4"])
    opened, plan = open_data(cfg)
    data = open_batches(cfg, opened, plan, view({}), 0)
    began, count = time.perf_counter(), 0
    for step in range(8):
        count += sum(len(batch.sample_ids) for batch, _ in data.microbatches(step))
    seconds = time.perf_counter() - began
    data.close()
    return {"clips_per_s": count / seconds, "workers": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--clips", type=int, default=24, help="to render and read; 0: none")
    args = parser.parse_args()
    print(json.dumps({"benchmark": "copy", "frames": args.frames, **copies(args.frames)}), flush=True)
    seconds = prepared(args.frames, MMDiTConfig())
    print(json.dumps({"benchmark": "prepare", "frames": args.frames, "s": seconds}), flush=True)
    if args.clips and find_spec("av") is None:
        print(json.dumps({"benchmark": "read", "not measured": "PyAV is not installed"}), flush=True)
    elif args.clips:
        print(json.dumps({"benchmark": "read", **read(args.clips)}), flush=True)


if __name__ == "__main__":
    main()
