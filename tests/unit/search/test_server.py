import ctypes
import http.client
import io
import json
import multiprocessing
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datacomp_sets import CodedTowers, picture
from neuclip.data.opening import open_source
from neuclip.errors import UserError
from neuclip.search.engine import Engine
from neuclip.search.local_server import Limits, LocalServer
from neuclip.search.server import About, page_answers


@pytest.fixture
def engine(pictures, images, towers):
    return Engine(towers, open_source(str(pictures)), images)


@pytest.fixture
def server(engine):
    about = About("model & <co>", "data", 7, 2, "2 image")
    with LocalServer(0, Limits(connections=4, seconds=1, body=2**20, bodies=1)) as server:
        server.start(page_answers(engine, about))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def ask(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)

    def request(path, body=None, **headers):
        """One connection for all requests: an answer of a wrong length would break the next."""
        address = path if path.startswith("//") else f"/{server.secret}{path}"
        connection.request("GET" if body is None else "POST", address, body, headers)
        reply = connection.getresponse()
        content = reply.read()
        kind = reply.headers["Content-Type"]
        return reply.status, json.loads(content) if kind == "application/json" else content, reply

    yield request
    connection.close()


def places(answer):
    return [hit["position"] for hit in answer["hits"]]


def test_the_page(ask):
    status, page, reply = ask("/")
    page = page.decode()
    assert status == 200 and "model &amp; &lt;co&gt;" in page
    assert "7 images from data; 2 corrupt samples left out (2 image); exact search" in page
    policy = reply.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert policy.count("nonce-") == 2 == page.count(" nonce=")
    assert "http" not in page  # no address of another machine


def test_queries(ask):
    status, answer, _ = ask("/search?text=number%209&number=2")
    assert (status, places(answer)) == (200, [3, 4])  # equal scores, in the order of the images
    assert answer["seconds"] >= 0 and answer["note"] == ""
    assert places(ask("/search?like=0")[1])[0] == 2
    status, answer, _ = ask("/picture", picture((10, 11, 12)))
    assert status == 200 and places(ask(f"/search?number=1&pictures={answer['picture']}")[1]) == [6]
    status, content, reply = ask("/image?position=3")
    assert (status, reply.headers["Content-Type"], content[:4]) == (200, "image/png", b"\x89PNG")


def test_pages_of_results(ask):
    whole = ask("/search?text=number%209")[1]
    assert whole["total"] == 7 == len(whole["hits"])
    pages = [ask(f"/search?text=number%209&number=3&start={start}")[1] for start in (0, 3, 6, 9)]
    assert [*chain(*(page["hits"] for page in pages))] == whole["hits"]
    assert {page["total"] for page in pages} == {7}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/search?text=", None, 400, "Type a few words"),
        ("/search", None, 400, "Type a few words"),
        ("/search?text=-cat", None, 400, "type also what to look for"),
        (f"/search?text={'x' * 10_001}", None, 400, "more than 10,000 characters"),
        (f"/search?text=a{'%20-b' * 9}", None, 400, "At most 8 words or phrases"),
        (f"/search?text=a&caption={'x' * 1001}", None, 400, "more than 1,000 characters"),
        ("/picture", b"x", 400, "cannot be read as an image"),
        ("/picture", b"", 400, "The file is empty"),
        ("/search?pictures=0123", None, 400, "no longer kept: choose it again"),
        ("/search?like=0,1,2,3,4,5,6,0,1", None, 400, "at most 8 pictures"),
        (f"/search?like={'0,' * 9000}", None, 400, "at most 8 pictures"),
        ("/search?like=x", None, 400, "like must be a non-negative integer, got 'x'"),
        ("/search?like=99", None, 400, "There is no image 99"),
        ("/image", None, 400, "position must be a non-negative integer, got ''"),
        (
            "/search?text=a&start=1001",
            None,
            400,
            "start 1001 is out of range: it must be 0 to 1000",
        ),
        ("/search?text=a&start=-1", None, 400, "start must be a non-negative integer"),
        ("/image?position=-1", None, 400, "must be a non-negative integer"),
        ("/search?text=a&number=0", None, 400, "number 0 is out of range: it must be 1 to 200"),
        ("/nothing", None, 404, "Page not found"),
        ("/search?like=1", b"x", 404, "Page not found"),
        ("/picture", None, 404, "Page not found"),
    ],
)
def test_bad_requests_are_answered_kindly(ask, path, body, status, words):
    found, answer, _ = ask(path, body)
    assert found == status and words in answer["error"]
    assert ask("/search?text=number%209")[0] == 200  # it goes on


def test_a_name_of_another_site_gets_nothing(ask):
    status, answer, _ = ask("/search?text=number%209", Host="evil.example:80")
    assert status == 403 and {*answer} == {"error"}
    assert ask("/", Host="localhost:1")[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Host": "127.0.0.1.evil.example"},
    ],
)
def test_a_page_of_another_site_gets_nothing(ask, headers):
    status, answer, _ = ask("/picture", picture((10, 11, 12)), **headers)
    assert status == 403 and {*answer} == {"error"}


@pytest.mark.parametrize("path", ["//", "//search?text=a", f"//{'x' * 22}/", "//%00", "//[/"])
def test_without_the_secret_nobody_gets_anything(ask, path):
    assert ask(path)[0] in {400, 403}


