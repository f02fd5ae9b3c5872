"""A training step of Latte and PixArt against diffusers', and STDiT3 on two processes by axis switch against Ulysses.

    python -m benchmarks.step_1x [--seconds 20] [--only latte pixart sharing]
    python -m benchmarks.step_1x --device cuda          # XL/2 in bf16; sharing with two GPUs or more

Forward, backward and AdamW of ours and of diffusers' LatteTransformer3DModel and PixArtTransformer2DModel, with the
same weights on the same inputs, in turn in one process, so that the ratio survives a busy machine: it is the median
over rounds of our time over theirs in the same round, of CPU time on a CPU. That they compute the same is measured
before, in the type of the step: output, and the gradient of the first layer, which depends on all others. diffusers'
Latte is the one for texts, built without attention to them, as DiT's block has none; its blocks share one modulation,
which is a case of ours.

Two processes share every clip of STDiT3: places are exchanged for frames around attention in space (which is chosen
where a clip has frames enough), or heads are (Ulysses over the places of a frame, which stills get); the same model on
the same tokens, in turn. Bytes are those that the axis counted; those of the switch are compared with the planner's
formula.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.accounting.comm_volume import step_bytes
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import MeshConfig, OptimConfig, ParallelConfig, PrecisionConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed import runtime
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from benchmarks.diffusers_1x import RIVALS, Rival, Shape
from benchmarks.gpu.mfu import drawn_values
from opensora.models.families import build_model
from opensora.models.stdit import STDiT3Config
from opensora.planner.meta_model import denoiser_inputs, structure

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
WARMUP = 2


SHAPES = {
    "cpu": {"latte": Shape(384, 6, 4, 2, 8, 16), "pixart": Shape(384, 6, 4, 2, 1, 32)},
    "cuda": {"latte": Shape(1152, 16, 28, 4, 16, 32), "pixart": Shape(1152, 16, 28, 8, 1, 64, caption=4096)},
    "tiny": {"latte": Shape(48, 4, 2, 2, 3, 8, 6, 10), "pixart": Shape(48, 4, 2, 2, 1, 8, 6, 10)},
}
SHARED = {  # STDiT3 on two processes; depth is of blocks in space and in time each
    "cpu": Shape(384, 6, 2, 1, 16, 32),
    "cuda": Shape(1152, 16, 28, 1, 20, 64, 300, 4096),
    "tiny": Shape(48, 4, 1, 1, 4, 8, 6, 10),
}


def main() -> int:
    args = parse_arguments()
    if args.share_in_group:  # one of the processes that ``share`` starts
        return share_in_group(args)
    torch.set_num_threads(args.threads)
    rows = [against_diffusers(kind, args) for kind in RIVALS if kind in args.only]
    print_rows(rows, args)
    sharing = share(args) if "sharing" in args.only else None
    print(
        json.dumps({"benchmark": "step_1x", "device": args.device, "dtype": args.dtype, "rows": rows} | (sharing or {}))
    )
    return 0


def relative(found: Tensor, truth: Tensor) -> float:
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).abs().max() / truth.abs().max())


def apart(rivals: dict[str, Rival]) -> dict[str, float]:
    """Largest relative differences of output and first gradient."""
    outputs, gradients = [], []
    for rival in rivals.values():
        rival.model.zero_grad(set_to_none=True)
        outputs.append(rival.latents(rival.output()))
        outputs[-1].float().square().mean().backward()
        assert rival.first.grad is not None
        gradients.append(rival.first.grad.flatten(1))
    return {"output": relative(*outputs), "gradient": relative(*gradients)}


def against_diffusers(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Times of a step of both, and how far they are apart."""
    device, shape = torch.device(args.device), SHAPES[args.shape][kind]
    torch.manual_seed(0)
    rivals = RIVALS[kind](shape, device, DTYPES[args.dtype])
    differences = apart(rivals)
    optimizers = {
        name: torch.optim.AdamW(rival.model.parameters(), lr=1e-6, fused=True) for name, rival in rivals.items()
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    end, order = time.perf_counter() + args.seconds, list(rivals)
    while time.perf_counter() < end or len(times["ours"]) < 3 + WARMUP:
        for name in order:
            times[name].append(step_seconds(rivals[name], optimizers[name], device))
        order.reverse()  # so that neither is always the first of a round
    kept = {name: found[WARMUP:] for name, found in times.items()}
    row: dict[str, Any] = {"model": kind, "shape": str(shape), "rounds": len(kept["ours"])}
    row["parameters"] = {name: sum(p.numel() for p in rival.model.parameters()) for name, rival in rivals.items()}
    for index, part in enumerate(("passes", "step")):
        row[part] = {name: statistics.median(found[index] for found in rounds) for name, rounds in kept.items()}
        pairs = zip(kept["ours"], kept["diffusers"], strict=True)
        row[f"{part}_ratio"] = statistics.median(ours[index] / theirs[index] for ours, theirs in pairs)
    return row | {"apart": differences}


def step_seconds(rival: Rival, optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[float, float]:
    """(forward and backward, these and the optimizer): of CPU time on a CPU, which neighbours change least."""
    settle: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    optimizer.zero_grad(set_to_none=True)
    settle()
    began = clock()
    rival.output().float().square().mean().backward()
    settle()
    passes = clock() - began
    optimizer.step()
    settle()
    return passes, clock() - began


def print_rows(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    if rows:
        clock = "CPU time" if args.device == "cpu" else "time"
        print(f"\n{args.device} {args.dtype}: forward and backward; step: with AdamW. Medians of {clock}, ms")
        print(f"{'':10}{'ours':>9}{'diffusers':>11}{'ratio':>8}{'ours, step':>12}{'diffusers':>11}{'ratio':>8}   apart")
    for row in rows:
        cells = ""
        for part, width in (("passes", 9), ("step", 12)):
            cells += f"{1e3 * row[part]['ours']:>{width}.1f}{1e3 * row[part]['diffusers']:>11.1f}"
            cells += f"{row[f'{part}_ratio']:>8.3f}"
        differences = ", ".join(f"{name} {value:.1e}" for name, value in row["apart"].items())
        print(f"{row['model']:10}{cells}   {differences}")
        millions = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in row["parameters"].items())
        print(f"{'':10}{row['shape']}, {row['rounds']} rounds; {millions}")


def share(args: argparse.Namespace) -> dict[str, Any] | None:
    """Runs ``share_in_group`` on two processes; None where there are not as many GPUs."""
    if args.device == "cuda" and torch.cuda.device_count() < 2:
        print("sharing: left out, it needs two GPUs")
        return None
    words = [Path(__file__), "--share-in-group", "--seconds", args.seconds, "--device", args.device]
    more = ["--shape", args.shape, "--dtype", args.dtype]
    command = ["bash", "launch/torchrun.sh", 2, *words, *more]
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},  # for what the script imports of this folder
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    *table, record = done.stdout.strip().splitlines()
    print("\n".join(table), flush=True)
    return {"sharing": json.loads(record)}


def share_in_group(args: argparse.Namespace) -> int:
    """One of the processes that share clips."""
    torch.set_num_threads(1)
    runtime.start(120)
    device = torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else torch.device("cpu")
    found = shared_steps(SHARED[args.shape], device, args.dtype, args.seconds)
    if dist.get_rank() == 0:
        print_sharing(found)
        print(json.dumps(found))
    runtime.stop()
    return 0


def shared_steps(shape: Shape, device: torch.device, dtype: str, seconds: float) -> dict[str, Any]:
    """Bytes and times of a step of STDiT3, by switch and by Ulysses in turn."""
    cfg = STDiT3Config(
        hidden_size=shape.hidden,
        depth=shape.depth,
        num_heads=shape.heads,
        caption_channels=shape.caption,
        model_max_length=shape.text,
    )
    world = dist.get_world_size()
    parallel = ParallelConfig(zero=2, mesh=MeshConfig(ulysses=world), precision=PrecisionConfig(compute=dtype))  # type: ignore[arg-type]
    mesh = meshes.build(parallel.mesh, world, device)
    with torch.device("meta"):
        model = build_model(cfg)
    parallelize(model, parallel, mesh, device, drawn_values)
    engine = build_engine(model, parallel, OptimConfig(lr=1e-6), mesh)
    places = (shape.side // 2) ** 2
    batch = MicroBatch(
        samples=shape.batch, txt=shape.text, img=shape.frames * places, frames=shape.frames, has_mask=True
    )
    ways = {
        way: told(cfg, batch, SequenceParallel(mesh), device, switches=way == "switch") for way in ("switch", "ulysses")
    }
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    sent = dict[str, dict[str, int]]()
    end, step = time.perf_counter() + seconds, 0
    while step < 3 + WARMUP or goes_on(end, device):
        for way, given in ways.items():
            before = mesh.bytes_sent()
            dist.barrier()
            began = time.perf_counter(), time.process_time()
            engine.backward(engine.model(**given).float().square().mean(), last_microbatch=True)
            sent[way] = dict(mesh.bytes_sent() - before)
            engine.step(step)
            dist.barrier()
            times[way].append((time.perf_counter() - began[0], time.process_time() - began[1]))
        step += 1
    formula = step_bytes(
        structure(cfg), RankLayout(meshes.view({"ulysses": world}, dist.get_rank()), parallel), [batch]
    )
    kept = {way: found[WARMUP:] for way, found in times.items()}
    found: dict[str, Any] = {"shape": str(shape), "rounds": step - WARMUP, "formula": formula.get("ulysses", 0)}
    found["bytes"] = {way: by_axis.get("ulysses", 0) for way, by_axis in sent.items()}
    for index, clock in enumerate(("step_s", "cpu_s")):
        found[clock] = {way: statistics.median(each[index] for each in rounds) for way, rounds in kept.items()}
        pairs = zip(kept["switch"], kept["ulysses"], strict=True)
        found[f"{clock}_ratio"] = statistics.median(one[index] / other[index] for one, other in pairs)
    return found


def goes_on(end: float, device: torch.device) -> bool:
    """What the first process says: all must agree."""
    left = torch.tensor([time.perf_counter() < end], dtype=torch.int32, device=device)
    dist.broadcast(left, 0)
    return bool(left.item())


def told(
    cfg: Any, batch: MicroBatch, sequence: SequenceParallel, device: torch.device, *, switches: bool
) -> dict[str, Any]:
    """Arguments of the model's forward, with the tokens that this process holds."""
    given = denoiser_inputs(cfg, batch, sequence, device=device)
    given["x"].normal_(generator=torch.Generator(device).manual_seed(sequence.rank))
    for name, value in (("height", 512), ("width", 512), ("fps", 24)):
        given[name].fill_(value)
    return given | {"context": replace(given["context"], switches=switches)}


def print_sharing(found: dict[str, Any]) -> None:
    print(f"\nSTDiT3 on 2 processes, {found['shape']}, {found['rounds']} rounds; a step of each, in turn; medians")
    print(f"{'':12}{'ms':>10}{'ms of CPU':>11}{'MiB sent':>10}   by one process, around attention")
    for way, sent in found["bytes"].items():
        seconds = "".join(f"{1e3 * found[c][way]:>{width}.1f}" for c, width in (("step_s", 10), ("cpu_s", 11)))
        print(f"{way:12}{seconds}{sent / 2**20:>10.2f}")
    exact = "as" if found["formula"] == found["bytes"]["switch"] else f"not the {found['formula']}"
    print(
        f"switch takes {found['step_s_ratio']:.3f} of the time of ulysses, {found['cpu_s_ratio']:.3f} of its CPU time; "
        f"its bytes are {exact} predicted"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and step; bf16 on CUDA, else fp32")
    parser.add_argument("--shape", choices=SHAPES, help="of the models; as the device, tiny to try it")
    parser.add_argument("--only", nargs="+", choices=(*RIVALS, "sharing"), default=[*RIVALS, "sharing"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 bears neighbours best")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to measure each")
    parser.add_argument("--share-in-group", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    args.shape = args.shape or args.device
    return args


if __name__ == "__main__":
    sys.exit(main())
