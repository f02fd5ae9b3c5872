"""The server of the web process: its address, its patience with slow connections, and its end. Home of uvicorn."""

import asyncio
import contextlib
import json
import logging
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from opensora.serve.address import url_of
from opensora.serve.refusal import Refused
from opensora.serve.web.service import Service
from opensora.utils.console import announce

HEADERS_S = 15.0  # until all headers of a request are there
HEADER_BYTES = 1 << 16
# Longer than clients (httpx 5 s) and proxies (nginx 60 s) keep a connection that is idle: who sends on one that is
# being closed gets no answer.
KEEP_ALIVE_S = 75
GRACE_S = 10.0  # after SIGTERM, for answers that are being sent


class PatientProtocol(H11Protocol):
    """uvicorn's, which waits for the headers of a request without end, and refuses in plain text."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        else:
            self._watch()

    def on_response_complete(self) -> None:
        self._unwatch()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        refused = json.dumps(Refused(400, "this is no HTTP that can be read", code="invalid_http").plain()).encode()
        head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(refused)}\r\n"
        self.transport.write(f"{head}Connection: close\r\n\r\n".encode() + refused)
        self.transport.close()

    def _watch(self) -> None:
        if self._patience is None:
            self._patience = self.loop.call_later(HEADERS_S, self._give_up)

    def _unwatch(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        self._patience = None
        if not self.transport.is_closing():
            self.transport.abort()


class WebServer(uvicorn.Server):
    """Ends at SIGTERM or SIGINT: streams of events end, answers are sent to their end, nothing new is taken."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's does not raise the signal again at the end, which is then a good one."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._service.stopping = True
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            announce(f"web: {url_of(sockets[0])}")


def serve(application: Any, service: Service, opened: socket.socket) -> None:
    """Until SIGTERM or SIGINT."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        application,
        http=PatientProtocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(GRACE_S),
    )
    WebServer(config, service).run(sockets=[opened])
