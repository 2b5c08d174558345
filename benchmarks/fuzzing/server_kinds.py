"""Cases of servers that lie: shards over HTTP, and the hub.

All of them are on 127.0.0.1, in the child process.
"""

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

from fuzzing import valid
from fuzzing.mutation import HOSTILE_JSON, NAMES, NUMBERS, changed_tree, damaged
from fuzzing.outcomes import refused
from neuclip.config.data_sections import ReadingConfig
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


@dataclass
class _Reply:
    """An answer, which a lie changes.

    Attributes:
        content: the body.
        line: the line of status.
        headers: the headers.
        endless: bytes that follow the body without end.
    """

    content: bytes
    line: str = "HTTP/1.1 200 OK"
    headers: dict[str, str] = field(default_factory=dict)
    endless: bytes | None = None

    def sent(self) -> tuple[bytes, bytes | None]:
        """The bytes of the answer."""
        lines = [self.line, *(f"{name}: {value}" for name, value in self.headers.items()), "", ""]
        return "\r\n".join(lines).encode("utf-8", "surrogateescape") + self.content, self.endless


def _reply(rng: random.Random, content: bytes) -> tuple[bytes, bytes | None]:
    """A valid answer, or one that lies in one way."""
    headers = {"Content-Length": str(len(content)), "ETag": '"1"', "Connection": "close"}
    reply = _Reply(content, headers=headers)
    if rng.random() < 0.75:
        rng.choice(_LIES)(reply, rng)
    return reply.sent()


def _lie_of_length(reply: _Reply, rng: random.Random) -> None:
    length = rng.choice((*NUMBERS, None, b"1000000000000000"))
    if length is None:
        del reply.headers["Content-Length"]
    else:
        reply.headers["Content-Length"] = length.decode()
    reply.endless = rng.choice((None, b"x" * 65536, b"x"))


def _lie_of_status(reply: _Reply, rng: random.Random) -> None:
    lines = (
        "HTTP/1.1 416 x",
        "HTTP/1.1 999 x",
        "HTTP/1.1 -1 x",
        "HTTP/1.1 abc",
        "HTTP/1.1 206 Partial",
        "HTTP/1.1 301 M",
        "HTTP/1.1 100 C",
        "HTTP/1.1 204 N",
        "HTTP/9.9 200",
        "ICY 200 OK",
        "",
        "\0" * 70_000,
        "HTTP/1.1",
        "x" * 70_000,
        "HTTP/1.1 503 Busy",
        "HTTP/1.1 404 " + rng.choice(NAMES).replace("\n", " ").replace("\r", " "),
    )
    reply.line = rng.choice(lines)
    reply.headers["Retry-After"] = rng.choice(("99999999", "-5", "x"))


def _lie_of_place(reply: _Reply, rng: random.Random) -> None:
    reply.line = f"HTTP/1.1 {rng.choice((301, 302, 303, 307, 308))} Moved"
    reply.headers["Location"] = rng.choice(
        (
            "file:///etc/passwd",
            "ftp://127.0.0.1/x",
            "/loop",
            "//",
            "http://",
            "data:,x",
            "gopher://x",
            "http://127.0.0.1:1/x",
            "\x1b[2J",
            "http://[",
            "http://127.0.0.1:99999/",
        )
    )


def _lie_of_range(reply: _Reply, rng: random.Random) -> None:
    ranges = ("0-9/*", "5-/7", "x", "0-0/" + "9" * 5000, "-1-9/10", "*/0")
    reply.headers["Content-Range"] = f"bytes {rng.choice(ranges)}"
    reply.line = "HTTP/1.1 206 Partial"


def _lie_of_form(reply: _Reply, rng: random.Random) -> None:
    if rng.random() < 0.5:
        reply.headers["Content-Encoding"] = rng.choice(("gzip", "br", "zstd", "x", "gzip, gzip"))
        return
    reply.headers["Transfer-Encoding"] = "chunked"
    del reply.headers["Content-Length"]
    reply.content = rng.choice(
        (b"ffffffffffffffff\r\nxx", b"zz\r\n", b"5\r\nabc", b"-1\r\n", b"1;" + b"x" * 70_000)
    )


