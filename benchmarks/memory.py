"""What every process holds, and needs at its peak: loading, between steps, in a step, sampling. One row per layout.

    python -m benchmarks.memory [--processes 1,2,4,8] [--width 320] [--offload none,optimizer,parameters]

Layouts run as groups of gloo processes on this machine, on an MMDiT of --width (320: 33 million parameters) with so few
tokens that weights are nearly all there is to see. Counted are bytes of tensors (diagnostics/memory_usage.py), exactly:
resident memory would add the interpreter and what malloc keeps back, and lack what no page was touched of. Of a mapped
file the tensor being read is counted, though its pages are the system's to take back. The worst process is shown.

``state`` is what stays between two steps (fp32 masters, two moments, the average), ``bound`` is 1.05 x total / pieces +
the largest block: no process may hold more. Loading may take one part of a parameter more than it keeps.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acceleration import protocol
from acceleration.checkpoint.tensor_shards import TensorShards
from acceleration.config import MeshConfig, OptimConfig, ParallelConfig, PrecisionConfig, RecomputeConfig
from acceleration.diagnostics.memory_usage import Allocations, held
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import Mesh
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from acceleration.sharding import fsdp
from opensora.assembly.initial_weights import FileSource
from opensora.models.families import build_model
from opensora.models.mmdit import MMDiTConfig
from opensora.models.mmdit.convert import OPEN_SORA_2, WEIGHTS
from opensora.models.weights.reader import load_state_dict_for
from opensora.models.weights.writer import save_state_dict
from opensora.train.preparation import Tokens, loss_share
from opensora.utils.rng import torch_generator
from tests.dist.harness import run_distributed
from tests.dist.problem import MODEL, FakeBatch
from tests.dist.test_parity import preparation

CPU = torch.device("cpu")
OPTIM = OptimConfig(lr=1e-4, ema_decay=0.9)
LAYOUTS: dict[int, tuple[tuple[int, dict[str, int]], ...]] = {  # processes -> (ZeRO stage, mesh)
    1: ((3, {}),),
    2: ((0, {}), (1, {}), (2, {}), (3, {}), (3, {"ulysses": 2}), (3, {"ring": 2}), (3, {"tensor": 2})),
    4: (
        *((zero, {}) for zero in range(4)),
        (3, {"ulysses": 4}),
        (3, {"ring": 4}),
        (3, {"ring": 2, "ulysses": 2}),
        (3, {"tensor": 4}),
        (3, {"tensor": 2}),
        (3, {"replicate": 2}),
    ),
    8: ((1, {}), (2, {}), (3, {}), (3, {"ulysses": 8}), (3, {"ring": 2, "tensor": 2}), (3, {"replicate": 2})),
}
TITLES = ("weights", "load", "state", "bound", "grads", "between", "+step", "in all", "sampling", "load", "+pass")


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model in fp32, known without building it."""

    parameters: int
    largest_parameter: int
    largest_block: int


@dataclass(frozen=True)
class Usage:
    """Bytes on one process."""

    parameters: int  # masters, between steps
    optimizer: int
    average: int
    load_peak: int  # of everything, from an empty process to the loaded model
    gradients: int  # when the optimizer takes them
    gathered: int  # compute copy of parameters that is there between two micro-batches
    step_peak: int  # beyond the state: gathered parameters, gradients, buffers, activations
    left: int  # what a step leaves behind; 0
    sample_parameters: int  # bf16, before the first pass
    sample_load_peak: int
    sample_peak: int  # beyond the parameters

    @property
    def state(self) -> int:
        return self.parameters + self.optimizer + self.average


