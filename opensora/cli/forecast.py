"""Forecast memory, traffic and time: ``python -m opensora.cli.forecast CONFIG.yaml --world 512 --device h100``.

Starts no process and allocates nothing. Prints the configured layout on every bucket, then the fastest layouts that fit
the heaviest bucket. Of a configuration for sampling: memory and time of every turn.
"""

from opensora.utils import signal_handler

if __name__ == "__main__":  # before torch is imported, which takes long enough to be interrupted in
    signal_handler.listen_early()

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from opensora.cli.main import run_cli
from opensora.config.load import is_training, load_config
from opensora.config.run import RunConfig, SampleConfig
from opensora.inference.find import source_of
from opensora.inference.memory import memory_of
from opensora.planner.devices import DEVICES, Device
from opensora.planner.encoder_memory import encoder_bytes, frozen_bytes, image_encoder_bytes
from opensora.planner.layout_forecast import Forecast, ValidationForecast
from opensora.planner.network import Network, read_links
from opensora.planner.search import RESERVE, Planner, check_own
from opensora.train.validate import planned_clips
from opensora.utils.command_line.arguments import Parser, number, place, whole
from opensora.utils.console import Progress

MAX_WORLD = 4096
MAX_TOP = 1000
MAX_GIB = 2**20
GIB = 2**30
COLUMNS = (
    f"{'peak':>7}{'state':>7}{'grads':>7}{'gather':>7}{'buffer':>7}{'activ.':>7} |{'fsdp':>8}{'replica':>8}"
    f"{'ring':>8}{'ulysses':>8}{'tensor':>8} |{'PFLOP':>9}{'step s':>9}{'MFU':>6}"
)


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="python -m opensora.cli.forecast", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("config", help="a configuration for training or sampling; overrides section.key=value follow")
    parser.add_argument("--world", type=whole(1, MAX_WORLD), required=True, help=f"number of devices, 1 to {MAX_WORLD}")
    parser.add_argument("--device", choices=DEVICES, default="h100")
    parser.add_argument("--memory-gib", type=number(0, MAX_GIB, above=True), help="of a device; default: its own")
    parser.add_argument("--links", type=place, help="rates that preflight measured: its file, or the folder of a run")
    parser.add_argument("--top", type=whole(1, MAX_TOP), default=10, help="how many layouts to list")
    parser.add_argument("--measure", action="store_true", help="run every shape on the meta device: slower")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    args, overrides = parser.parse_known_args(argv)
    device = DEVICES[args.device]
    if args.memory_gib is not None:
        device = replace(device, memory=int(args.memory_gib * GIB))
    if not is_training(RunConfig, args.config):
        return sampling(args.config, overrides, args.world, device, as_json=args.json)
    cfg = load_config(RunConfig, args.config, overrides)
    device_type = "cpu" if args.device == "cpu" else "cuda"
    network = read_links(args.links, device, args.world) if args.links else Network.of_device(device, args.world)
    clips = planned_clips(cfg)
    planner = Planner(
        cfg, args.world, device, device_type=device_type, exact=args.measure, network=network, clips=clips
    )
    problem = check_own(cfg, args.world)
    own = [] if problem else planner.own()
    if args.json:
        best = planner.best(args.top, show_progress())
        plain = {"own": [f.plain() for f in own], "best": [f.plain() for f in best], "room_gib": planner.room / GIB}
        print(json.dumps(plain | {"network": vars(network), "hybrid": planner.hybrid(best[0])}))
        return 0
    print(f"{args.world} x {args.device}; {planner.room / GIB:.1f} GiB of each can be used; GiB per process and step")
    if len(network.processes) > 1:
        print(network)
    if problem:
        print(f"\nthe configured layout does not fit {args.world} devices: {problem}")
    else:
        print(f"\nconfigured: {describe(own[0])}\n{'bucket':<44}{COLUMNS}")
        for forecast in own:
            too_much = "  does not fit" if forecast.peak > planner.room else ""
            print(f"{forecast.shape:<44}{row(forecast)}{too_much}")
        most = max(own, key=lambda forecast: forecast.encoding)
        if most.encoding:
            print(f"while clips are encoded: at most {most.encoding / GIB:.2f}, {most.shape}")
        longest = max(own, key=lambda forecast: forecast.text)
        if longest.text:
            print(f"while prompts are encoded: at most {longest.text / GIB:.2f}, {longest.shape}")
        if validation := own[-1].validation:
            print(rounds(validation))
        print(encoders(cfg, args.world))
    sys.stdout.flush()  # to be read while the layouts are timed, which takes longer
    best = planner.best(args.top, show_progress())
    print(f"\nfastest that fit {best[0].shape}\n{'layout':<44}{COLUMNS}")
    for forecast in best:
        print(f"{describe(forecast):<44}{row(forecast)}")
    proposal = planner.hybrid(best[0])
    if proposal:
        print(f"\n{proposal}")
    return 0


