"""Entry point for torchrun and srun; see opensora/cli/train.py."""

from opensora.utils import signal_handler

if __name__ == "__main__":
    signal_handler.install()  # before torch is imported, which takes long enough to be interrupted in

    from opensora.cli.main import run_cli
    from opensora.cli.train import INTERRUPTED, main

    try:
        run_cli(main)
    except SystemExit as end:
        if end.code in (0, INTERRUPTED):  # the state is on disk
            signal_handler.end_process(end.code)
        raise