def _lie_of_content(reply: _Reply, rng: random.Random) -> None:
    reply.content = rng.choice(
        (reply.content[: len(reply.content) // 2], damaged(reply.content, rng), b"")
    )
    if rng.random() < 0.5:
        reply.headers["Content-Length"] = str(len(reply.content))


def _lie_of_headers(reply: _Reply, rng: random.Random) -> None:
    tags = ('"\x1b[2J"', '"' + "x" * 60_000 + '"', "\udcff", 'W/"1"', "")
    reply.headers |= rng.choice(
        (
            {f"X-{number}": "y" * 900 for number in range(200)},
            {"X": "y" * 100_000},
            *({"ETag": tag} for tag in tags),
        )
    )


def _say_nothing(reply: _Reply, rng: random.Random) -> None:
    reply.line, reply.headers, reply.content = "", {}, b""
    reply.endless = rng.choice((None, b"y"))


_LIES = (
    _lie_of_length,
    _lie_of_status,
    _lie_of_place,
    _lie_of_range,
    _lie_of_form,
    _lie_of_content,
    _lie_of_headers,
    _say_nothing,
)


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
        command,
        f" {command}",
        command.replace("pipe", "PIPE"),
        f"{{x,{command} #://}}",
        f"{{{command},http://127.0.0.1:1/a.tar}}",
        f"x::{command}",
        f"{{pi,x}}pe:touch {touched}",
        "ftp://127.0.0.1:1/a.tar",
        "reference://x",
        f"zip://x::{command}",
        "file:///etc/{passwd,shadow}",
        "local:///etc/passwd",
        "jar://x",
        "simplecache::http://127.0.0.1:1/a.tar",
        "http://",
        "http://[",
        "://",
        "{1..99999999999}.tar",
        "{9..1}",
        "{a,{b,{c,{d,e}}}}.tar",
        "{" * 300,
        "{0..3}{0..999}{0..999}{0..999}{0..999}.tar",
        "memory://x.tar",
        "http://127.0.0.1:1/" + "x" * 9000,
        "hTTp://127.0.0.1:1/x.tar",
        "data:,x",
        "dask://x",
        "libarchive://x",
        f"file://{folder}/0.tar",
        f"{{file,ftp}}://{folder}/0.tar",
        "\x1b[2J://x",
        "http://a b/c.tar",
        f"http://127.0.0.1:1/{{{command},b}}.tar",
        "{00..1}",
        "{-5..5}",
        "{..}",
        "{1..}",
        "s3://{a,b}",
        "github://x",
    )
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
        {
            "rfilename": "test/0.tar",
            "size": len(content),
            "blobId": "1" * 40,
            "lfs": {"sha256": "0" * 64, "size": len(content), "pointerSize": 9},
        },
    ]
    listing = {"id": task.source, "sha": "a" * 40, "siblings": rows, "private": False, "tags": []}

    def answer(path: str, headers: dict[str, str]) -> tuple[bytes, bytes | None]:
        if path.startswith("/api/"):
            kind = rng.random()
            text = json.dumps(changed_tree(listing, rng) if kind < 0.7 else listing).encode()
            if kind > 0.9:
                text = rng.choice(HOSTILE_JSON)
            if rng.random() < 0.6:
                headers = {"Content-Type": "application/json", "Content-Length": str(len(text))}
                return _Reply(text, headers={**headers, "Connection": "close"}).sent()
            return _reply(rng, text)
        return _reply(rng, content)

    with _serving(answer) as address:
        constants.ENDPOINT = address
        constants.HUGGINGFACE_CO_URL_TEMPLATE = address + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_HUB_ETAG_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT = 1
        constants.HF_HUB_CACHE = str(folder / "hub")
        return refused(lambda: download_task(folder / "sets", task))


KINDS = {"http": _http, "addresses": _addresses, "hub": _hub}