def sampling(config: str, overrides: Sequence[str], world: int, device: Device, *, as_json: bool) -> int:
    """Of a sampling job.

    Raises:
        UserError: one that cannot be sampled, or on another number of processes.
    """
    job = load_config(SampleConfig, config, overrides)
    found, room = memory_of(job, source_of(job), world, device), device.memory * (1 - RESERVE)
    if as_json:
        print(json.dumps(found.plain() | {"room_gib": room / GIB}))
        return 0
    print(f"{world} processes, offload={job.offload}; {room / GIB:.1f} GiB of each can be used")
    print(f"{'turn':<24}{'GiB':>8}{'weights':>9}{'seconds':>9}")
    for name, size in found.turns.items():
        too_much = "  does not fit" if size > room else ""
        seconds = f"{found.seconds[name]:>9.1f}" if name in found.seconds else f"{'':>9}"  # with those of the first
        print(f"{name:<24}{size / GIB:>8.2f}{found.weights[name] / GIB:>9.2f}{seconds}{too_much}")
    print("GiB: at most in a turn; weights: of the model whose turn it is, on the device; seconds: of a batch")
    if found.turns.keys() - found.seconds.keys():
        print("seconds of denoiser: of all steps, whichever of the two makes them")
    for name in sorted(found.bounds):
        print(f"{name}: at most {found.seconds[name]:.1f} s, as if cache.kind={job.sampling.cache.kind} reused nothing")
    return 0


def show_progress() -> Callable[[int, int], None]:
    """Draws on stderr how many layouts are timed."""
    drawn: list[Progress] = []

    def show(done: int, total: int) -> None:
        if not drawn:
            drawn.append(Progress(total, every_s=5.0, unit="layout"))
        drawn[0].update_to(done)
        if done == total:
            drawn[0].close()

    return show


def rounds(validation: ValidationForecast) -> str:
    """Memory and time of a round of validation."""
    parts = {"held-out loss": (validation.held_out, validation.held_out_s)}
    parts["clips of prompts"] = (validation.clips, validation.clips_s)
    said = (f"{name} {size / GIB:.2f}, {seconds:.3g} s" for name, (size, seconds) in parts.items() if size)
    return f"while validating, every {validation.every} steps: at most {'; '.join(said)}"


def encoders(cfg: RunConfig, world: int) -> str:
    """Weights of the frozen models on a process, of which ``state`` has those that stay there."""
    itemsize = 2 if cfg.parallel.precision.compute == "bf16" else 4
    pieces = max(1, world // cfg.parallel.mesh.replicate)
    autoencoder, text = encoder_bytes(cfg.vae, cfg.text, itemsize, pieces) if frozen_bytes(cfg, world) else (0, 0)
    said = f"of state: autoencoder {autoencoder / GIB:.2f}, text encoder {text / GIB:.2f}"
    image = image_encoder_bytes(cfg.image_encoder, itemsize, pieces)
    return f"{said}, image encoder {image / GIB:.2f}" if image and frozen_bytes(cfg, world) else said


def describe(forecast: Forecast) -> str:
    """A layout in a few words."""
    mesh = " ".join(f"{name}{degree}" for name, degree in forecast.degrees.items() if degree > 1) or "one process"
    return f"{mesh} zero{forecast.parallel.zero} {forecast.parallel.recompute.kind} x{forecast.batches}"


def row(forecast: Forecast) -> str:
    """The numbers of a line."""
    memory, sent = forecast.memory, forecast.sent
    parts = (memory.total, memory.state, memory.gradients, memory.gathered, memory.buffers, memory.activations)
    axes = (sent.get(axis, 0) for axis in ("fsdp", "replicas", "ring", "ulysses", "tensor"))
    return (
        "".join(f"{value / GIB:>7.2f}" for value in parts)
        + " |"
        + "".join(f"{value / GIB:>8.2f}" for value in axes)
        + f" |{forecast.flops / 1e15:>9.1f}{forecast.step_s:>9.2f}{forecast.mfu:>6.0%}"
    )


if __name__ == "__main__":
    run_cli(main)
