"""A small read-only HTTP server that no client can hold up: it runs in threads beside the work."""

import logging
import socket
import socketserver
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
"""With more, the oldest is cut off: a few slow clients can neither use up threads nor lock out the operator."""

CLIENT_TIMEOUT = 5.0
"""Seconds that one read or write may take."""


class Page(NamedTuple):
    content_type: str
    body: bytes


Pages = Callable[[str], Page | None]
"""Path -> page, or None if there is no such page."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # the usual 5 fill up in a burst, and a client that finds no place waits for seconds

    def __init__(self, host: str, port: int, pages: Pages) -> None:
        self.pages = pages
        self._connections: list[socket.socket] = []
        self._lock = threading.Lock()
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """HTTPServer asks the DNS for its own name here, which blocks where the network is closed."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "finetune-trainer", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.append(request)
            if len(self._connections) > MAX_CONNECTIONS:
                _cut(self._connections.pop(0))
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            if request in self._connections:
                self._connections.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("A telemetry client broke off", exc_info=True)


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        logger.debug("The oldest telemetry connection was already closed")


class _Handler(BaseHTTPRequestHandler):
    """One request per connection (HTTP/1.0)."""

    timeout = CLIENT_TIMEOUT
    server_version = "finetune-trainer"
    sys_version = ""

    def do_GET(self) -> None:
        page = cast(_Server, self.server).pages(urlsplit(self.path).path)
        if page is None:
            self._answer(HTTPStatus.NOT_FOUND, Page("text/plain; charset=utf-8", b"not found\n"))
        else:
            self._answer(HTTPStatus.OK, page)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server answers by itself; 501 is its word for a method without a do_ function."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self._answer(status, Page("text/plain; charset=utf-8", f"{status.phrase.lower()}\n".encode()))

    def _answer(self, status: HTTPStatus, page: Page) -> None:
        self.send_response(status)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def serve(host: str, port: int, pages: Pages) -> _Server:
    """Starts to serve `pages`; port 0 takes any free one. Raises OSError if it is in use."""
    server = _Server(host, port, pages)
    threading.Thread(target=server.serve_forever, args=(0.1,), name="telemetry", daemon=True).start()
    return server
