"""What samples of several buckets in one sequence gain: image tokens a second with and without, on one CPU core.

    python -m benchmarks.packing [--steps 6] [--micro-batches 8]

A process works off the same steps twice, turn by turn: one bucket at a time, and packed into as many sequences as 4096
image tokens allow. Both are the same samples, latents and draws, so that loss is compared too. The model is one of 4
blocks and width 256 in fp32; latents and text features are drawn and not decoded. Seconds are those of the processor
(one thread), which others on the machine do not add to. Tables:

    stills                128px in 16 ratios, 4 to a micro-batch, 32 text tokens that are all attended to
    stills, masked text   the same, of which 4 to 32 are a prompt's own and the others masked padding
    stills, long padding  the same with 128 text tokens
    single stills         as the first, one to a micro-batch
    stills and clips      128px, clips of 5 and 17 frames, one to a micro-batch, masked text

Prints a table and one JSON line.
"""

import argparse
import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from acceleration.distributed.mesh import view
from acceleration.sequence import SequenceParallel
from benchmarks.clip_columns import clip_columns
from opensora.assembly.encoders import Encoders
from opensora.assembly.token_layout import token_layout
from opensora.conditioning import ConditioningConfig
from opensora.datasets.buckets.cost import FullAttention
from opensora.datasets.config import DataConfig
from opensora.datasets.loading.feature_store import Features
from opensora.datasets.loading.reader import Batch, PackedBatch
from opensora.datasets.plan.batch_plan import BatchPlan, MicroBatch, PackedSequence
from opensora.datasets.table.manifest import ClipTable, TextsInMemory
from opensora.models.base import TextFeatures
from opensora.models.families import build_model, init_model_
from opensora.models.mmdit import MMDiTConfig
from opensora.schedulers.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from opensora.train.preparation import Preparation, loss_share
from opensora.utils.rng import torch_generator

MODEL = MMDiTConfig(
    in_channels=64,
    patch_size=1,
    vec_in_dim=64,
    context_in_dim=64,
    hidden_size=256,
    num_heads=4,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(16, 24, 24),
    cond_embed=False,
)
MULTIPLE, BUDGET, ROWS = 16, 4096, 4000


@dataclass(frozen=True)
class Case:
    buckets: dict[str, dict[int, list[float]]]
    words: int  # text tokens of a prompt
    is_masked: bool
    images: bool = True  # a table of stills alone


CASES = {
    "stills": Case({"128px": {1: [1.0, 4]}}, 32, False),
    "stills, masked text": Case({"128px": {1: [1.0, 4]}}, 32, True),
    "stills, long padding": Case({"128px": {1: [1.0, 4]}}, 128, True),
    "single stills": Case({"128px": {1: [1.0, 1]}}, 32, False),
    "stills and clips": Case({"128px": {1: [1.0, 1], 5: [1.0, 1], 17: [[1.0, 0.5], 1]}}, 32, True, images=False),
}


