"""What the service costs over the command, how fast it lets go, what batches bring, and how fast it answers.

    python -m benchmarks.service [--processes 1] [--rounds 5] [--clip-s 10] [--pollers 50]

overhead    from POST to completed (asked every 50 ms), against the sampling command's own functions on loaded models
            for the same clip, in turns. Median of the rounds. The whole command, which loads everything first,
            is printed beside it.
cancel      from the cancel call in the middle of a clip to the first step of the next job that waits.
batches     8 short clips, workers.batch_size 8 against 1: ratio of the times from the first POST to the last end. Also
            with workers.exact=false, where clips are made together whose last bits that changes, as on most CPUs.
status      95th percentile of GET /v1/videos/{id} while a clip is sampled and ``--pollers`` clients ask all the time.

The model is the one that comes with the package. Prints one JSON line at the end.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
CONFIG, WEIGHTS = "configs/serve/demo.yaml", "opensora/pretrained/shapes"
PROMPT = "a red circle moves left on a gray background"
FINAL = ("completed", "failed")
START_S = 600.0


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clip-s", type=float, default=10.0, help="about how long the clip of the overhead takes")
    parser.add_argument("--pollers", type=int, default=50)
    parser.add_argument("--as-command", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.as_command:
        return as_command()
    found: dict[str, Any] = {"benchmark": "service", "processes": args.processes, "load": round(os.getloadavg()[0], 1)}
    with tempfile.TemporaryDirectory() as folder:
        with service(Path(folder) / "batched", args.processes, 8) as client:
            found |= measure(client, args, Path(folder))
            exact = eight(client)
        with service(Path(folder) / "alone", args.processes, 1) as client:
            alone = eight(client)
        with service(Path(folder) / "rounded", args.processes, 8, "workers.exact=false") as client:
            together = eight(client)
    found |= {"one_by_one_s": alone, "batch_s": together, "batch_ratio": alone / together}
    found |= {"exact_batch_s": exact, "exact_batch_ratio": alone / exact}
    print(f"8 clips one by one: {alone:.2f} s; batches with the bits of clips alone: {alone / exact:.2f} times as fast")
    print(f"batches without that promise (workers.exact=false): {together:.2f} s, {alone / together:.2f} times as fast")
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}))
    return 0


def measure(client: httpx.Client, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Overhead, cancel and status, of one service."""
    timed(client, steps=20)
    steps = max(20, int(100 * args.clip_s / timed(client, steps=100)))
    with command(args.processes, folder) as make:
        make(20)
        rounds = [(timed(client, steps), make(steps)) for _ in range(args.rounds)]
    served, made = (statistics.median(times) for times in zip(*rounds, strict=True))
    overhead = statistics.median(one / other - 1 for one, other in rounds)
    print(
        f"a clip of {steps} steps: service {served:.2f} s, command's functions {made:.2f} s: {overhead:+.1%} (median)"
    )
    whole = whole_command(args.processes, steps, folder)
    print(f"the whole command, which loads torch and the model first: {whole:.2f} s")
    cancelled = statistics.median(cancel_to_next(client) for _ in range(args.rounds))
    print(f"from cancel to the first step of the next job: {cancelled:.2f} s (median)")
    p50, p95, calls = asyncio.run(polled(client, args.pollers, steps))
    print(
        f"status: {calls} calls of {args.pollers} clients, median {p50 * 1000:.0f} ms, 95 % within {p95 * 1000:.0f} ms"
    )
    named = {"steps": steps, "service_s": served, "command_s": made, "overhead": overhead, "whole_command_s": whole}
    return named | {"cancel_s": cancelled, "status_p50_s": p50, "status_p95_s": p95, "status_calls": calls}


@contextmanager
def service(out: Path, processes: int, batch: int, *more: str) -> Iterator[httpx.Client]:
    """A client of a service that is ready; it ends with the block."""
    words = [f"weights={WEIGHTS}", f"out={out}", "port=0", "quota.free_gib=0"]
    words += [f"workers.processes={processes}", f"workers.batch_size={batch}", *more]
    command = [sys.executable, "-m", "opensora.cli.serve", CONFIG, *words]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    try:
        address = next(line.split()[-1] for line in process.stderr if line.startswith("ready: http"))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        with httpx.Client(base_url=address, timeout=60.0) as client:
            yield client
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(START_S)


def submit(client: httpx.Client, steps: int, seed: int = 1) -> str:
    fields = {"prompt": PROMPT, "num_inference_steps": str(steps), "seed": str(seed)}
    answer = client.post("/v1/videos", data=fields)
    answer.raise_for_status()
    return str(answer.json()["id"])


