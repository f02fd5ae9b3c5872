"""Sample: ``torchrun --nproc_per_node N scripts/diffusion/inference.py CONFIG.yaml --prompt "..."``."""

from opensora.config.load import config_from_argv
from opensora.config.run import SampleConfig
from opensora.inference.pipeline import sample
from opensora.utils.console import announce


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    for file in sample(config_from_argv(SampleConfig, argv, "Sample videos from a trained model.")):
        announce(file)
    return 0
