"""Encode ahead: ``torchrun --nproc_per_node N -m opensora.cli.precompute CONFIG.yaml --out DIR [overrides]``.

Train with ``data.features=DIR`` afterwards. Stopped at any time, the same command goes on where it was.
"""

from opensora.utils import signal_handler

if __name__ == "__main__":  # before torch is imported, which takes long enough to be interrupted in
    signal_handler.leave_when_asked("shards that are written stay in --out; the same command makes the others", code=75)

from opensora.cli.main import run_cli
from opensora.config.load import config_from_argv
from opensora.config.run import RunConfig
from opensora.precompute import precompute
from opensora.utils.command_line.arguments import Parser, place, whole

MAX_EPOCHS = 10_000  # more windows than any clip has


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(
        prog="python -m opensora.cli.precompute",
        usage="%(prog)s CONFIG.yaml --out DIR [--epochs N] [section.key=value ...]",
        description="Write the latents and text features of a training configuration to a folder for data.features.",
    )
    parser.add_argument("--out", type=place, required=True, help="the folder; what is there already is kept")
    parser.add_argument("--epochs", type=whole(1, MAX_EPOCHS), default=1, help="windows per clip, in turn (1)")
    args, rest = parser.parse_known_args(argv)
    precompute(config_from_argv(RunConfig, rest, "Encode a data set ahead."), args.out, args.epochs)
    return 0


if __name__ == "__main__":
    run_cli(main)