def model_of(width: int) -> MMDiTConfig:
    """Eight heads, many small blocks; everything else as in the parity tests, whose inputs it takes."""
    head = width // 8
    axes = (head - 2 * (head // 3 // 2 * 2), head // 3 // 2 * 2, head // 3 // 2 * 2)
    return replace(MODEL, hidden_size=width, num_heads=8, depth=4, depth_single_blocks=12, axes_dim=axes)


def sizes_of(cfg: MMDiTConfig) -> Sizes:
    with torch.device("meta"):
        model = build_model(cfg)
    blocks = [sum(p.numel() for p in block.parameters()) for block in protocol.blocks(model)]
    parameters = [p.numel() for p in model.parameters()]
    return Sizes(4 * sum(parameters), 4 * max(parameters), 4 * max(blocks))


def write_weights(cfg: MMDiTConfig, path: Path) -> None:
    """Random weights in the layout of Open-Sora 2, so that reading them has to join and to reorder."""
    with torch.device("meta"):
        named = list(build_model(cfg).named_parameters())
    state = {name: torch.randn(p.shape, generator=torch_generator(name)) * 0.1 for name, p in named}
    save_state_dict(state, path, WEIGHTS, source=WEIGHTS.layout(cfg), to=OPEN_SORA_2)


def measure(model_cfg: MMDiTConfig, path: Path, layouts: Sequence[ParallelConfig]) -> list[Usage]:
    """Runs in every process of the group."""
    return [_measure(model_cfg, path, layout) for layout in layouts]


def _measure(model_cfg: MMDiTConfig, path: Path, cfg: ParallelConfig) -> Usage:
    mesh = meshes.build(cfg.mesh, dist.get_world_size(), CPU)
    precision = PrecisionConfig(compute="bf16", reduce="fp32", master="bf16")
    trained = _train(model_cfg, path, cfg, mesh)
    return Usage(**trained, **_sample(model_cfg, path, replace(cfg, precision=precision), mesh))


def _train(model_cfg: MMDiTConfig, path: Path, cfg: ParallelConfig, mesh: Mesh) -> dict[str, int]:
    model, load_peak = _load(model_cfg, path, cfg, mesh)
    engine = build_engine(model, cfg, OPTIM, mesh)
    batches = _tokens(mesh)
    seen = {}

    def step(number: int) -> None:
        for index, tokens in enumerate(batches):
            last = index == len(batches) - 1
            engine.backward(loss_share(model, tokens, 100), last_microbatch=last)
            if not last:
                seen["gathered"] = gathered_bytes(model)
        seen["gradients"] = held(p.grad for p in model.parameters() if p.grad is not None)
        engine.step(number)

    step(0)  # moments are made, and FSDP2 pads what does not divide
    state = engine.state_dict()
    values = [
        v for v in state["optimizer"].values() if isinstance(v, Tensor | TensorShards)
    ]  # not settings of the optimizer
    moments = held(getattr(value, "held", value) for value in values)
    average = held(getattr(value, "held", value) for value in state["ema"].values())
    masters = held(p for _, p in engine.master_params())
    del state
    with Allocations() as stepping:
        step(1)
    return {
        **seen,
        "parameters": held(model.parameters()),
        "optimizer": moments + (masters if cfg.offload == "optimizer" else 0),
        "average": average,
        "load_peak": load_peak,
        "step_peak": stepping.peak,
        "left": stepping.now,
    }


def _sample(model_cfg: MMDiTConfig, path: Path, cfg: ParallelConfig, mesh: Mesh) -> dict[str, int]:
    model, load_peak = _load(model_cfg, path, cfg, mesh)
    model.requires_grad_(False).eval()
    before = held(model.parameters())
    (tokens, _) = _tokens(mesh)
    with Allocations() as passing, torch.no_grad():
        for _ in range(2):
            model(**tokens.inputs)
    return {"sample_parameters": before, "sample_load_peak": load_peak, "sample_peak": passing.peak}


def _load(model_cfg: MMDiTConfig, path: Path, cfg: ParallelConfig, mesh: Mesh) -> tuple[nn.Module, int]:
    """The model with its weights, and the bytes this took at the peak."""
    with torch.device("meta"):
        model = build_model(model_cfg)
    layout = WEIGHTS.layout(model_cfg)
    file, _ = load_state_dict_for(model, path, WEIGHTS, to=layout)  # a mapping, which would count as taken
    with Allocations() as loading:
        parallelize(model, cfg, mesh, CPU, FileSource(file, path))
    return model, loading.peak


def _tokens(mesh: Mesh) -> list[Tokens]:
    """Two micro-batches of a sample of sixteen image tokens."""
    prepare = preparation(mesh)
    pixels = torch.zeros(1, 8, 1, 4, 4, dtype=torch.uint8)
    return [prepare(FakeBatch(pixels, ["a word"], (index,)), 0) for index in range(2)]  # type: ignore[arg-type]


def gathered_bytes(model: nn.Module) -> int:
    """Bytes of parameters that are whole at this moment, beside the pieces."""
    whole = 0
    for module in fsdp.fsdp_modules(model):
        group = module._get_fsdp_state()._fsdp_param_group  # type: ignore[attr-defined]
        whole += sum(held(param.all_gather_outputs) for param in group.fsdp_params) if group else 0
    return whole


def layouts_of(processes: int, offloads: Sequence[str]) -> list[ParallelConfig]:
    return [
        ParallelConfig(zero=zero, mesh=MeshConfig(**mesh), offload=offload, recompute=RecomputeConfig(kind="full"))
        for zero, mesh in LAYOUTS[processes]
        for offload in offloads
        if offload == "none" or (zero == 3 and not mesh)
    ]


def pieces_of(cfg: ParallelConfig, processes: int) -> int:
    """Processes that share one copy of the state."""
    return 1 if cfg.zero == 0 else processes // cfg.mesh.replicate


def worst(usages: Sequence[Usage]) -> Usage:
    return Usage(**{name: max(getattr(usage, name) for usage in usages) for name in vars(usages[0])})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,4,8")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--offload", default="none")
    args = parser.parse_args()
    cfg = model_of(args.width)
    sizes = sizes_of(cfg)
    mib = 2**20
    print(
        f"{sizes.parameters / 4e6:.1f} million parameters, {sizes.parameters / mib:.0f} MiB in fp32; "
        f"largest block {sizes.largest_block / mib:.1f}, largest parameter {sizes.largest_parameter / mib:.1f}\n"
        "MiB on the worst process; +step and +pass come on top of what is held:\n"
        f"{'n':>2} {'ZeRO':<4} {'mesh':<19}{'offload':<10}" + "".join(f"{title:>9}" for title in TITLES),
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_weights(cfg, path)
        for processes in map(int, args.processes.split(",")):
            layouts = layouts_of(processes, args.offload.split(","))
            by_rank = run_distributed(measure, processes, cfg, path, layouts, timeout=1800)
            for layout, usages in zip(layouts, zip(*by_rank, strict=True), strict=True):
                row = worst(usages)
                copies = 5 if layout.offload == "optimizer" else 4
                bound = 1.05 * copies * sizes.parameters / pieces_of(layout, processes) + sizes.largest_block
                mesh = " ".join(f"{k} {v}" for k, v in vars(layout.mesh).items() if v not in (1, -1, False)) or "shard"
                numbers = (row.parameters, row.load_peak, row.state, bound, row.gradients, row.gathered, row.step_peak)
                numbers += (row.state + row.step_peak, row.sample_parameters, row.sample_load_peak, row.sample_peak)
                shown = "".join(f"{number / mib:>9.1f}" for number in numbers)
                print(f"{processes:>2} {layout.zero:<4} {mesh:<19}{layout.offload:<10}{shown}", flush=True)
                layout_of_row = {"processes": processes, "zero": layout.zero, "mesh": mesh, "offload": layout.offload}
                rows.append({**layout_of_row, "bound": bound, **asdict(row)})
    print(json.dumps({"benchmark": "memory", "sizes": asdict(sizes), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
