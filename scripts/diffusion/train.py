"""Entry point for torchrun and srun; see opensora/cli/train.py."""

from opensora.utils import signals

if __name__ == "__main__":
    signals.remember()  # before torch is imported, which takes long enough to be interrupted in

    from opensora.cli.train import main
    from opensora.config import run_cli

    run_cli(main)
