"""Serve models over HTTP: ``python -m opensora.cli.serve CONFIG.yaml [key=value ...]``; Ctrl-C ends all of it.

With ``--worker-only`` this process is one of a group of workers alone, as torchrun or srun starts them:
``srun python -m opensora.cli.serve CONFIG.yaml --worker-only``, beside a service whose ``workers.processes`` is 0.
"""

import sys
from pathlib import Path

from opensora.utils import signal_handler

if __name__ == "__main__":
    if "--worker-only" in sys.argv:
        signal_handler.leave_when_asked("no job was begun", code=0)  # before torch is imported, which takes long enough
    else:
        signal_handler.listen_early()

from opensora.cli.main import run_cli
from opensora.config.load import config_from_argv
from opensora.serve.config import ServeConfig
from opensora.serve.supervisor import serve
from opensora.utils.files.user_files import try_output

WORKER_ONLY = "--worker-only"
ABOUT = f"Serve models over HTTP. {WORKER_ONLY}: this process is one of a group of workers alone."


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 after a signal."""
    words = [word for word in argv if word != WORKER_ONLY]
    if len(words) < len(argv):
        from opensora.serve.worker.group import main as work

        return work(words)
    cfg = config_from_argv(ServeConfig, words, ABOUT)
    try_output(Path(cfg.out), "out", folder=True)
    return serve(cfg, words)


if __name__ == "__main__":
    try:
        run_cli(main)
    except SystemExit as end:
        if WORKER_ONLY in sys.argv:
            signal_handler.end_process(end.code if isinstance(end.code, int) else 1)
        raise
