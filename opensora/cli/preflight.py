"""Processes and links, without training: ``srun ... python -m opensora.cli.preflight CONFIG.yaml [overrides]``."""

from opensora.utils import signal_handler

if __name__ == "__main__":  # before torch is imported, which takes long enough to be interrupted in
    signal_handler.listen_early()

from opensora.cli.main import run_cli
from opensora.config.load import config_from_argv
from opensora.config.run import RunConfig
from opensora.train.health.preflight import check_alone


def main(argv: list[str]) -> None:
    """Ends with an error when the processes cannot be one run."""
    check_alone(config_from_argv(RunConfig, argv, "Compare all processes of a run and measure what connects them."))


if __name__ == "__main__":
    run_cli(main)