class Text:
    """Features of a prompt that is its own number, and of none."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.context_dim = self.vec_dim = 64

    def encode(self, prompts: list[str]) -> TextFeatures:
        shape = len(prompts), self._case.words
        lengths = torch.tensor([4 + 7 * int(prompt or 0) % 29 for prompt in prompts])
        mask = torch.arange(self._case.words) < lengths[:, None]
        txt = torch.randn(*shape, 64, generator=torch_generator("txt", *prompts))
        y_vec = torch.randn(len(prompts), 64, generator=torch_generator("vec", *prompts))
        return TextFeatures(txt=txt, y_vec=y_vec, mask=mask if self._case.is_masked else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--micro-batches", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = build_model(MODEL)
    init_model_(model, 0)
    results = {}
    print(f"{'':<22}{'forwards a step':>22}{'image tokens/s':>26}{'ratio':>8}{'from':>7}{'to':>7}")
    for name, case in CASES.items():
        found = measured(model, case, args.steps, args.micro_batches)
        (alone, packed), (before, after) = found["forwards"], found["tokens_per_s"]
        low, high = min(found["ratios"]), max(found["ratios"])
        print(
            f"{name:<22}{alone:>10.1f} -> {packed:>8.1f}{before:>12.0f} -> {after:>10.0f}"
            f"{found['ratio']:>8.2f}{low:>7.2f}{high:>7.2f}"
        )
        results[name] = found
    print(json.dumps({"benchmark": "packing", "steps": args.steps, "results": results}))


def measured(model: nn.Module, case: Case, steps: int, micro_batches: int) -> dict[str, Any]:
    """Both ways, the first step not counted; the ratio is the median over steps."""
    plans = [plan(case, micro_batches, budget) for budget in (0, BUDGET)]
    prepare = Preparation(
        encoders=Encoders(autoencoder=None, text_encoder=Text(case), device=torch.device("cpu"), stored=True),
        objective=RectifiedFlow(RectifiedFlowConfig()),
        conditioning=ConditioningConfig(),
        model=model.cfg,
        layout=token_layout(model.cfg, SequenceParallel(view({}))),
        seed=0,
    )
    seconds, tokens, forwards = np.zeros((2, steps)), np.zeros(steps), np.zeros((2, steps))
    for step in range(-1, steps):
        losses = []
        for way in (0, 1) if step % 2 else (1, 0):
            work = [drawn(item, case) for item in plans[way].step(step % steps)]
            started = time.process_time()
            losses.append(one_step(model, prepare, work, step % steps))
            if step >= 0:
                seconds[way, step], forwards[way, step] = time.process_time() - started, len(work)
        assert abs(losses[0] - losses[1]) <= 1e-4 * abs(losses[0]), losses
        of_bucket = plans[0].shapes(step % steps).items()
        tokens[step] = sum(n * FullAttention(MULTIPLE)(b.frames, b.height, b.width)[0] for b, n in of_bucket)
    ratios = seconds[0] / seconds[1]
    return {
        "forwards": forwards.mean(axis=1).tolist(),
        "tokens_per_s": [round(tokens.sum() / each.sum()) for each in seconds],
        "ratio": round(float(np.median(ratios)), 3),
        "ratios": ratios.round(3).tolist(),
    }


def one_step(model: nn.Module, prepare: Preparation, work: list[Batch | PackedBatch], step: int) -> float:
    """Tokens, loss and gradients of all; no update, so that every step is of the same model."""
    total = 0.0
    for batch in work:
        share = loss_share(model, prepare(batch, step), 1_000_000)
        share.backward()
        total += share.item()
    model.zero_grad()
    return total


def plan(case: Case, micro_batches: int, budget: int) -> BatchPlan:
    columns = clip_columns(ROWS, 0)
    if case.images:
        columns |= {"num_frames": np.ones(ROWS, np.int32), "fps": np.full(ROWS, np.nan)}
    # Every ratio, not the six of cameras: stills come in all of them.
    rng = np.random.default_rng(1)
    columns["width"] = (columns["height"] * rng.uniform(0.5, 2.0, ROWS)).astype(np.uint16)
    nothing = pa.chunked_array([[""]])
    table = ClipTable(**columns, texts=TextsInMemory(nothing, nothing), folders=("",), first_rows=np.zeros(1, np.int64))
    cfg = DataConfig(
        buckets=case.buckets,
        micro_batches=micro_batches,
        balance_group=micro_batches,
        tokens_per_sequence=budget,
        unused_rows="report",
    )
    return BatchPlan(table, cfg, MULTIPLE, 0)


def drawn(item: MicroBatch | PackedSequence, case: Case) -> Batch | PackedBatch:
    """Features in the place of files."""
    parts = [part_drawn(part, case) for part in item.parts]
    return PackedBatch(tuple(parts)) if isinstance(item, PackedSequence) else parts[0]


def part_drawn(part: MicroBatch, case: Case) -> Batch:
    bucket, text = part.bucket, Text(case)
    grid = (bucket.frames - 1) // 4 + 1, bucket.height // MULTIPLE, bucket.width // MULTIPLE
    latents = [torch.randn(1, 64, *grid, generator=torch_generator("latents", i)) for i in part.sample_ids]
    each = [text.encode([str(i)]) for i in part.sample_ids]
    features = Features(
        latents=torch.cat(latents),
        txt=torch.cat([one.txt for one in each]),
        y_vec=torch.cat([one.y_vec for one in each]),
        mask=torch.cat([one.mask for one in each if one.mask is not None]) if case.is_masked else None,
    )
    return Batch(
        pixels=None,
        prompts=[],
        sample_ids=part.sample_ids,
        bucket=bucket,
        fps=torch.zeros(len(part.sample_ids)),
        epoch=part.epoch,
        weight=part.weight,
        features=features,
    )


if __name__ == "__main__":
    main()
