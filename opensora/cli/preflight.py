"""Processes and links, without training: ``srun ... python -m opensora.cli.preflight CONFIG.yaml [overrides]``."""

import sys

from opensora.config import RunConfig, config_from_argv, run_cli
from opensora.train.preflight import check_alone
from opensora.train.setup import StartError


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 when the processes can be one run, 1 when they do not find each other."""
    cfg = config_from_argv(RunConfig, argv, "Compare all processes of a run and measure what connects them.")
    try:
        check_alone(cfg)
    except StartError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    run_cli(main)
