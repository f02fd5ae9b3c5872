"""Bytes between hosts and step times of layouts on slow links, against what the formulas and the planner say.

    python -m benchmarks.hosts [--rates 1000 100] [--only shard hybrid] [--steps 5]

Two hosts of two processes each, which a launcher has numbered in turns (ranks 0 and 2 on one host), in the lab of
tests/hosts: network namespaces joined by a bridge, with the given rates in Mbit/s (0: no limit). Linux, root.

Every layout takes the same micro-batches: two of four short samples, two of one long sample. The model is wider where
the rate is high, so that links decide there too and not the cores of a small machine. For each layout are printed

* bytes that left a host per step, as the kernel counts them on the host's interface: with TCP/IP and Ethernet headers,
  acknowledgements, and the small messages that no formula counts; beside them what host_traffic.py predicts;
* seconds per step, the median, beside the planner's. The planner is given the rates that preflight's measurement finds
  and the speed of products on one process, not the rates that were set.

The order agrees if of no two layouts the planner calls one faster by more than ``TIE`` that is slower by more than it.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from acceleration.accounting import host_traffic
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import MeshConfig, OptimConfig, ParallelConfig, PrecisionConfig
from acceleration.diagnostics import links
from acceleration.diagnostics.interface_bytes import bytes_sent
from acceleration.distributed import mesh as meshes
from acceleration.distributed import runtime as runtimes
from acceleration.distributed.mesh import Mesh
from acceleration.distributed.placement import host_names
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from opensora.models.families import build_model
from opensora.models.mmdit import MMDiTConfig
from opensora.planner.devices import DEVICES
from opensora.planner.flops import training_flops
from opensora.planner.forecast import EFFICIENCY, Forecaster
from opensora.planner.meta_model import denoiser_inputs, structure
from opensora.planner.network import Network
from tests.hosts.lab import HostProcess, Lab
from tests.hosts.training import environment

ROOT = Path(__file__).resolve().parent.parent
IN_TURNS = (0, 1, 0, 1)  # the host of every launcher rank
TIE = 0.05
# Of a rate a tenth as high as the other's; wider, so that a step takes seconds at either: bytes grow as its square.
NARROW = MMDiTConfig(
    in_channels=16, vec_in_dim=32, context_in_dim=32, hidden_size=192, num_heads=4, depth=1, depth_single_blocks=2,
    axes_dim=(16, 16, 16),
)  # fmt: skip
WIDE = replace(NARROW, hidden_size=512, axes_dim=(32, 48, 48))
FAST_MBIT = 500.0  # from here on the wide one
OPTIM = OptimConfig(kind="sgd", lr=0.01)
EXACT = PrecisionConfig(compute="fp32")
SHORT, LONG = MicroBatch(samples=4, txt=16, img=64), MicroBatch(samples=1, txt=16, img=304)
STEP = (SHORT, LONG, SHORT, LONG)
PORT = 29500
LIMIT_S = 900.0


@dataclass(frozen=True)
class Layout:
    mesh: dict[str, Any] = field(hash=False)
    zero: Any = 3

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(zero=self.zero, mesh=MeshConfig(**self.mesh), precision=EXACT, timeout_s=120)


LAYOUTS = {
    "replicate": Layout({"replicate": 4, "shard": 1}, zero=0),
    "shard": Layout({"shard": 4}),
    "shard zero2": Layout({"shard": 4}, zero=2),
    "hybrid": Layout({"replicate": 2, "shard": 2}),
    "shard x ulysses": Layout({"shard": 2, "ulysses": 2}),
    "hybrid x ulysses": Layout({"replicate": 2, "shard": 1, "ulysses": 2}),
    "ulysses": Layout({"shard": 1, "ulysses": 4}),
    "ring": Layout({"shard": 1, "ring": 4}),
    "ring x ulysses": Layout({"shard": 1, "ring": 2, "ulysses": 2}),
    "dynamic": Layout({"shard": 1, "ulysses": 4, "dynamic": True}),
    "shard x tensor": Layout({"shard": 2, "tensor": 2}),
}


def batches_of(layout: Layout, mesh: Mesh) -> list[MicroBatch]:
    """A process's micro-batches of a step. With ``dynamic`` short samples are cut by none: each process has its own."""
    mine = STEP[mesh.data_rank :: mesh.data_degree]
    if not layout.mesh.get("dynamic"):
        return list(mine)
    whole = mesh["ulysses"].degree
    return [
        replace(b, samples=b.samples // whole, degree=1) if b.samples > 1 else replace(b, degree=whole) for b in mine
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[1000.0, 100.0], help="Mbit/s of every host; 0: any")
    parser.add_argument("--only", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="LAYOUT")
    parser.add_argument("--steps", type=int, default=5, help="that are measured, after one to warm up")
    parser.add_argument("--wide", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(WIDE if args.wide else NARROW, args.only, args.steps)
        return
    found = {f"{rate:g}": in_lab(rate, args.only, args.steps) for rate in args.rates}
    for rate, rows in found.items():
        report(float(rate), rows)
    print(json.dumps({"benchmark": "hosts", "numbering": IN_TURNS, "steps": args.steps, **found}))


def in_lab(rate_mbit: float, names: Sequence[str], steps: int, numbering: Sequence[int] = IN_TURNS) -> dict[str, Any]:
    """What the processes find, as ``work`` prints it, with this rate (0: no limit) between the hosts.

    ``numbering``: the host of every launcher rank.
    """
    with Lab(hosts=len(set(numbering)), mtu=9000) as lab:
        if rate_mbit:
            lab.shape(rate_mbit=rate_mbit)
        wide = rate_mbit >= FAST_MBIT
        command = [sys.executable, "-m", "benchmarks.hosts", "--worker", "--steps", steps, "--only", *names]
        command += ["--wide"] * wide
        started = start_in_any_order(lab, numbering, command)
        codes = [process.finish(LIMIT_S) for process in started]
        assert not any(codes), "\n".join(process.said for process in started)
        result: dict[str, Any] = json.loads(started[0].out.splitlines()[-1])
        return result


def start_in_any_order(lab: Lab, numbering: Sequence[int], command: Sequence[object]) -> list[HostProcess]:
    """A command on the hosts of the lab, by the variables of a launcher that puts rank r on host ``numbering[r]``."""
    shared = {"WORLD_SIZE": len(numbering), "MASTER_ADDR": lab.hosts[numbering[0]].address, "MASTER_PORT": PORT}
    seen: Counter[int] = Counter()
    started = []
    for rank, number in enumerate(numbering):
        own = {"RANK": rank, "LOCAL_RANK": seen[number], "LOCAL_WORLD_SIZE": numbering.count(number), **shared}
        env = environment(**{name: str(value) for name, value in own.items()})
        started.append(lab.hosts[number].popen(command, env=env, cwd=ROOT))
        seen[number] += 1
    return started


def work(model: MMDiTConfig, names: Sequence[str], steps: int) -> None:
    """In every process: all layouts, one after the other, each in a process group of its own."""
    torch.set_num_threads(1)
    runtime = runtimes.start(120)
    found = links.measure(runtime, host_names(runtime.peers), "cpu")
    flops = product_speed(model, min(3, steps))
    runtimes.stop()
    device = replace(DEVICES["cpu"], flops=flops / EFFICIENCY)
    network = Network.of_links(found, device, runtime.world_size)
    rows = []
    for number, name in enumerate(names, 1):
        os.environ["MASTER_PORT"] = str(PORT + number)
        runtime = runtimes.start(120, mesh=LAYOUTS[name].parallel.mesh)
        row = measure(model, LAYOUTS[name], runtime, steps)
        mesh = meshes.view(row.pop("degrees"))
        place = RankLayout(mesh, LAYOUTS[name].parallel)
        forecaster = Forecaster(model, OPTIM, device_type="cpu")
        row["planned_s"] = forecaster.seconds(place, batches_of(LAYOUTS[name], mesh), device, network)
        rows.append({"layout": name, **row})
        runtimes.stop()
    if runtime.is_main:
        rates = {"within_gb_s": network.within / 1e9, "between_gb_s": network.between / 1e9, "gflops": flops / 1e9}
        rates |= {"within_ms": network.latency_within * 1e3, "between_ms": network.latency_between * 1e3}
        print(json.dumps({**rates, "rows": rows}))


def product_speed(cfg: MMDiTConfig, tries: int) -> float:
    """FLOP/s of this process in training steps of the model, while all others do the same; the slowest. Collective."""
    model = build_model(cfg)
    sequence = SequenceParallel(meshes.view({}))
    work = sum(training_flops(Forecaster(cfg, OPTIM, device_type="cpu").forward_flops(batch)) for batch in STEP)
    took = float("inf")
    for _ in range(tries):
        dist.barrier()
        begun = time.perf_counter()
        for batch in STEP:
            model(**denoiser_inputs(cfg, batch, sequence, device="cpu")).square().sum().backward()
        took = min(took, time.perf_counter() - begun)
    slowest = torch.tensor(took)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return work / float(slowest)


def measure(cfg: MMDiTConfig, layout: Layout, runtime: runtimes.Runtime, steps: int) -> dict[str, Any]:
    """Bytes that leave every host, counted and predicted, and seconds, per step. Collective."""
    parallel, device = layout.parallel, torch.device("cpu")
    mesh = meshes.build(parallel.mesh, runtime.world_size, device)
    with torch.device("meta"):
        model = build_model(cfg)
    parallelize(model, parallel, mesh, device, lambda name, tensor: tensor.normal_(0, 0.02))
    engine = build_engine(model, parallel, OPTIM, mesh)
    mine = batches_of(layout, mesh)
    interface = runtime.peers[runtime.rank].interface

    def step(number: int) -> None:
        for index, batch in enumerate(mine):
            sequence = SequenceParallel(mesh.submesh(batch.degree))
            share = engine.model(**denoiser_inputs(cfg, batch, sequence, device=device)).square().sum()
            engine.backward(share, last_microbatch=index == len(mine) - 1)
        engine.step(number)

    step(0)
    seconds, counted = [], 0
    for number in range(1, steps + 1):
        dist.barrier()
        before = bytes_sent(interface)
        dist.barrier()  # no process of this host has begun before all have looked
        begun = time.perf_counter()
        step(number)
        dist.barrier()
        seconds.append(time.perf_counter() - begun)
        after = bytes_sent(interface)
        assert before is not None and after is not None, interface
        counted += after - before
    hosts = host_names(runtime.peers)
    everyone: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(everyone, (hosts[runtime.rank], counted / steps))
    degrees = {name: mesh[name].degree for name in meshes.AXES}
    profile = structure(cfg)
    batches = {rank: batches_of(layout, meshes.view(degrees, rank)) for rank in range(runtime.world_size)}
    leaving = {
        host: host_traffic.leaving_host(profile, parallel, degrees, hosts, batches, host)
        for host in dict.fromkeys(hosts)
    }
    by_host = dict(everyone)
    return {
        "degrees": degrees,
        "summary": host_traffic.summary(degrees, hosts, [peer.rank for peer in runtime.peers], leaving[hosts[0]]),
        "axes": leaving[hosts[0]],
        "predicted": {host: sum(axes.values()) for host, axes in leaving.items()},
        "counted": by_host,
        "ratio": max(by_host[host] / sum(axes.values()) for host, axes in leaving.items()),
        "least_ratio": min(by_host[host] / sum(axes.values()) for host, axes in leaving.items()),
        "seconds": seconds,
        "step_s": statistics.median(seconds),
    }


def disagreements(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Pairs of layouts of which the planner calls the slower one faster, neither by less than ``TIE``."""
    return [
        f"{a['layout']} before {b['layout']}"
        for a in rows
        for b in rows
        if a["planned_s"] < b["planned_s"] * (1 - TIE) and a["step_s"] > b["step_s"] * (1 + TIE)
    ]


def report(rate: float, found: dict[str, Any]) -> None:
    """Print a table, fastest first."""
    set_to = f"{rate:g} Mbit/s" if rate else "no limit"
    print(
        f"\n{set_to}: measured {found['between_gb_s'] * 8e3:.0f} Mbit/s from a host to the other, "
        f"{found['within_gb_s']:.2f} GB/s within one; an exchange beside its bytes {found['between_ms']:.1f} and "
        f"{found['within_ms']:.1f} ms; {found['gflops']:.1f} GFLOP/s per process"
    )
    print(f"{'layout':<18}{'predicted MiB':>14}{'counted MiB':>13}{'ratio':>8}{'step s':>9}{'planned s':>11}")
    for row in sorted(found["rows"], key=lambda row: row["step_s"]):
        predicted, counted = (max(row[name].values()) / 2**20 for name in ("predicted", "counted"))
        print(
            f"{row['layout']:<18}{predicted:>14.2f}{counted:>13.2f}{row['ratio']:>8.3f}{row['step_s']:>9.3f}"
            f"{row['planned_s']:>11.3f}"
        )
    found["disagreements"] = disagreements(found["rows"])
    print(f"order: {'; '.join(found['disagreements']) or 'the planner agrees'}")


if __name__ == "__main__":
    main()
