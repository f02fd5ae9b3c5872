"""One process of a group: ``torchrun --nproc_per_node N -m opensora.serve.worker CONFIG.yaml [key=value ...]``."""

from opensora.utils import signal_handler

if __name__ == "__main__":  # before torch is imported, which takes long enough to be interrupted in
    signal_handler.leave_when_asked("no job was begun", code=0)

from opensora.cli.main import run_cli
from opensora.serve.worker.group import main

if __name__ == "__main__":
    try:
        run_cli(main)
    except SystemExit as end:
        signal_handler.end_process(end.code if isinstance(end.code, int) else 1)
