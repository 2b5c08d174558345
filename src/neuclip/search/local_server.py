"""An HTTP server for one user of this machine, on the standard library's server.

Every address starts with a random secret, so other users of the machine and pages of other sites
cannot ask. Connections, waiting, and the bytes of a request are bounded.
"""

import contextlib
import errno
import io
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qs, urlsplit

from neuclip.errors import UserError
from neuclip.untrusted import whole_number

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

HOST = "127.0.0.1"
_NAMES = frozenset((HOST, "localhost"))  # names of this machine; their port may be a tunnel's
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_DISCARDED = 2**30

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Bounds of the server: with one decoder, 512 MB in all.

    Attributes:
        connections: open connections; further ones wait, then get status 503.
        seconds: time to receive a request, to send its answer, and between two requests.
        head: bytes of a request before its body.
        body: bytes of a request's body.
        bodies: requests with a body in memory at a time.
    """

    connections: int = 128
    seconds: float = 30.0
    head: int = 2**16
    body: int = 64 * 2**20
    bodies: int = 2


@dataclass(frozen=True)
class PageRequest:
    """A request.

    Attributes:
        path: path without the secret and the query, such as `/search`.
        query: the last value of each field of the query.
        body: body of a POST request; none for GET.
    """

    path: str
    query: Mapping[str, str]
    body: bytes | None = None


@dataclass(frozen=True)
class Reply:
    """An answer: content, its type, status, and further headers."""

    content: bytes
    kind: str
    status: int = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def of_json(cls, value: object, status: int = HTTPStatus.OK) -> "Reply":
        """An answer in JSON."""
        return cls(json.dumps(value).encode(), "application/json", status)


Answer = Callable[[PageRequest], Reply]


class LocalServer(ThreadingHTTPServer):
    """Listens on 127.0.0.1 once `start` is called; the port is taken before.

    Args:
        port: port; 0: any free one.
        limits: bounds.

    Raises:
        UserError: the port is in use, or opening it is not permitted.
    """

    request_queue_size = 512

    def __init__(self, port: int, limits: Limits | None = None) -> None:
        super().__init__((HOST, port), _Handler, bind_and_activate=False)
        self.limits = limits or Limits()
        self.secret = secrets.token_urlsafe(16)
        self.answer: Answer = lambda _: Reply.of_json({"error": "Not ready."}, 503)
        self.bodies = threading.BoundedSemaphore(self.limits.bodies)
        self._connections = threading.BoundedSemaphore(self.limits.connections)
        try:
            self.server_bind()
        except OSError as error:
            self.server_close()
            taken = error.errno == errno.EADDRINUSE
            reason = "is in use" if taken else f"cannot be opened: {error.strerror}"
            raise UserError(
                f"--port {port} {reason}; choose another (0 takes any free one)"
            ) from None

    @property
    def address(self) -> str:
        """The address of the page, with its secret."""
        return f"http://{HOST}:{self.server_port}/{self.secret}/"

    def start(self, answer: Answer) -> None:
        """Accepts connections; `serve_forever` then answers them.

        Args:
            answer: answers a request; called by several threads. A `UserError` becomes status 400.
        """
        self.answer = answer
        self.server_activate()

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Hands a connection to a thread; refuses it if too many are open."""
        if not self._connections.acquire(timeout=1):
            self._refuse(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no further thread can be started
            self._connections.release()
            self._refuse(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Answers the requests of a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def _refuse(self, request: socket.socket) -> None:
        request.settimeout(1)
        with contextlib.suppress(OSError):  # the client may be gone
            request.sendall(_BUSY)
        self.shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Reports nothing: a connection that breaks is the client's affair."""


class _Refused(Exception):
    """A request that is refused before it is answered."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _TimedInput(io.RawIOBase):
    """Reads a connection until a deadline, however slowly the bytes arrive, and up to a size."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.deadline = time.monotonic()
        self.room = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if self.room <= 0:
            raise ConnectionError("the request is too long")
        self._connection.settimeout(left)
        count = self._connection.recv_into(buffer)
        self.room -= count
        return count


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "neuclip"
    sys_version = ""

    @property
    def _local(self) -> LocalServer:
        return cast("LocalServer", self.server)

    def setup(self) -> None:
        super().setup()
        self._input = _TimedInput(self.connection)
        self.rfile = io.BufferedReader(self._input)

    def handle_one_request(self) -> None:
        limits = self._local.limits
        self._input.deadline, self._input.room = time.monotonic() + limits.seconds, limits.head
        super().handle_one_request()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing: queries are private."""

    def _handle(self) -> None:
        try:
            reply = self._reply()
        except _Refused as error:
            reply = Reply.of_json({"error": str(error)}, error.status)
            self.close_connection = True  # an unread body would look like the next request
        except UserError as error:
            reply = Reply.of_json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except (TimeoutError, ConnectionError):
            raise
        except Exception as error:
            log.exception("a request failed")
            reply = Reply.of_json({"error": f"Internal error: {type(error).__name__}."}, 500)
        self._send(reply)

    def _reply(self) -> Reply:
        """Checks a request and answers it. Nothing of its body is read before the checks."""
        path, query = self._asked()
        if self.command == "GET":
            return self._local.answer(PageRequest(path, query))
        length = self._length()
        if not self._local.bodies.acquire(timeout=self._local.limits.seconds):
            raise _Refused(503, "Other uploads are being read: try again.")
        try:
            return self._answer_body(path, query, length)
        finally:
            self._local.bodies.release()  # the body is gone by now

    def _answer_body(self, path: str, query: Mapping[str, str], length: int) -> Reply:
        self._input.room = length
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionError
        return self._local.answer(PageRequest(path, query, body))

    def _asked(self) -> tuple[str, dict[str, str]]:
        """Path and query of a request that may be answered."""
        self._check_names()
        secret = f"/{self._local.secret}"
        try:
            parts = urlsplit(self.path)
            query = parse_qs(parts.query, max_num_fields=16)
        except ValueError:
            raise _Refused(400, "This address is not valid.") from None
        head, path = parts.path[: len(secret)], parts.path[len(secret) :]
        if not secrets.compare_digest(head.encode(), secret.encode()):
            raise _Refused(403, "Open the address that neuclip search printed.")
        return path, {key: values[-1] for key, values in query.items()}

    def _check_names(self) -> None:
        """Refuses other names of this machine (DNS rebinding) and pages of other sites."""
        sent = {f"//{self.headers.get('Host') or ''}", self.headers.get("Origin") or f"//{HOST}"}
        try:
            names = {urlsplit(name).hostname for name in sent}
        except ValueError:
            names = {None}
        if not names <= _NAMES:
            raise _Refused(403, f"Open http://{HOST}:{self._local.server_port}/ instead.")

    def _length(self) -> int:
        """The length of the body, in bytes."""
        text = self.headers.get("Content-Length") or ""
        if "Transfer-Encoding" in self.headers or not text:
            raise _Refused(411, "Send the length of the file (Content-Length).")
        length, most = whole_number(text), self._local.limits.body
        if length is None:
            raise _Refused(400, "Content-Length is not a number.")
        if length > most:
            self._discard(length)
            raise _Refused(413, f"The file is too large: at most {most // 2**20} MB.")
        return length

    def _discard(self, length: int) -> None:
        """Reads a refused upload, up to a bound: clients read the answer only after sending."""
        left = self._input.room = min(length, _DISCARDED)
        while left and (chunk := self.rfile.read(min(left, 2**16))):
            left -= len(chunk)

    def _send(self, reply: Reply) -> None:
        self.connection.settimeout(self._local.limits.seconds)
        self.send_response(reply.status)
        headers = {
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Content-Type": reply.kind,
            "Content-Length": str(len(reply.content)),
            **reply.headers,
        }
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.content)
