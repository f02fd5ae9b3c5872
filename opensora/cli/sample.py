"""Sample: ``torchrun --nproc_per_node N scripts/diffusion/inference.py CONFIG.yaml --prompt "..."``."""

from opensora.utils import signal_handler

if __name__ == "__main__":  # before torch is imported, which takes long enough to be interrupted in
    signal_handler.leave_when_asked(
        "samples that are written stay in save_dir; the same command makes all of them again"
    )

from opensora.cli.main import run_cli
from opensora.config.load import config_from_argv
from opensora.config.run import SampleConfig
from opensora.inference.job import sample
from opensora.utils.console import announce


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    for file in sample(config_from_argv(SampleConfig, argv, "Sample videos from a trained model.")):
        announce(file)
    return 0


if __name__ == "__main__":
    run_cli(main)
