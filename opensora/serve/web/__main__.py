"""The web process: ``python -m opensora.serve.web configs/serve/demo.yaml [key=value ...]``."""

from opensora.utils import signal_handler

if __name__ == "__main__":
    signal_handler.listen_early()

import sys
from pathlib import Path

from opensora.config.load import config_from_argv
from opensora.serve.config import ServeConfig
from opensora.serve.store import Store
from opensora.utils.command_line.command import call
from opensora.utils.errors import UserError


def main(argv: list[str]) -> int:
    """Returns the exit code, when a signal has ended it."""
    cfg = config_from_argv(ServeConfig, argv, "Answer requests for videos; a worker group makes them.")
    run(cfg)
    return 0


def run(cfg: ServeConfig) -> None:
    """Answer until SIGTERM or SIGINT.

    Raises:
        UserError: a package is missing, an address in use, or a file of keys that cannot be read.
    """
    try:
        from opensora.serve.web import app, server
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install -r requirements.txt") from error
    from opensora.serve.address import listen
    from opensora.serve.queues import open_queue
    from opensora.serve.web.auth import Keys, Origins
    from opensora.serve.web.service import Service

    Keys(None if cfg.keys is None else Path(cfg.keys)), Origins(cfg)  # before anything is made
    opened = listen(cfg.host, cfg.port)
    store = Store(cfg.out)
    service = Service(cfg, open_queue(cfg, store), store)
    server.serve(app.application(service), service, opened)


if __name__ == "__main__":
    sys.exit(call(main))
