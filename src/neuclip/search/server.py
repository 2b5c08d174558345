"""The page and its queries, for the server of `neuclip search`."""

import dataclasses
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from neuclip.errors import UserError
from neuclip.search.engine import DEEPEST, Engine
from neuclip.search.local_server import Answer, PageRequest, Reply
from neuclip.search.query_vector import MOST_PICTURES, SearchQuery
from neuclip.templates import render
from neuclip.untrusted import whole_number

RESULTS = 48
"""Images on a page of results."""
_MAX_RESULTS = 200
_THUMBNAIL, _LARGE = 256, 1024


@dataclass(frozen=True)
class About:
    """Facts for the page's header.

    Attributes:
        model: name of the checkpoint.
        data: name of the data.
        images: number of images.
        damaged: number of corrupt samples.
        damage: summary of the corrupt samples.
        search: how images are found.
    """

    model: str
    data: str
    images: int
    damaged: int
    damage: str
    search: str = "exact search"


def page_answers(engine: Engine, about: About) -> Answer:
    """Answers the requests of the page.

    Args:
        engine: answers the queries.
        about: header of the page.
    """
    routes: dict[tuple[str, bool], Callable[[PageRequest], Reply]] = {
        ("/", False): lambda _: _page(about),
        ("/search", False): lambda request: _found(engine, request),
        ("/picture", True): lambda request: Reply.of_json(
            {"picture": engine.add_picture(request.body or b"")}
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
    limits = {"results": RESULTS, "most_pictures": MOST_PICTURES}
    page = render("search.html.j2", about=about, nonce=nonce, **limits)
    headers = {"Content-Security-Policy": policy}
    return Reply(page.encode(), "text/html; charset=utf-8", headers=headers)


def _found(engine: Engine, request: PageRequest) -> Reply:
    fields = request.query
    number = _number(request, "number", RESULTS, 1, _MAX_RESULTS)
    start = _number(request, "start", 0, 0, DEEPEST)
    query = SearchQuery(
        fields.get("text", ""),
        tuple(_listed(request, "pictures")),
        tuple(_whole("like", text) for text in _listed(request, "like")),
        fields.get("caption", ""),
    )
    started = time.perf_counter()
    found = engine.search(query, number, start)
    seconds = time.perf_counter() - started
    return Reply.of_json({**dataclasses.asdict(found), "seconds": seconds})


def _image(engine: Engine, request: PageRequest) -> Reply:
    side = _LARGE if request.query.get("size") == "large" else _THUMBNAIL
    content = engine.thumbnail(_whole("position", request.query.get("position", "")), side)
    return Reply(content, "image/png", headers={"Cache-Control": "private, max-age=3600"})


def _listed(request: PageRequest, name: str) -> list[str]:
    """The values of a field, which commas join."""
    return [value for value in request.query.get(name, "").split(",") if value]


def _whole(name: str, text: str) -> int:
    number = whole_number(text)
    if number is None:
        raise UserError(f"{name} must be a non-negative integer, got {text[:40]!r}.")
    return number


def _number(request: PageRequest, name: str, default: int, least: int, most: int) -> int:
    number = _whole(name, request.query[name]) if name in request.query else default
    if not least <= number <= most:
        raise UserError(f"{name} {number} is out of range: it must be {least} to {most}.")
    return number
