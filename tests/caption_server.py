"""A captioning model that is none, behind OpenAI's interface on this machine: as slow and senseless as a test wants."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """What is sent; ``drop``: the connection is closed instead."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012  (nobody writes to it)
    wait_s: float = 0.0
    drop: bool = False


def says(text: Any, **more: Any) -> Reply:
    """A good answer."""
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    body = {"id": "x", "object": "chat.completion", "model": "seer-7b", "choices": [choice], "usage": usage}
    return Reply(body=json.dumps(body | more).encode())


class CaptionServer:
    """
    Attributes:
        replies: sent in this order, one for each request; then ``usual`` for all others.
        usual: from the parsed request.
        asked: (headers, parsed body) of every request.
        most: requests that were open at once, at most.
    """

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.usual: Callable[[dict], Reply] = lambda _: says("A cat sits.")
        self.asked: list[tuple[dict[str, str], dict]] = []
        self.most = self._open = 0
        self._guard = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self._guard:
            self.asked.append((dict(request.headers), body | {"path": request.path}))
            self._open += 1
            self.most = max(self.most, self._open)
            reply = self.replies.pop(0) if self.replies else self.usual(body)
        time.sleep(reply.wait_s)
        with self._guard:
            self._open -= 1
        if reply.drop:
            request.close_connection = True
            request.connection.close()
            return
        try:
            request.send_response(reply.status)
            for name, value in reply.headers.items():
                request.send_header(name, value)
            request.send_header("Content-Length", str(len(reply.body)))
            request.end_headers()
            request.wfile.write(reply.body)
        except OSError:  # who asked did not wait
            pass
