"""Entry point for torchrun and srun; see opensora/cli/train.py."""

from opensora.cli.train import main
from opensora.config import run_cli

if __name__ == "__main__":
    run_cli(main)
