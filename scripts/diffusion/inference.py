"""Entry point for torchrun and srun; see opensora/cli/sample.py."""

from opensora.utils import signal_handler

if __name__ == "__main__":
    # Before torch is imported, which takes long enough to be interrupted in.
    signal_handler.leave_when_asked(
        "samples that are written stay in save_dir; the same command makes all of them again"
    )

    from opensora.cli.main import run_cli
    from opensora.cli.sample import main

    run_cli(main)