def test_this_machines_names(ask):
    for origin in ("http://127.0.0.1:8765", "http://localhost:9"):
        assert ask("/picture", picture((10, 11, 12)), Origin=origin)[0] == 200


def test_an_image_that_is_too_large(ask):
    status, answer, _ = ask("/picture", b"x" * (2**20 + 1))
    assert status == 413 and "at most 1 MB" in answer["error"]


def test_an_image_of_too_many_pixels(ask):
    content = io.BytesIO()
    Image.new("1", (12_000, 5_000)).save(content, "PNG")
    status, answer, _ = ask("/picture", content.getvalue())
    assert status == 400 and "12000 x 5000 pixels" in answer["error"]


FEW = Limits(body=2**24)  # bytes: as many bodies at a time as by default


def colors_of(image):
    return torch.from_numpy(np.array(image.resize((2, 2)))).permute(2, 0, 1) / 255


def anonymous_memory():
    """Megabytes of this process, without files that are mapped."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def serve_and_measure(engine, pipe):
    """A server in a child process; sends by how much its memory has grown at most."""
    ctypes.CDLL(None).mallopt(-3, 2**20)  # blocks of a megabyte are given back when they are freed
    with LocalServer(0, FEW) as server:
        server.start(page_answers(engine, About("model", "data", 7, 0, "")))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pipe.send((server.server_port, server.secret))
        pipe.recv()
        before = most = anonymous_memory()
        pipe.send("begin")
        while not pipe.poll(0.001):
            most = max(most, anonymous_memory())
        pipe.send(most - before)


def test_the_memory_of_eight_uploads_at_once(engine, monkeypatch):
    """Of all eight at once it would be 128 MB of bodies, and 8 times 45 MB of pixels."""
    monkeypatch.setattr(CodedTowers, "transform", property(lambda _: colors_of))
    image = io.BytesIO()
    Image.new("RGB", (1500, 1500)).save(image, "WEBP", lossless=True, method=0)
    body = image.getvalue().ljust(FEW.body, b"\0")
    pipe, other = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    child = context.Process(target=serve_and_measure, args=(engine, other))
    child.start()
    port, secret = pipe.recv()

    def upload(_):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with closing(connection):
            connection.request("POST", f"/{secret}/picture", body)
            return connection.getresponse().status

    assert upload(0) == 200
    pipe.send("warm")
    pipe.recv()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(upload, range(8))) == [200] * 8
    pipe.send("all answered")
    grown = pipe.recv()
    child.join()
    assert 40 < grown < 200


def raw(server, text, *, wait=5.0):
    """The server's answer to bytes as they are; empty if it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=wait) as one:
        one.sendall(text.replace("SECRET", server.secret).encode("latin-1"))
        found = b""
        try:
            while part := one.recv(2**16):
                found += part
        except ConnectionError:
            pass
        return found


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Content-Length: -1", b"400"),
        ("Content-Length: abc", b"400"),
        (f"Content-Length: {'9' * 5000}", b"400"),
        ("Content-Length: 999999999999", b"413"),
        ("Transfer-Encoding: chunked", b"411"),
        ("X: y", b"411"),
    ],
)
def test_a_length_that_is_none(server, ask, headers, status):
    found = raw(server, f"POST /SECRET/picture HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n\r\n")
    # A body that never comes is not waited for longer than the limit.
    assert found.split()[1:2] == [status] or (status == b"413" and not found)
    assert b"Python" not in found
    assert ask("/search?text=number%209")[0] == 200


@pytest.mark.parametrize("line", ["a: b\r\n", f"a: {'b' * 60_000}\r\n", "x" * 80_000])
def test_endless_headers_are_not_kept(server, ask, line):
    text = "GET /SECRET/ HTTP/1.1\r\nHost: localhost\r\n" + line * (200_000 // len(line))
    assert b"200" not in raw(server, text)[:20]
    assert ask("/search?text=number%209")[0] == 200


@pytest.mark.parametrize(
    "text",
    ["", "GET ", "GET /SECRET/ HTTP/1.1\r\nHost: loc", "GET http://[/ HTTP/1.1\r\n\r\n", "\0" * 99],
)
def test_idle_and_broken_connections_end(server, ask, text, capfd):
    begun = time.monotonic()
    raw(server, text, wait=10)
    assert time.monotonic() - begun < 8
    assert ask("/search?text=number%209")[0] == 200
    assert "Traceback" not in "".join(capfd.readouterr())


def test_bytes_that_trickle_do_not_keep_a_connection_open(server):
    address = ("127.0.0.1", server.server_port)
    with socket.create_connection(address) as one, pytest.raises(ConnectionError):
        for _ in range(100):
            one.sendall(b"G")
            time.sleep(0.1)


def test_connections_beyond_the_limit_wait_or_are_refused(server, ask):
    idle = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(12)]
    try:
        assert ask("/search?text=number%209")[0] in {200, 503}
    finally:
        for one in idle:
            one.close()


def test_a_fault_is_an_answer(engine, server, ask, monkeypatch, caplog):
    monkeypatch.setattr(engine, "search", lambda *_: 1 / 0)
    status, answer, _ = ask("/search?text=a")
    assert (status, answer["error"]) == (500, "Internal error: ZeroDivisionError.")
    assert "a request failed" in caplog.text


def test_a_port_that_is_taken():
    with (
        LocalServer(0) as server,
        pytest.raises(UserError, match=r"--port \d+ is in use; choose another"),
    ):
        server.server_activate()
        LocalServer(server.server_port)