def status(client: httpx.Client, id: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/v1/videos/{id}").raise_for_status().json()
    return found


def wait(client: httpx.Client, id: str, until: Sequence[str] = FINAL) -> dict[str, Any]:
    while (found := status(client, id))["status"] not in until:
        time.sleep(0.05)
    assert found["error"] is None, found
    return found


def timed(client: httpx.Client, steps: int) -> float:
    began = time.monotonic()
    wait(client, submit(client, steps))
    return time.monotonic() - began


def eight(client: httpx.Client, steps: int = 30) -> float:
    """Seconds of 8 jobs that are there at once, behind a first 8 that a new size of batch is looked at with."""
    for seed in (100, 200):
        began = time.monotonic()
        for id in [submit(client, steps, seed + number) for number in range(8)]:
            wait(client, id)
    return time.monotonic() - began


def cancel_to_next(client: httpx.Client) -> float:
    first = submit(client, 10_000)
    wait(client, first, ("in_progress",))
    second = submit(client, 21)  # of another batch
    time.sleep(1.0)
    began = time.monotonic()
    client.post(f"/v1/videos/{first}/cancel").raise_for_status()
    wait(client, second, ("in_progress", "completed"))
    seconds = time.monotonic() - began
    wait(client, second)
    return seconds


async def polled(client: httpx.Client, pollers: int, steps: int) -> tuple[float, float, int]:
    """(median, 95th percentile, number) of the seconds of status calls while a clip is sampled."""
    id, times = submit(client, steps), list[float]()
    limits = httpx.Limits(max_connections=pollers)
    async with httpx.AsyncClient(base_url=client.base_url, timeout=60.0, limits=limits) as many:

        async def poll() -> None:
            done = False
            while not done:
                began = time.monotonic()
                answer = await many.get(f"/v1/videos/{id}")
                times.append(time.monotonic() - began)
                done = answer.raise_for_status().json()["status"] in FINAL

        await asyncio.gather(*(poll() for _ in range(pollers)))
    return statistics.median(times), statistics.quantiles(times, n=20)[-1], len(times)


def words_of_command(processes: int) -> list[str]:
    return ["bash", "launch/torchrun.sh", str(processes)]


def whole_command(processes: int, steps: int, folder: Path) -> float:
    words = ["scripts/diffusion/inference.py", "configs/sample/demo.yaml", f"weights={WEIGHTS}", "sampling.seed=1"]
    words += [f"sampling.num_steps={steps}", f"save_dir={folder / 'command'}", "--prompt", PROMPT]
    began = time.monotonic()
    subprocess.run([*words_of_command(processes), *words], cwd=ROOT, check=True, capture_output=True)
    return time.monotonic() - began


@contextmanager
def command(processes: int, folder: Path) -> Iterator[Any]:
    """A function from steps to the seconds that the sampling command's own functions take, models being loaded."""
    environment = os.environ | {"BENCHMARK_OUT": str(folder / "made")}
    words = [*words_of_command(processes), "-m", "benchmarks.service", "--as-command"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, cwd=ROOT, text=True, env=environment, start_new_session=True, **pipes)
    assert process.stdin is not None and process.stdout is not None
    asked = folder / "made" / "asked"
    asked.parent.mkdir(parents=True)

    def make(steps: int) -> float:
        assert process.stdout is not None
        asked.with_suffix(".new").write_text(str(steps))
        asked.with_suffix(".new").rename(asked)
        return next(float(line.split()[1]) for line in process.stdout if line.startswith("seconds "))

    try:
        yield make
    finally:
        asked.write_text("0")
        process.wait(START_S)


def as_command() -> int:
    """Loads as the command does, then makes a clip of as many steps as a file says, until it says 0."""
    from dataclasses import replace

    import torch.distributed as dist

    from acceleration.distributed import runtime as runtimes
    from opensora.config.load import load_config
    from opensora.config.run import SampleConfig
    from opensora.inference.batches import sample_jobs
    from opensora.inference.find import find_source
    from opensora.inference.load import load_components
    from opensora.inference.prompts import read_jobs

    out = Path(os.environ["BENCHMARK_OUT"])
    words = [f"weights={WEIGHTS}", f"prompt={PROMPT}", f"save_dir={out}", "sampling.seed=1"]
    cfg = load_config(SampleConfig, ROOT / "configs/sample/demo.yaml", words)
    jobs, source = read_jobs(cfg), find_source(cfg)
    runtime = runtimes.start(cfg.parallel.timeout_s, mesh=cfg.parallel.mesh, interface=cfg.parallel.interface)
    parts = load_components(cfg, source, runtime)
    while steps := asked_steps(out / "asked"):
        began = time.monotonic()
        sample_jobs(parts, replace(cfg, sampling=replace(cfg.sampling, num_steps=steps)), jobs, quiet=True)
        if dist.get_rank() == 0:
            print("seconds", time.monotonic() - began, flush=True)
    runtimes.stop()
    return 0


def asked_steps(file: Path) -> int:
    """The same on all processes. The first one waits for the file, and removes it."""
    import torch.distributed as dist

    told: list[int | None] = [None]
    if dist.get_rank() == 0:
        while not file.exists():
            time.sleep(0.01)
        told[0] = int(file.read_text())
        file.unlink()
    dist.broadcast_object_list(told)
    return int(told[0] or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
