"""Processes and links, without training: ``srun ... python -m opensora.cli.preflight CONFIG.yaml [overrides]``.

Compares what must be equal on all processes and measures what connects them, within hosts and between hosts.
"""

from opensora.utils import signal_handler

if __name__ == "__main__":  # before torch is imported, which takes long enough to be interrupted in
    signal_handler.listen_early()

from opensora.cli.main import run_cli
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.train.health.preflight import check_alone
from opensora.utils.command_line.arguments import Parser, place
from opensora.utils.files.user_files import try_output


def main(argv: list[str]) -> None:
    """Ends with an error when the processes cannot be one run."""
    parser = Parser(prog="python -m opensora.cli.preflight", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("config", help="a training configuration; overrides section.key=value follow")
    parser.add_argument("--links", type=place, help="file that the measured rates go to, for the planner")
    args, overrides = parser.parse_known_args(argv)
    cfg = load_config(RunConfig, args.config, overrides)
    if args.links:
        try_output(args.links, "--links")
    check_alone(cfg, args.links)


if __name__ == "__main__":
    run_cli(main)
