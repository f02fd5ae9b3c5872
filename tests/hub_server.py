"""A hub of files on this machine, which answers as huggingface.co does: for tests of downloads, without a network."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = ".safetensors"  # kept in LFS, whose digest is a SHA-256


class Hub:
    """One repository, ``some/where``, at ``commit``; what is wrong with it is set by a test.

    Attributes:
        content: path of a file -> its bytes.
        sent: path -> bytes that are sent in place of those that are listed.
        asked: (path, first byte, behind the last) of each part that was asked for.
        refuse_from: parts that begin here or behind are refused (403).
        hold_from: parts that begin here or behind wait until ``release`` is set; ``held`` is set by the first.
        drop: so many parts are broken off in the middle.
        parts: whether parts are sent at all, or always the whole.
        closed: 401 is the answer to everything, as of a repository whose licence was not accepted.
    """

    def __init__(self) -> None:
        self.commit = COMMIT
        self.content: dict[str, bytes] = {"b/config.json": b"{}", "a.safetensors": b"weights"}
        self.sent: dict[str, bytes] = {}
        self.asked: list[tuple[str, int, int]] = []
        self.refuse_from = self.hold_from = 1 << 60
        self.held, self.release = threading.Event(), threading.Event()
        self.drop = 0
        self.parts, self.closed, self._gone = True, False, False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._gone = True  # also for connections that are open
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        if self._gone:
            request.close_connection = True
            return None
        if self.closed:
            return _send(request, 401, b"{}")
        if path.startswith("/api/models/some/where/tree/"):
            found = path.removeprefix("/api/models/some/where/tree/") == self.commit
            return _send(request, 200 if found else 404, json.dumps(self._tree()).encode())
        if path == "/api/models/some/where" or re.fullmatch("/api/models/some/where/revision/(main|v1)", path):
            return _send(request, 200, json.dumps({"id": "some/where", "sha": self.commit}).encode())
        file = path.removeprefix(f"/some/where/resolve/{self.commit}/")
        if file not in self.content:
            return _send(request, 404, b"{}")
        self._send_part(request, file)

    def _tree(self) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = [{"type": "directory", "path": "b", "oid": "0" * 40, "size": 0}]
        for path, content in self.content.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            row: dict[str, object] = {"type": "file", "path": path, "oid": blob, "size": len(content)}
            if path.endswith(LARGE):
                row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            rows.append(row)
        return rows

    def _send_part(self, request: BaseHTTPRequestHandler, file: str) -> None:
        content = self.sent.get(file, self.content[file])
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        begin, end = (int(wanted[1]), int(wanted[2]) + 1) if wanted else (0, len(content))
        if (begin, end) != (0, 1):  # else it is asked whether there are parts
            self.asked.append((file, begin, end))
        if begin >= self.refuse_from:
            return _send(request, 403, b"{}")
        if begin >= self.hold_from:
            self.held.set()
            self.release.wait(60)
        if not self.parts:
            return _send(request, 200, content)
        broken = self.drop > 0 and end - begin > 1
        self.drop -= broken
        _send(request, 206, content[begin:end], broken=broken)


def _send(request: BaseHTTPRequestHandler, status: int, content: bytes, *, broken: bool = False) -> None:
    try:
        request.send_response(status)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content[: len(content) // 2] if broken else content)
    except OSError:  # the other side has been killed
        request.close_connection = True
    if broken:
        request.close_connection = True
