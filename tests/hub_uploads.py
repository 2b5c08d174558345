"""The routes by which the Hugging Face hub takes uploads, beside those of `hub_server`.

Repositories are made, branches, large files one by one, and commits, which alone change what a
branch holds. Xet, the hub's other transfer of large files, is not imitated.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field

from hub_server import Fake, Handler

TEXTS = (".md", ".json", ".txt")
"""Endings of files that the hub keeps in git; others are large files."""


@dataclass
class UploadHub(Fake):
    """A hub that takes uploads by one token.

    Attributes:
        branches: of each repository, its branches with their files; `files` is what is served.
        private: repositories that are private.
        large: large files that arrived, by SHA-256.
        sent: names of routes that were posted to, in order.
        refusals: of some routes, the status that they answer, and what they say.
        refused_after: large files that arrive before one is refused.
        ignored: endings of files that the repository's .gitignore excludes.
        unlisted: the files of a commit are not listed; those of a branch are.
        messages: of the commits.
    """

    branches: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    large: dict[str, bytes] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    messages: list[str] = field(default_factory=list)
    refused_after: int = 0
    unlisted: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def make(self, name, files=None, *, private=False):
        """Makes a repository with one branch."""
        self.branches[name] = {"main": {".gitattributes": b"", **(files or {})}}
        if private:
            self.private.add(name)

    def commit_of(self, name, branch):
        """The commit at the head of a branch, which its files determine."""
        files = self.branches[name][branch]
        listed = repr(sorted((path, hashlib.sha1(c).hexdigest()) for path, c in files.items()))
        return hashlib.sha1(listed.encode()).hexdigest()

    def files_at(self, name, revision):
        """The files of a branch, or of the commit at the head of one."""
        for branch, files in self.branches[name].items():
            if revision in (branch, self.commit_of(name, branch)):
                return files
        return None


class UploadHandler(Handler):
    """Answers as the hub does; a refused route changes nothing."""

    def do_POST(self):
        self.upload()

    def do_PUT(self):
        self.upload()

    def route(self):
        """Lists and serves the files of the branch or commit that is asked for."""
        hub, path = self.server.fake, self.path.partition("?")[0]
        known = re.match(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?$", path)
        name = known[1] if known else "/".join(path.split("/")[1:3])
        at = (known[2] if known else path.split("/")[4]) or "main"
        hub.files = {}
        if known and hub.unlisted and len(at) == 40:
            self.answer(503)
            return
        if name in hub.branches and (files := hub.files_at(name, at)) is not None:
            hub.files[name] = files
        elif name in hub.branches:
            self.answer(404, X_Error_Code="RevisionNotFound")
            return
        if known and name in hub.files:
            branch = next(b for b in hub.branches[name] if hub.files_at(name, at) is
                          hub.branches[name][b])  # fmt: skip
            entries = [hub.entry(name, path) for path in hub.files[name]]
            found = {"id": name, "sha": hub.commit_of(name, branch), "siblings": entries}
            self.json({**found, "private": name in hub.private})
            return
        super().route()

    def upload(self):
        hub = self.server.fake
        body = self.body()
        path = self.path.partition("?")[0]
        routes = {
            r"/api/repos/create": self.create,
            r"/api/validate-yaml": lambda _: self.json({"errors": [], "warnings": []}),
            r"/api/models/([^/]+/[^/]+)/branch/(.+)": self.branch,
            r"/api/models/([^/]+/[^/]+)/preupload/(.+)": self.preupload,
            r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": self.batch,
            r"/large/(.+)": self.receive,
            r"/api/models/([^/]+/[^/]+)/commit/(.+)": self.commit,
        }
        pattern, found = next((p, m) for p in routes if (m := re.fullmatch(p, path)))
        route = re.sub(r"[^a-z]+", " ", pattern.removeprefix("/api")).split()[-1]
        hub.sent.append(route)
        hub.tokens.add(self.headers["Authorization"] if route != "large" else None)
        status, said = hub.refusals.get(route, (200, ""))
        if route == "large" and status != 200:
            with hub.lock:  # large files come in parallel
                hub.refused_after -= 1
                status = 200 if hub.refused_after >= 0 else status
        if route != "large" and self.headers["Authorization"] != f"Bearer {hub.token}":
            status, said = 401, "Invalid username or password."
        if status != 200:
            self.json({"error": said}, status)
            return
        routes[pattern](body, *(part.replace("%2F", "/") for part in found.groups()))

    def body(self):
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def json(self, tree, status=200):
        self.answer(status, json.dumps(tree).encode(), Content_Type="application/json")

    def create(self, body):
        hub, asked = self.server.fake, json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        address = {"url": f"{hub.address}/{name}"}
        if name in hub.branches:
            self.json({"error": "You already created this model repo", **address}, 409)
            return
        hub.make(name, private=asked.get("visibility") == "private")
        self.json(address)

    def branch(self, _, name, branch):
        hub = self.server.fake
        known = branch in hub.branches[name]
        hub.branches[name].setdefault(branch, dict(hub.branches[name]["main"]))
        self.json({"error": "Reference already exists"} if known else {}, 409 if known else 200)

    def preupload(self, body, name, branch):
        hub, modes = self.server.fake, []
        for file in json.loads(body)["files"]:
            path = file["path"]
            old = hub.branches[name][branch].get(path)
            oid = None if old is None else _oid(path, old)
            mode = "regular" if path.endswith(TEXTS) else "lfs"
            ignored = path.endswith(hub.ignored) if hub.ignored else False
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        self.json({"files": modes})

    def batch(self, body, name):
        hub, objects = self.server.fake, []
        for wanted in json.loads(body)["objects"]:
            at = {"href": f"{hub.address}/large/{wanted['oid']}"}
            there = wanted["oid"] in hub.large
            objects.append({**wanted, **({} if there else {"actions": {"upload": at}})})
        self.json({"objects": objects, "transfer": "basic"})

    def receive(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            self.json({"error": "other content"}, 400)
            return
        self.server.fake.large[oid] = body
        self.answer(200)

    def commit(self, body, name, branch):
        hub, changes = self.server.fake, {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                hub.messages.append(value["summary"])
            elif line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            else:
                changes[value["path"]] = hub.large[value["oid"]]
        kept = {path: c for path, c in changes.items() if not path.endswith(hub.ignored or "\0")}
        hub.branches[name][branch] |= kept
        commit = hub.commit_of(name, branch)
        self.json({"commitUrl": f"{hub.address}/{name}/commit/{commit}", "commitOid": commit})


def _oid(path, content):
    if path.endswith(TEXTS):
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.sha256(content).hexdigest()
