"""Cases of raw requests to the search page, on 127.0.0.1."""

import contextlib
import random
import socket
import threading
from functools import cache
from pathlib import Path
from urllib.parse import quote

from given_features import write_store

from fuzzing import valid
from fuzzing.image_headers import image
from fuzzing.mutation import NAMES, damaged
from neuclip.data.opening import open_source


@cache
def engine():
    """Six pictures, and a tower that looks at one pixel."""
    import tempfile

    import numpy as np
    import torch

    from neuclip.embedding.stored_images import StoredImages
    from neuclip.search.engine import Engine

    class Towers:
        device = torch.device("cpu")
        transform = staticmethod(
            lambda picture: torch.from_numpy(
                np.asarray(picture.resize((4, 4)), np.float32)
            ).permute(2, 0, 1)
        )
        tokenize = staticmethod(lambda texts: torch.tensor([[len(text)] for text in texts]))

        def encode_image(self, images):
            return torch.nn.functional.normalize(images.flatten(1)[:, :8] + 1, dim=-1)

        def encode_text(self, tokens):
            return torch.nn.functional.normalize(torch.ones(len(tokens), 8) * tokens + 1, dim=-1)

    folder = Path(tempfile.mkdtemp(prefix="fuzz-search-"))
    for number in range(6):
        (folder / f"{number}.png").write_bytes(valid.picture("png", 6 + number))
    source = open_source(str(folder), captions="optional")
    pictures = [Towers.transform(source.read(number).image) for number in range(6)]
    rows = Towers().encode_image(torch.stack(pictures)).numpy()
    store = write_store(Path(tempfile.mkdtemp(prefix="fuzz-features-")) / "kept", rows)
    return Engine(Towers(), source, StoredImages.open(store))


def _search(folder: Path, rng: random.Random) -> str:
    """Raw requests to the search page; afterwards it must still answer."""
    from neuclip.search.local_server import Limits, LocalServer
    from neuclip.search.server import About, page_answers

    about = About(rng.choice(NAMES), "data", 6, 0, "")
    with LocalServer(0, Limits(connections=6, seconds=0.5, body=2**20, bodies=1)) as server:
        server.start(page_answers(engine(), about))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            answers = [
                _ask(server.server_port, _request(rng, server.secret))
                for _ in range(rng.randint(1, 4))
            ]
            last = _ask(server.server_port, _line("GET", f"/{server.secret}/search?text=x"))
        finally:
            server.shutdown()
            thread.join()
    assert last.startswith(b"HTTP/1.1 200 "), last[:300]
    assert not any(answer.startswith(b"HTTP/1.1 500 ") for answer in answers), answers
    return "answer" if any(b" 200 " in answer[:20] for answer in answers) else "refusal"


def _line(method: str, path: str, version: str = "HTTP/1.1", host: str = "127.0.0.1") -> bytes:
    text = f"{method} {path} {version}\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    return text.encode("utf-8", "surrogateescape")


def _ask(port: int, request: bytes) -> bytes:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2) as client:
        client.settimeout(4)
        with contextlib.suppress(OSError):
            client.sendall(request)
        found = b""
        with contextlib.suppress(OSError):
            while part := client.recv(65536):
                found += part
        return found
    return b""


def _request(rng: random.Random, secret: str) -> bytes:
    name = quote(rng.choice(NAMES), safe=rng.choice(("", "/%&=?")), errors="surrogatepass")
    fields = ("text", "caption", "pictures", "like", "start", "number", "position", "size", "")
    values = (name, "1", "-1", "-x+-y", "1,2", "a,b", "9" * 5000, "%ff%00", "1e3", "²", "")
    query = "&".join(
        f"{rng.choice(fields)}={rng.choice(values)}" for _ in range(rng.choice((1, 2, 3, 40)))
    )
    path = rng.choice(
        (f"/{secret}", f"/{secret}", f"/{secret}", "", "/" + "x" * len(secret), "//x", "http://[/")
    )
    pages = ("/", "/search", "/picture", "/image", f"/{name}", "/../search", "*")
    path += f"{rng.choice(pages)}?{query}"
    if rng.random() < 0.5:
        request = _line(
            "GET",
            path,
            rng.choice(("HTTP/1.1",) * 5 + ("HTTP/1.0", "HTTP/9", "", "x")),
            rng.choice(("127.0.0.1",) * 5 + ("evil.example", "[", "", "localhost:1", "\xff")),
        )
    else:
        body = rng.choice(
            (b"", image(rng)[1], valid.picture("png"), rng.randbytes(3000), b"x" * 2**21)
        )
        length = rng.choice(
            (str(len(body)),) * 5 + ("-1", "abc", "1" * 5000, "9" * 12, "0", "+5", "²", " 3")
        )
        extra = rng.choice(
            ("",) * 4
            + (
                "Transfer-Encoding: chunked\r\n",
                "Origin: http://evil.example\r\n",
                "Expect: 100-continue\r\n",
                "Content-Length: 3\r\n",
                "X: " + "y" * 70_000 + "\r\n",
                "Origin: null\r\n",
                "A\r\n",
                ": b\r\n",
                "a: b\r\n" * 200,
            )
        )
        head = f"POST /{secret}/picture?{query} HTTP/1.1\r\nHost: 127.0.0.1\r\n{extra}"
        head += f"Content-Length: {length}\r\nConnection: close\r\n\r\n"
        request = head.encode("utf-8", "replace") + body
    return damaged(request, rng) if rng.random() < 0.2 else request


KINDS = {"search": _search}
