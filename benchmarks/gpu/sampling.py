"""Sampling of 256px clips with the 11B MMDiT on one GPU, from noise to pixels, by the function that sampling uses.

    python -m benchmarks.gpu.sampling [--frames 129 1] [--steps 4]

Weights and text features are drawn (numbers do not change the time), and the autoencoder is the block transform with
the 16 channels and the strides of HunyuanVideo's, so that the model sees its true number of tokens and time goes to
the model. Seconds of a step are those of two passes (guidance); a clip of 50 steps takes 50 times as long.
"""

import argparse
import json
import time

import torch

from acceleration.config import MeshConfig, ParallelConfig, PrecisionConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed import runtime
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from benchmarks.gpu.mfu import drawn_values
from opensora.assembly.components import Components
from opensora.assembly.token_layout import token_layout
from opensora.inference.pipeline import build_api
from opensora.models.base import TextFeatures
from opensora.models.families import build_model
from opensora.models.mmdit import MMDiTConfig
from opensora.models.vae.dct import DCTAutoencoder, DCTConfig
from opensora.sampling.options import SamplingOption
from opensora.schedulers.rectified_flow import RectifiedFlowConfig

TEXT = 512
BF16 = PrecisionConfig(compute="bf16", reduce="fp32", master="bf16")


class DrawnText:
    """A text encoder of random features."""

    def __init__(self, cfg: MMDiTConfig, device: torch.device, tokens: int = TEXT) -> None:
        self.context_dim, self.vec_dim = cfg.context_in_dim, cfg.vec_in_dim
        self._device, self._tokens = device, tokens

    def encode(self, prompts: list[str]) -> TextFeatures:
        return TextFeatures(
            txt=torch.randn(len(prompts), self._tokens, self.context_dim, device=self._device, dtype=torch.bfloat16),
            y_vec=torch.randn(len(prompts), self.vec_dim, device=self._device, dtype=torch.bfloat16),
        )


def build(cfg: MMDiTConfig, device: torch.device, text_tokens: int = TEXT) -> Components:
    """The model in bf16, and stand-ins for what is around it."""
    parallel = ParallelConfig(zero=0, precision=BF16)
    with torch.device("meta"):
        model = build_model(cfg)
    mesh = meshes.build(MeshConfig(), 1, device)
    parallelize(model, parallel, mesh, device, drawn_values)
    model.requires_grad_(False).eval()
    return Components(
        model=model,
        cfg=cfg,
        autoencoder=DCTAutoencoder(DCTConfig(channels=cfg.in_channels // cfg.patch_size**2), device),
        text_encoder=DrawnText(cfg, device, text_tokens),
        objective=RectifiedFlowConfig(),
        layout=token_layout(cfg, SequenceParallel(mesh)),
        mesh=mesh,
        device=device,
        prompt_suffix=False,
    )


def measure(parts: Components, option: SamplingOption) -> tuple[float, float, float]:
    """(seconds of a step, of all that is not a step, peak GiB); the clip before it does not count."""
    device = parts.device
    api = build_api(parts)
    api(option, text=["a clip"])
    torch.cuda.reset_peak_memory_stats(device)
    marks = []

    def mark(done: int, total: int) -> None:
        torch.cuda.synchronize(device)
        marks.append(time.perf_counter())

    torch.cuda.synchronize(device)
    began = time.perf_counter()
    api(option, text=["a clip"], on_step=mark)
    torch.cuda.synchronize(device)
    whole = time.perf_counter() - began
    step = (marks[-1] - marks[0]) / (len(marks) - 1)
    return step, whole - step * (len(marks) - 1), torch.cuda.max_memory_allocated(device) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 129])
    parser.add_argument("--steps", type=int, default=4, help="steps of a clip, at least 2")
    args = parser.parse_args()
    device = runtime.start(60).device
    parts = build(MMDiTConfig(), device)
    for frames in args.frames:
        step, rest, gib = measure(parts, SamplingOption(num_frames=frames, num_steps=args.steps))
        record = {"benchmark": "sampling", "resolution": "256px", "frames": frames, "step_s": step, "rest_s": rest}
        print(json.dumps({**record, "clip_of_50_steps_s": 50 * step + rest, "peak_gib": gib}), flush=True)
    runtime.stop()


if __name__ == "__main__":
    main()
