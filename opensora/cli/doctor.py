"""Look before a start: ``python -m opensora.cli.doctor CONFIG.yaml [section.key=value ...]``.

Of a training or a sampling configuration it says which files are there, whether their names and shapes fit (headers
are read, values are not), what memory layouts need, and what to run next. Exit code 0 if it can be run, else 2.
"""

from opensora.utils import signal_handler

if __name__ == "__main__":
    signal_handler.listen_early()

from collections.abc import Mapping, Sequence
from dataclasses import replace

from opensora.assembly.file_checks import (
    Finding,
    autoencoder_files,
    encoder_files,
    image_encoder_files,
    look,
    run_files,
)
from opensora.cli.forecast import MAX_GIB, MAX_WORLD, describe
from opensora.cli.main import run_cli
from opensora.config.load import is_training, load_config
from opensora.config.run import RunConfig, SampleConfig, StillConfig, check_fit
from opensora.inference.find import Source, as_configured, find_source
from opensora.inference.memory import memory_of
from opensora.planner.devices import DEVICES, Device
from opensora.planner.search import RESERVE, Planner, check_own
from opensora.train.validate import planned_clips
from opensora.utils.command_line.arguments import Parser, number, whole
from opensora.utils.errors import UserError
from opensora.utils.files.published_files import how_to_fetch_all

GIB = 2**30
WORLDS = (1, 2, 4, 8)


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="python -m opensora.cli.doctor", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("config", help="a configuration for training or sampling; overrides section.key=value follow")
    parser.add_argument("--world", type=whole(1, MAX_WORLD), action="append", help="how many devices; may be repeated")
    parser.add_argument("--device", choices=DEVICES, default="h100")
    parser.add_argument("--memory-gib", type=number(0, MAX_GIB, above=True), help="of a device; default: its own")
    args, overrides = parser.parse_known_args(argv)
    device = DEVICES[args.device]
    if args.memory_gib is not None:
        device = replace(device, memory=int(args.memory_gib * GIB))
    worlds = tuple(dict.fromkeys(args.world or WORLDS))
    command = " ".join([args.config, *overrides])
    if is_training(RunConfig, args.config):
        cfg = load_config(RunConfig, args.config, overrides)
        findings = run_files(cfg)
        show(findings)
        print(f"memory of a process on {args.device}, GiB, in the largest bucket:")
        for world in worlds:
            print(f"  {world:>4} x {training_memory(cfg, world, device)}")
        return advise(findings, f"bash launch/torchrun.sh {worlds[-1]} scripts/diffusion/train.py {command}")
    job = load_config(SampleConfig, args.config, overrides)
    findings, source = sample_files(job)
    show(findings)
    if source is not None:
        print(f"memory of a process on {args.device}, GiB:")
        for world in worlds:
            print(f"  {world:>4} x {sampling_memory(job, source, world, device)}")
    return advise(findings, f"bash launch/torchrun.sh {worlds[-1]} scripts/diffusion/inference.py {command}")


def sample_files(cfg: SampleConfig) -> tuple[list[Finding], Source | None]:
    """What became of every file of a job, and what its weights are of, as far as they can be read."""
    found: list[Source] = []
    alone = replace(cfg, low_noise=None, sampling=replace(cfg.sampling, guidance_low=None))
    findings = [look("weights", cfg.weights, lambda: found.append(find_source(alone)))]
    if cfg.low_noise is not None:
        findings.append(look("low_noise.weights", cfg.low_noise.weights, lambda: found.append(find_source(cfg))))
    source = found[-1] if found else as_configured(cfg)
    for name in ("lora", "prompt_csv", "watermark"):
        if path := getattr(cfg, name):
            findings.append(look(name, path))
    findings += [look("ref", part.strip()) for part in (cfg.ref or "").split(";") if part.strip()]
    vae, text = (source.vae, source.text) if source else (cfg.vae, cfg.text)
    if vae is not None and text is not None:
        findings += encoder_files(vae, text)
    if source is not None:
        findings += image_encoder_files(source.image_encoder)
    if cfg.still is not None:
        findings += _still_files(cfg, cfg.still)
    if source is not None:
        try:
            check_fit(source.model, source.vae, source.text, source.image_encoder)
        except ValueError as error:
            findings.append(Finding("model", str(source.path), str(error)))
    return findings, source


def _still_files(cfg: SampleConfig, still: StillConfig) -> list[Finding]:
    """Of the model of stills, whose text encoder is that of the clips unless it has its own."""
    of_stills = replace(cfg, weights=still.weights, model=still.model, vae=still.vae, text=still.text or cfg.text)
    of_stills = replace(of_stills, image_encoder=None)
    found = [look("still.weights", still.weights, lambda: find_source(replace(of_stills, lora=None)))]
    if still.vae is not None:
        own = encoder_files(still.vae, still.text) if still.text else autoencoder_files(still.vae)
        found += [replace(finding, key=f"still.{finding.key}") for finding in own]
    return found


def training_memory(cfg: RunConfig, world: int, device: Device) -> str:
    """The configured layout on ``world`` devices."""
    if problem := check_own(cfg, world):
        return problem
    try:
        planner = Planner(cfg, world, device, device_type="cuda", clips=planned_clips(cfg))
    except UserError as error:
        return str(error)
    own = planner.one(cfg.parallel, planner.shapes[-1])
    fits = "" if own.peak <= planner.room else f", more than the {planner.room / GIB:.1f} that can be used"
    return f"{describe(own)}: {own.peak / GIB:.1f} on {own.shape}{fits}"


def sampling_memory(cfg: SampleConfig, source: Source, world: int, device: Device) -> str:
    """The configured layout on ``world`` devices."""
    try:
        found = memory_of(cfg, source, world, device)
    except UserError as error:
        return str(error)
    room = device.memory * (1 - RESERVE)
    fits = "" if found.peak <= room else f": more than the {room / GIB:.1f} that can be used"
    return f"{found.peak / GIB:.1f} ({said(found.weights)} of weights; at most {said(found.turns)} in turn){fits}"


def said(sizes: Mapping[str, int]) -> str:
    """Names with their GiB."""
    return ", ".join(f"{name} {value / GIB:.1f}" for name, value in sizes.items())


def show(findings: Sequence[Finding]) -> None:
    """One line for each file."""
    for finding in findings:
        state = "ok" if finding.problem is None else "missing" if finding.missing else "does not fit"
        detail = "" if finding.problem is None else f": {finding.problem}"
        print(f"{state:<13}{finding.key}={finding.path}{detail}")


def advise(findings: Sequence[Finding], command: str) -> int:
    """Say what to run next; returns the exit code."""
    if not any(finding.problem for finding in findings):
        print(f"next: {command}")
        return 0
    for fetch in how_to_fetch_all(finding.path for finding in findings if finding.published):
        print(f"next: {fetch}")
    rest = [finding for finding in findings if finding.problem and not finding.published]
    if rest:
        print(f"next: give {', '.join(f'{finding.key}=...' for finding in rest)}")
    return 2


if __name__ == "__main__":
    run_cli(main)
