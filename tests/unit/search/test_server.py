import http.client
import json
import threading

import pytest

from datacomp_sets import picture
from neuclip.data.opening import open_source
from neuclip.errors import UserError
from neuclip.search.engine import Engine
from neuclip.search.server import About, make_server


@pytest.fixture
def engine(pictures, embed, towers):
    return Engine(towers, open_source(str(pictures)), embed(pictures)[0])


@pytest.fixture
def ask(engine):
    about = About("model & <co>", "data", 7, 2, "2 image")
    server = make_server(engine, about, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)

    def request(path, body=None, **headers):
        """One connection for all requests: an answer of a wrong length would break the next."""
        connection.request("GET" if body is None else "POST", path, body, headers)
        reply = connection.getresponse()
        content = reply.read()
        kind = reply.headers["Content-Type"]
        return reply.status, json.loads(content) if kind == "application/json" else content, reply

    yield request
    connection.close()
    server.shutdown()
    thread.join()
    server.server_close()


def places(answer):
    return [hit["position"] for hit in answer["hits"]]


def test_the_page(ask):
    status, page, reply = ask("/")
    page = page.decode()
    assert status == 200 and "model &amp; &lt;co&gt;" in page
    assert "7 images from data; 2 corrupt samples left out (2 image)" in page
    policy = reply.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert policy.count("nonce-") == 2 == page.count(" nonce=")
    assert "http" not in page  # no address of another machine


def test_queries(ask):
    status, answer, _ = ask("/search?text=number%209&number=2")
    assert (status, places(answer)[0], len(places(answer))) == (200, 4, 2)
    assert answer["seconds"] >= 0 and answer["note"] == ""
    assert places(ask("/like?position=0")[1])[0] == 2
    assert places(ask("/search?number=1", picture((10, 11, 12)))[1]) == [6]
    status, content, reply = ask("/image?position=3")
    assert (status, reply.headers["Content-Type"], content[:4]) == (200, "image/png", b"\x89PNG")


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/search?text=", None, 400, "Type a few words"),
        ("/search", None, 400, "Type a few words"),
        ("/search", b"x", 400, "cannot be read as an image"),
        ("/search", b"", 400, "The file is empty"),
        ("/like?position=x", None, 400, "position must be a non-negative integer, got 'x'"),
        ("/like?position=99", None, 400, "There is no image 99"),
        ("/like", None, 400, "position must be a non-negative integer, got ''"),
        ("/image?position=-1", None, 400, "must be a non-negative integer"),
        ("/search?text=a&number=0", None, 400, "number 0 is out of range: it must be 1 to 200"),
        ("/nothing", None, 404, "Page not found"),
        ("/like?position=1", b"x", 404, "Page not found"),
    ],
)
def test_bad_requests_are_answered_kindly(ask, path, body, status, words):
    found, answer, _ = ask(path, body)
    assert found == status and words in answer["error"]
    assert ask("/search?text=number%209")[0] == 200  # it goes on


def test_a_name_of_another_site_gets_nothing(ask):
    status, answer, _ = ask("/search?text=number%209", Host="evil.example:80")
    assert status == 403 and "hits" not in answer
    assert ask("/", Host="localhost:1")[0] == 200


def test_an_image_that_is_too_large(ask, monkeypatch):
    monkeypatch.setattr("neuclip.search.server._LARGEST_UPLOAD", 2**20)
    status, answer, _ = ask("/search", b"x" * (2**20 + 1))
    assert status == 413 and "at most 1 MB" in answer["error"]


def test_a_port_that_is_taken(engine):
    about = About("m", "d", 7, 0, "")
    with (
        make_server(engine, about, 0) as server,
        pytest.raises(UserError, match=r"--port \d+ is in use; choose another"),
    ):
        make_server(engine, about, server.server_port)
