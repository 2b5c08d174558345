"""Cases of servers and clients that lie: shards over HTTP, the hub, and requests to the search page.

All of them are on 127.0.0.1, in the child process.
"""

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path
from urllib.parse import quote

from fuzzing import valid
from fuzzing.image_headers import image
from fuzzing.mutation import HOSTILE_JSON, NAMES, NUMBERS, changed_tree, damaged
from fuzzing.outcomes import refused
from neuclip.config.sections import ReadingConfig
from neuclip.data.opening import open_source
from neuclip.data.remote.fetch import RetryPolicy

_QUICK = RetryPolicy(2, timeout=0.4, patience=0.6, slowest=10_000, pause=0.01, longest_pause=0.02)
_ENDLESS = 3.0  # seconds that a server sends bytes, if the client does not leave
Answer = Callable[[str, dict[str, str]], tuple[bytes, bytes | None]]
"""From a path and headers to the bytes of an answer, and a piece that is repeated without end."""


@contextlib.contextmanager
def _serving(answer: Answer) -> Generator[str]:
    """A server whose every byte the case chooses; its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(listener, answer), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _accept(listener: socket.socket, answer: Answer) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_talk, args=(connection, answer), daemon=True).start()


def _talk(connection: socket.socket, answer: Answer) -> None:
    with connection, contextlib.suppress(OSError):
        connection.settimeout(2)
        asked = b""
        while b"\r\n\r\n" not in asked:
            part = connection.recv(65536)
            if not part:
                return
            asked += part
        lines = asked.decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        content, endless = answer(lines[0].split(" ")[1], headers)
        connection.sendall(content)
        end = time.monotonic() + _ENDLESS
        while endless and time.monotonic() < end:
            connection.sendall(endless)
            if len(endless) < 100:
                time.sleep(0.05)


def _reply(rng: random.Random, content: bytes, status: int = 200) -> tuple[bytes, bytes | None]:
    """A valid answer, or one that lies in one way."""
    headers = {"Content-Length": str(len(content)), "ETag": '"1"', "Connection": "close"}
    line, endless = f"HTTP/1.1 {status} OK", None
    lie = rng.randrange(24)
    if lie == 0:
        headers["Content-Length"] = rng.choice(NUMBERS).decode()
    elif lie == 1:
        del headers["Content-Length"]
        endless = b"x" * 65536
    elif lie == 2:
        headers["Content-Length"] = str(10**15)
        endless = rng.choice((b"x" * 65536, b"x"))
    elif lie == 3:
        line = "HTTP/1.1 " + rng.choice(
            ("416 x", "999 x", "-1 x", "abc", "206 Partial", "301 M", "100 C", "204 N")
        )
    elif lie == 4:
        line = "HTTP/1.1 404 " + rng.choice(NAMES).replace("\n", " ").replace("\r", " ")
    elif lie == 5:
        line = rng.choice(
            ("HTTP/9.9 200", "ICY 200 OK", "", "\0" * 70_000, "HTTP/1.1", "x" * 70_000)
        )
    elif lie == 6:
        line = f"HTTP/1.1 {rng.choice((301, 302, 303, 307, 308))} Moved"
        headers["Location"] = rng.choice(
            ("file:///etc/passwd", "ftp://127.0.0.1/x", "/loop", "//", "http://", "data:,x", "gopher://x",
             "http://127.0.0.1:1/x", "\x1b[2J", "http://[", "http://127.0.0.1:99999/")
        )  # fmt: skip
    elif lie == 7:
        headers["Content-Range"] = rng.choice(
            (
                "bytes 0-9/*",
                "bytes 5-/7",
                "x",
                "bytes 0-0/" + "9" * 5000,
                "bytes -1-9/10",
                "bytes */0",
            )
        )
        line = "HTTP/1.1 206 Partial"
    elif lie == 8:
        headers["Transfer-Encoding"] = "chunked"
        content = rng.choice(
            (b"ffffffffffffffff\r\nxx", b"zz\r\n", b"5\r\nabc", b"-1\r\n", b"1;" + b"x" * 70_000)
        )
        del headers["Content-Length"]
    elif lie == 9:
        headers["Content-Encoding"] = rng.choice(("gzip", "br", "zstd", "x", "gzip, gzip"))
    elif lie == 10:
        content = content[: len(content) // 2]
    elif lie == 11:
        content = damaged(content, rng)
        headers["Content-Length"] = str(len(content))
    elif lie == 12:
        headers |= {f"X-{number}": "y" * 900 for number in range(rng.choice((50, 200)))}
    elif lie == 13:
        headers["X"] = "y" * 100_000
    elif lie == 14:
        headers["ETag"] = rng.choice(('"\x1b[2J"', '"' + "x" * 60_000 + '"', "\udcff", 'W/"1"', ""))
    elif lie == 15:
        content = b""
    elif lie == 16:
        return b"", rng.choice((None, b"y"))
    elif lie == 17:
        line = "HTTP/1.1 503 Busy"
        headers["Retry-After"] = rng.choice(("99999999", "-5", "x"))
    text = line + "\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return text.encode("utf-8", "surrogateescape") + b"\r\n" + content, endless


def _http(folder: Path, rng: random.Random) -> str:
    """Shards and a manifest from a server that lies."""
    shard = valid.shard()
    row = {"name": "0.tar", "size": len(shard), "sha256": "0" * 64, "samples": 6}
    manifest = {"version": 1, "shards": [row]}

    def answer(path: str, headers: dict[str, str]) -> tuple[bytes, bytes | None]:
        if path.endswith("manifest.json"):
            text = json.dumps(changed_tree(manifest, rng)).encode()
            kind = rng.random()
            if kind < 0.6:
                return (
                    b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                    None,
                )
            return _reply(rng, text if kind < 0.9 else rng.choice(HOSTILE_JSON))
        return _reply(rng, shard)

    cache_dir = str(folder / "cache")
    with _serving(answer) as address:
        reading = ReadingConfig(cache_dir=cache_dir, cache_size_gb=0.004, shuffle_window=1)
        pattern = f"{address}/{{0..{rng.choice((0, 1))}}}.tar"
        return _read_remote(pattern, reading)


def _read_remote(pattern: str, reading: ReadingConfig) -> str:
    from neuclip.data.samples import SampleError
    from neuclip.errors import UserError

    try:
        source = open_source(pattern, reading, retry=_QUICK)
    except UserError:
        return "refusal"
    corrupt = len(source.damage)
    with contextlib.closing(source):
        for position in range(min(len(source), 8)):
            try:
                source.read(position)
            except SampleError:
                corrupt += 1
            except UserError:
                return "refusal"
    return "damage" if corrupt else "answer"


def _addresses(folder: Path, rng: random.Random) -> str:
    """Patterns that name commands, archives and other protocols, plainly or after an expansion."""
    touched = folder / "touched"
    command = f"pipe:touch {touched}"
    pieces = (
        command, f" {command}", command.replace("pipe", "PIPE"), f"{{{command},http://127.0.0.1:1/a.tar}}",
        f"{{x,{command} #://}}", f"x::{command}", f"{{pi,x}}pe:touch {touched}", "ftp://127.0.0.1:1/a.tar",
        "reference://x", f"zip://x::{command}", "file:///etc/{passwd,shadow}", "local:///etc/passwd", "jar://x",
        "simplecache::http://127.0.0.1:1/a.tar", "http://", "http://[", "://", "{1..99999999999}.tar", "{9..1}",
        "{a,{b,{c,{d,e}}}}.tar", "{" * 300, "{0..3}{0..999}{0..999}{0..999}{0..999}.tar", "memory://x.tar",
        "http://127.0.0.1:1/" + "x" * 9000, "hTTp://127.0.0.1:1/x.tar", "data:,x", "dask://x", "libarchive://x",
        f"file://{folder}/0.tar", f"{{file,ftp}}://{folder}/0.tar", "\x1b[2J://x", "http://a b/c.tar",
        f"http://127.0.0.1:1/{{{command},b}}.tar", "{00..1}", "{-5..5}", "{..}", "{1..}", "s3://{a,b}", "github://x",
    )  # fmt: skip
    (folder / "0.tar").write_bytes(valid.shard())
    pattern = "::".join(rng.choices(pieces, k=rng.choice((1, 1, 2))))
    if rng.random() < 0.3:
        pattern = pattern.replace("a.tar", rng.choice(NAMES))
    reading = ReadingConfig(cache_dir=str(folder / "cache"))
    outcome = _read_remote(pattern, reading)
    assert not touched.exists(), f"{pattern!r} ran a command"
    return outcome


def _hub(folder: Path, rng: random.Random) -> str:
    """A download from a hub that lies."""
    from huggingface_hub import constants

    from neuclip.evaluation.datacomp.download import download_task
    from neuclip.evaluation.datacomp.suite import load_suite

    task = rng.choice(
        [task for task in load_suite().tasks.values() if task.kind == "classification"]
    )
    content = valid.shard()
    rows = [
        {"rfilename": "classnames.txt", "size": 4, "blobId": "0" * 40},
        {"rfilename": "test/0.tar", "size": len(content), "blobId": "1" * 40,
         "lfs": {"sha256": "0" * 64, "size": len(content), "pointerSize": 9}},
    ]  # fmt: skip
    listing = {"id": task.source, "sha": "a" * 40, "siblings": rows, "private": False, "tags": []}

    def answer(path: str, headers: dict[str, str]) -> tuple[bytes, bytes | None]:
        if path.startswith("/api/"):
            kind = rng.random()
            text = json.dumps(changed_tree(listing, rng) if kind < 0.7 else listing).encode()
            if kind > 0.9:
                text = rng.choice(HOSTILE_JSON)
            if rng.random() < 0.6:
                head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n"
                return head.encode() + b"Connection: close\r\n\r\n" + text, None
            return _reply(rng, text)
        return _reply(rng, content)

    with _serving(answer) as address:
        constants.ENDPOINT = address
        constants.HUGGINGFACE_CO_URL_TEMPLATE = address + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_HUB_ETAG_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT = 1
        constants.HF_HUB_CACHE = str(folder / "hub")
        return refused(lambda: download_task(folder / "sets", task))


# --- the search page -----------------------------------------------------------------------------


@cache
def engine():
    """Six pictures, and a tower that looks at one pixel."""
    import tempfile

    import numpy as np
    import torch

    from neuclip.search.embeddings import EmbedSettings, embed_source
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
    found = embed_source(Towers(), "c" * 64, source, EmbedSettings(folder / "kept", 4, 0))
    return Engine(Towers(), source, found)


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
    fields = ("text", "number", "position", "size", "")
    query = "&".join(
        f"{rng.choice(fields)}={rng.choice((name, '1', '-1', '9' * 5000, '%ff%00', '1e3', '²', ''))}"
        for _ in range(rng.choice((1, 2, 3, 40)))
    )
    path = rng.choice(
        (f"/{secret}", f"/{secret}", f"/{secret}", "", "/" + "x" * len(secret), "//x", "http://[/")
    )
    path += (
        rng.choice(("/", "/search", "/like", "/image", f"/{name}", "/../search", "*")) + f"?{query}"
    )
    if rng.random() < 0.5:
        request = _line("GET", path, rng.choice(("HTTP/1.1",) * 5 + ("HTTP/1.0", "HTTP/9", "", "x")),
                        rng.choice(("127.0.0.1",) * 5 + ("evil.example", "[", "", "localhost:1", "\xff")))  # fmt: skip
    else:
        body = rng.choice(
            (b"", image(rng)[1], valid.picture("png"), rng.randbytes(3000), b"x" * 2**21)
        )
        length = rng.choice(
            (str(len(body)),) * 5 + ("-1", "abc", "1" * 5000, "9" * 12, "0", "+5", "²", " 3")
        )
        extra = rng.choice(("",) * 4 + ("Transfer-Encoding: chunked\r\n", "Origin: http://evil.example\r\n",
                            "Expect: 100-continue\r\n", "Content-Length: 3\r\n", "X: " + "y" * 70_000 + "\r\n",
                            "Origin: null\r\n", "A\r\n", ": b\r\n", "a: b\r\n" * 200))  # fmt: skip
        head = f"POST /{secret}/search?{query} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n{extra}"
        request = head.encode("utf-8", "replace") + b"Connection: close\r\n\r\n" + body
    return damaged(request, rng) if rng.random() < 0.2 else request


KINDS = {"http": _http, "addresses": _addresses, "hub": _hub, "search": _search}
