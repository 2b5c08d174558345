"""The page and its answers, on this machine only, from the standard library's server."""

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

from jinja2 import Environment, PackageLoader, StrictUndefined

from neuclip.errors import UserError
from neuclip.search.engine import Engine, Found

HOST = "127.0.0.1"
RESULTS = 24
_MAX_RESULTS = 200
_LARGEST_UPLOAD = 64 * 2**20
_THUMBNAIL, _LARGE = 256, 1024
_LONGEST_TEXT = 10_000  # characters of a query


@dataclass(frozen=True)
class About:
    """What the page says of itself.

    Attributes:
        model: Name of the checkpoint.
        data: Name of the data.
        pictures: Number of pictures.
        damaged: Samples that could not be read.
        damage: What was wrong with them.
    """

    model: str
    data: str
    pictures: int
    damaged: int
    damage: str


def make_server(engine: Engine, about: About, port: int) -> ThreadingHTTPServer:
    """A server that answers on `http://127.0.0.1:PORT/`; `serve_forever` starts it.

    Args:
        engine: What answers.
        about: What the page says.
        port: 0: any free one.

    Raises:
        UserError: the port is taken, or needs rights that are not there.
    """
    environment = Environment(
        loader=PackageLoader("neuclip"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("search.html.j2")

    class Bound(_Handler):
        pass

    Bound.engine = engine
    Bound.page = lambda nonce: template.render(about=about, nonce=nonce, results=RESULTS)
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
                lambda: self.engine.like(_whole(asked, "position"), _number(asked))
            ),
            "/picture": lambda: self._send_picture(asked),
        }
        self._answer(answers.get(parts.path))

    def do_POST(self) -> None:
        parts = urlsplit(self.path)
        asked = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        if length > _LARGEST_UPLOAD:
            self._discard(length)
            limit = f"{_LARGEST_UPLOAD // 2**20} MB"
            self._send_error(f"The picture is too large: {limit} is the most.", 413)
            return
        content = self.rfile.read(length)
        found = lambda: self.engine.by_picture(content, _number(asked))  # noqa: E731
        answers = {"/search": lambda: self._send_found(found)}
        self._answer(answers.get(parts.path))

    def _discard(self, length: int) -> None:
        """Reads on, within reason: a client that is still sending would not see the answer."""
        self.close_connection = True  # what is not read would be taken for a request
        left = min(length, 16 * _LARGEST_UPLOAD)
        while left and (chunk := self.rfile.read(min(left, 2**16))):
            left -= len(chunk)

    def log_message(self, format: str, *args: object) -> None:
        """The terminal stays quiet: queries are nobody's business."""

    def _answer(self, answer: Callable[[], None] | None) -> None:
        # A name of another site that leads here (DNS rebinding) must not read the pictures.
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host not in {HOST, "localhost"}:
            self._send_error(f"Open http://{HOST}:{self.server.server_port}/ instead.", 403)  # type: ignore[attr-defined]
        elif answer is None:
            self._send_error("There is no such page.", HTTPStatus.NOT_FOUND)
        else:
            try:
                answer()
            except UserError as error:
                self._send_error(str(error), HTTPStatus.BAD_REQUEST)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the browser went elsewhere

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

    def _send_picture(self, asked: dict[str, str]) -> None:
        side = _LARGE if asked.get("size") == "large" else _THUMBNAIL
        content = self.engine.thumbnail(_whole(asked, "position"), side)
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
        whole = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        whole |= {"Content-Type": kind, "Content-Length": str(len(content))} | (headers or {})
        for name, value in whole.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _whole(asked: dict[str, str], name: str) -> int:
    text = asked.get(name, "")
    if not text.isascii() or not text.isdigit():
        raise UserError(f"{name} {text!r} is no whole number.")
    return int(text)


def _number(asked: dict[str, str]) -> int:
    number = _whole(asked, "number") if "number" in asked else RESULTS
    if not 1 <= number <= _MAX_RESULTS:
        raise UserError(f"number {number} is out of range: 1 to {_MAX_RESULTS}.")
    return number
