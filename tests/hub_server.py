"""A local server with the routes of the Hugging Face hub, for tests of downloads."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import close_session

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OF_THE_LIBRARY = "/api/agent-harnesses"
"""huggingface_hub may ask for it once a process, without a token. It is no request of ours."""


@dataclass
class Fake:
    """The hub's repositories, its misbehaviour, and the requests that it received."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    listed_as: dict[str, bytes] = field(default_factory=dict)
    cut_after: list[int] = field(default_factory=list)
    status: int = 200
    token: str | None = None
    requests: list[tuple[str, str]] = field(default_factory=list)
    address: str = ""
    siblings: object = None
    listing: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    elsewhere: str = ""
    tokens: set[str | None] = field(default_factory=set)
    unknown: int = 404
    revisions: set[str] | None = None

    def got(self):
        """The files that were downloaded, in order."""
        found = [path for verb, path in self.requests if verb == "GET"]
        return [re.sub(".*/resolve/[^/]+/", "", path) for path in found]

    def entry(self, repository, path):
        """How the hub lists a file: large ones (here all but texts) with their SHA-256."""
        content = self.listed_as.get(path, self.files[repository][path])
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"rfilename": path, "size": len(content), "blobId": blob}
        if not path.endswith((".txt", ".csv", ".md")):
            sha = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": sha, "size": len(content), "pointerSize": 128}
        return entry


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, code, content=b"", **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.route()

    def do_HEAD(self):
        self.route()

    def route(self):
        fake = self.server.fake
        path = self.path.partition("?")[0]
        if path == OF_THE_LIBRARY:
            self.answer(404)
            return
        fake.requests.append((self.command, path))
        fake.tokens.add(self.headers["Authorization"])
        plain = path.removeprefix("/api").removeprefix("/datasets").removeprefix("/")
        repository, _, file = re.sub("/resolve/[^/]+/", "\n", plain, count=1).partition("\n")
        if fake.status != 200:
            self.answer(fake.status)
        elif fake.token and self.headers["Authorization"] != f"Bearer {fake.token}":
            self.answer(403, X_Error_Code="GatedRepo")
        elif repository not in fake.files:
            self.answer(fake.unknown, X_Error_Code="RepoNotFound")
        elif fake.revisions is not None and not fake.revisions & set(path.split("/")):
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif path.startswith("/api/"):
            entries = [fake.entry(repository, path) for path in fake.files[repository]]
            entries = entries if fake.siblings is None else fake.siblings
            info = {"id": repository, "sha": COMMIT, "siblings": entries}
            listing = json.dumps(info).encode() if fake.listing is None else fake.listing
            self.answer(200, listing, Content_Type="application/json", **fake.headers)
        elif file not in fake.files[repository]:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            self.content(fake, repository, file)

    def content(self, fake, repository, path):
        content, entry = fake.files[repository][path], fake.entry(repository, path)
        self.send_response(302 if fake.elsewhere else 200)
        if fake.elsewhere:
            self.send_header("Location", fake.elsewhere + self.path)
            self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{entry.get("lfs", {}).get("sha256") or entry["blobId"]}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            cut = path.endswith((".tar", ".bin", ".safetensors")) and fake.cut_after
            self.wfile.write(content[: fake.cut_after.pop()] if cut else content)


@contextmanager
def serving(fake, handler=Handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.fake, server.daemon_threads = fake, False
    fake.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        close_session()
        server.shutdown()
        server.server_close()
        thread.join()
