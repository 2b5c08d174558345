"""Serves the page and its queries on this machine only, with the standard library's server."""

import dataclasses
import errno
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

from neuclip.errors import UserError
from neuclip.search.engine import Engine, Found
from neuclip.templates import render

HOST = "127.0.0.1"
RESULTS = 24
_MAX_RESULTS = 200
_LARGEST_UPLOAD = 64 * 2**20
_THUMBNAIL, _LARGE = 256, 1024
_LONGEST_TEXT = 10_000  # characters of a query


@dataclass(frozen=True)
class About:
    """Facts for the page's header.

    Attributes:
        model: name of the checkpoint.
        data: name of the data.
        images: number of images.
        damaged: number of corrupt samples.
        damage: summary of the corrupt samples.
    """

    model: str
    data: str
    images: int
    damaged: int
    damage: str


def make_server(engine: Engine, about: About, port: int) -> ThreadingHTTPServer:
    """Makes a server for `http://127.0.0.1:PORT/`; `serve_forever` starts it.

    Args:
        engine: answers the queries.
        about: header of the page.
        port: port to listen on; 0: any free port.

    Raises:
        UserError: the port is in use, or opening it is not permitted.
    """

    class Bound(_Handler):
        pass

    Bound.engine = engine
    Bound.page = lambda nonce: render("search.html.j2", about=about, nonce=nonce, results=RESULTS)
    try:
        return ThreadingHTTPServer((HOST, port), Bound)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        reason = "is in use" if taken else f"cannot be opened: {error.strerror}"
        raise UserError(f"--port {port} {reason}; choose another (0 takes any free one)") from None


class _Handler(BaseHTTPRequestHandler):
    engine: ClassVar[Engine]
    page: ClassVar[Callable[[str], str]]
    protocol_version = "HTTP/1.1"
    server_version = "neuclip"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        asked = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        answers = {
            "/": lambda: self._send_page(),
            "/search": lambda: self._send_found(
                lambda: self.engine.by_text(asked.get("text", "")[:_LONGEST_TEXT], _number(asked))
            ),
            "/like": lambda: self._send_found(
                lambda: self.engine.like(_integer(asked, "position"), _number(asked))
            ),
            "/image": lambda: self._send_image(asked),
        }
        self._answer(answers.get(parts.path))

    def do_POST(self) -> None:
        parts = urlsplit(self.path)
        asked = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        if length > _LARGEST_UPLOAD:
            self._discard(length)
            limit = f"{_LARGEST_UPLOAD // 2**20} MB"
            self._send_error(f"The file is too large: at most {limit}.", 413)
            return
        content = self.rfile.read(length)
        answers = {
            "/search": lambda: self._send_found(
                lambda: self.engine.by_image(content, _number(asked))
            ),
        }
        self._answer(answers.get(parts.path))

    def _discard(self, length: int) -> None:
        """Reads a refused upload, up to a bound: clients read the answer only after sending."""
        self.close_connection = True  # unread bytes would look like the next request
        left = min(length, 16 * _LARGEST_UPLOAD)
        while left and (chunk := self.rfile.read(min(left, 2**16))):
            left -= len(chunk)

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing: queries are private."""

    def _answer(self, answer: Callable[[], None] | None) -> None:
        # Another site whose name resolves to this machine (DNS rebinding) must not read images.
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host not in {HOST, "localhost"}:
            self._send_error(f"Open http://{HOST}:{self.server.server_port}/ instead.", 403)  # type: ignore[attr-defined]
        elif answer is None:
            self._send_error("Page not found.", HTTPStatus.NOT_FOUND)
        else:
            try:
                answer()
            except UserError as error:
                self._send_error(str(error), HTTPStatus.BAD_REQUEST)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the browser closed the connection

    def _send_page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        policy = (
            "default-src 'none'; img-src 'self' blob: data:; connect-src 'self'; "
            "form-action 'none'; base-uri 'none'; "
            f"style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'"
        )
        page = type(self).page(nonce).encode()
        self._send(page, "text/html; charset=utf-8", headers={"Content-Security-Policy": policy})

    def _send_found(self, search: Callable[[], Found]) -> None:
        started = time.perf_counter()
        found = search()
        answer = {**dataclasses.asdict(found), "seconds": time.perf_counter() - started}
        self._send(json.dumps(answer).encode(), "application/json")

    def _send_image(self, asked: dict[str, str]) -> None:
        side = _LARGE if asked.get("size") == "large" else _THUMBNAIL
        content = self.engine.thumbnail(_integer(asked, "position"), side)
        self._send(content, "image/png", headers={"Cache-Control": "private, max-age=3600"})

    def _send_error(self, message: str, status: int) -> None:
        content = json.dumps({"error": message}).encode()
        self._send(content, "application/json", status=status)

    def _send(
        self,
        content: bytes,
        kind: str,
        *,
        status: int = HTTPStatus.OK,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        merged = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        merged |= {"Content-Type": kind, "Content-Length": str(len(content))} | (headers or {})
        for name, value in merged.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _integer(asked: dict[str, str], name: str) -> int:
    text = asked.get(name, "")
    if not text.isascii() or not text.isdigit():
        raise UserError(f"{name} must be a non-negative integer, got {text!r}.")
    return int(text)


def _number(asked: dict[str, str]) -> int:
    number = _integer(asked, "number") if "number" in asked else RESULTS
    if not 1 <= number <= _MAX_RESULTS:
        raise UserError(f"number {number} is out of range: it must be 1 to {_MAX_RESULTS}.")
    return number
