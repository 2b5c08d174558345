"""The page and its queries, for the server of `neuclip search`."""

import dataclasses
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from neuclip.errors import UserError
from neuclip.search.engine import Engine, Found
from neuclip.search.local_server import Answer, PageRequest, Reply
from neuclip.templates import render
from neuclip.untrusted import whole_number

RESULTS = 24
_MAX_RESULTS = 200
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


def page_answers(engine: Engine, about: About) -> Answer:
    """Answers the requests of the page.

    Args:
        engine: answers the queries.
        about: header of the page.
    """
    routes: dict[tuple[str, bool], Callable[[PageRequest], Reply]] = {
        ("/", False): lambda _: _page(about),
        ("/search", False): lambda request: _found(
            lambda: engine.by_text(request.query.get("text", "")[:_LONGEST_TEXT], _number(request))
        ),
        ("/search", True): lambda request: _found(
            lambda: engine.by_image(request.body or b"", _number(request))
        ),
        ("/like", False): lambda request: _found(
            lambda: engine.like(_integer(request, "position"), _number(request))
        ),
        ("/image", False): lambda request: _image(engine, request),
    }

    def answer(request: PageRequest) -> Reply:
        route = routes.get((request.path, request.body is not None))
        if route is None:
            return Reply.of_json({"error": "Page not found."}, HTTPStatus.NOT_FOUND)
        return route(request)

    return answer


def _page(about: About) -> Reply:
    nonce = secrets.token_urlsafe(16)
    policy = (
        "default-src 'none'; img-src 'self' blob: data:; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
        f"style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'"
    )
    page = render("search.html.j2", about=about, nonce=nonce, results=RESULTS)
    headers = {"Content-Security-Policy": policy}
    return Reply(page.encode(), "text/html; charset=utf-8", headers=headers)


def _found(search: Callable[[], Found]) -> Reply:
    started = time.perf_counter()
    found = search()
    seconds = time.perf_counter() - started
    return Reply.of_json({**dataclasses.asdict(found), "seconds": seconds})


def _image(engine: Engine, request: PageRequest) -> Reply:
    side = _LARGE if request.query.get("size") == "large" else _THUMBNAIL
    content = engine.thumbnail(_integer(request, "position"), side)
    return Reply(content, "image/png", headers={"Cache-Control": "private, max-age=3600"})


def _integer(request: PageRequest, name: str) -> int:
    text = request.query.get(name, "")
    number = whole_number(text)
    if number is None:
        raise UserError(f"{name} must be a non-negative integer, got {text[:40]!r}.")
    return number


def _number(request: PageRequest) -> int:
    number = _integer(request, "number") if "number" in request.query else RESULTS
    if not 1 <= number <= _MAX_RESULTS:
        raise UserError(f"number {number} is out of range: it must be 1 to {_MAX_RESULTS}.")
    return number
