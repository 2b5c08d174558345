"""`neuclip data download-evalsets` against a local server that imitates the hub."""

import hashlib
import json
import threading
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from datacomp_sets import CodedTowers, picture, write_classification
from neuclip.cli.app import main
from neuclip.errors import UserError
from neuclip.evaluation.datacomp.benchmark import Benchmark, BenchmarkSettings
from neuclip.evaluation.datacomp.download import download_task
from neuclip.evaluation.datacomp.hub import Hub
from neuclip.evaluation.datacomp.sets import open_task
from neuclip.evaluation.datacomp.suite import load_suite

TASKS = load_suite().tasks
MNIST = TASKS["mnist"]
FLICKR = TASKS["retrieval/flickr_1k_test_image_text_retrieval"]
WINOGAVIL = TASKS["misc/winogavil"]
PAGE = 3  # files in a page of a listing


@dataclass
class Fake:
    """What the hub holds, how it misbehaves, and what it was asked."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    listed_as: dict[str, bytes] = field(default_factory=dict)
    cut_after: list[int] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)
    ranges: bool = True
    token: str | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    tokens_of_storage: list[str | None] = field(default_factory=list)
    address: str = ""

    def listing(self, repository):
        entries = [{"type": "directory", "path": "test", "size": 0, "oid": "x"}]
        for path, content in sorted(self.files[repository].items()):
            content = self.listed_as.get(path, content)
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
            if not path.endswith((".txt", ".csv", ".md")):
                oid = hashlib.sha256(content).hexdigest()
                entry |= {"oid": "p" * 40, "lfs": {"oid": oid, "size": len(content)}}
            entries.append(entry)
        return entries


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
        fake = self.server.fake
        path, _, query = self.path.partition("?")
        fake.asked.append((path, self.headers["Range"]))
        if path.startswith("/storage/"):
            self.storage(fake, path.removeprefix("/storage/"))
        elif fake.errors:
            self.answer(fake.errors.pop(0))
        elif fake.token and self.headers["Authorization"] != f"Bearer {fake.token}":
            self.answer(401)
        elif path.startswith("/api/datasets/"):
            self.listing(fake, path, query)
        else:
            place = path.removeprefix("/datasets/").replace("/resolve/main/", "::")
            self.answer(302, Location=f"{fake.address}/storage/{place}")

    def listing(self, fake, path, query):
        repository = path.removeprefix("/api/datasets/").removesuffix("/tree/main")
        if repository not in fake.files:
            self.answer(404)
            return
        start = int(query.partition("cursor=")[2] or 0)
        entries = fake.listing(repository)
        more = {}
        if start + PAGE < len(entries):
            url = f"{fake.address}{path}?recursive=true&cursor={start + PAGE}"
            more["Link"] = f'<{url}>; rel="next"'
        self.answer(200, json.dumps(entries[start : start + PAGE]).encode(), **more)

    def storage(self, fake, place):
        repository, _, path = place.partition("::")
        fake.tokens_of_storage.append(self.headers["Authorization"])
        content = fake.files[repository][path]
        start = 0
        if self.headers["Range"] and fake.ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        rest = content[start:]
        if path.endswith(".tar") and fake.cut_after:
            rest = rest[: fake.cut_after.pop(0)]
        self.wfile.write(rest)


@contextmanager
def serving(fake):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.fake, server.daemon_threads = fake, False
    fake.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = Fake()
    source = write_classification(
        tmp_path / "source", [((n % 3, 4, 5), n % 3, None) for n in range(8)], 6
    )
    files = {str(p.relative_to(source)): p.read_bytes() for p in source.rglob("*") if p.is_file()}
    fake.files[MNIST.source] = {**files, "README.md": b"of no use here"}
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving(fake):
        monkeypatch.setenv("HF_ENDPOINT", fake.address + "/")
        yield fake


def judge(data_dir, task):
    towers = Benchmark(CodedTowers(), BenchmarkSettings(workers=0))
    return towers.judge(open_task(data_dir, task))["main_metric"]


def fetched(hub):
    return [path.rpartition("::")[2] for path, _ in hub.asked if path.startswith("/storage/")]


def test_a_set_is_fetched_and_judged(hub, tmp_path):
    done = download_task(Hub(), tmp_path / "data", MNIST)
    assert (done.files, done.new) == (5, 5)
    assert "README.md" not in fetched(hub)
    assert judge(tmp_path / "data", MNIST) == 1.0


def test_what_is_whole_stays(hub, tmp_path):
    download_task(Hub(), tmp_path, MNIST)
    hub.asked.clear()
    assert download_task(Hub(), tmp_path, MNIST).new == 0
    assert fetched(hub) == []
    shard = tmp_path / MNIST.folder / "test" / "1.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"x")  # of the same size
    assert download_task(Hub(), tmp_path, MNIST).new == 1
    assert fetched(hub) == ["test/1.tar"]
    assert shard.read_bytes() == content


def test_files_that_came_otherwise_are_verified_not_fetched(hub, tmp_path):
    folder = tmp_path / MNIST.folder
    for path, content in hub.files[MNIST.source].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    assert download_task(Hub(), tmp_path, MNIST).new == 0
    assert fetched(hub) == []


def test_a_connection_that_ends_early_goes_on_where_it_was(hub, tmp_path):
    hub.cut_after = [1000, 2000]
    download_task(Hub(pause=0), tmp_path, MNIST)
    ranges = [range_ for path, range_ in hub.asked if path.endswith("::test/0.tar")]
    assert ranges == [None, "bytes=1000-", "bytes=3000-"]
    assert judge(tmp_path, MNIST) == 1.0
    assert not list(tmp_path.rglob("*.partial"))


def test_a_later_call_goes_on_too(hub, tmp_path):
    hub.cut_after = [100] * 5
    with pytest.raises(UserError, match=r"ended early.*start again to go on"):
        download_task(Hub(pause=0), tmp_path, MNIST)
    assert not (tmp_path / MNIST.folder / "test" / "0.tar").exists()
    hub.asked.clear()
    download_task(Hub(pause=0), tmp_path, MNIST)
    assert ("bytes=500-") in [range_ for _, range_ in hub.asked]
    assert judge(tmp_path, MNIST) == 1.0


def test_a_server_that_cannot_go_on(hub, tmp_path):
    hub.ranges, hub.cut_after = False, [1000]
    download_task(Hub(pause=0), tmp_path, MNIST)
    assert judge(tmp_path, MNIST) == 1.0


def test_content_that_is_not_what_is_listed(hub, tmp_path):
    shard = hub.files[MNIST.source]["test/0.tar"]
    hub.listed_as["test/0.tar"] = shard[:-1] + b"x"
    with pytest.raises(UserError, match=r"0\.tar: what came is not what the hub lists \(sha256:"):
        download_task(Hub(pause=0), tmp_path, MNIST)
    assert not (tmp_path / MNIST.folder / "test" / "0.tar").exists()
    names = hub.files[MNIST.source]["classnames.txt"]
    hub.listed_as["classnames.txt"] = b"X" + names[1:]
    with pytest.raises(UserError, match=r"classnames\.txt: what came is not .* \(git:"):
        download_task(Hub(pause=0), tmp_path / "other", MNIST)


def test_a_hub_that_is_busy_is_asked_again(hub, tmp_path):
    hub.errors = [503, 429]
    download_task(Hub(pause=0), tmp_path, MNIST)
    hub.errors = [503] * 5
    with pytest.raises(UserError, match=r"HTTP 503 \(5 tries\)"):
        download_task(Hub(pause=0), tmp_path, MNIST)


def test_a_repository_behind_terms(hub, tmp_path, monkeypatch):
    hub.token = "secret"
    with pytest.raises(UserError, match=r"no access.*Accept the terms.*HF_TOKEN") as caught:
        download_task(Hub(pause=0), tmp_path, MNIST)
    assert "secret" not in str(caught.value)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("secret\n")
    download_task(Hub(pause=0), tmp_path, MNIST)
    # The token is the hub's: where it sends us for the content does not learn it.
    assert set(hub.tokens_of_storage) == {None}


def test_no_such_repository(hub, tmp_path):
    with pytest.raises(UserError, match=r"wds_cifar10_test.*not found"):
        download_task(Hub(pause=0), tmp_path, TASKS["cifar10"])


def test_a_repository_of_another_layout(hub, tmp_path):
    hub.files[MNIST.source] = {"data.parquet": b"x"}
    with pytest.raises(UserError, match=r"no test/\*\.tar"):
        download_task(Hub(pause=0), tmp_path, MNIST)


def test_no_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"no answer from http://127\.0\.0\.1:9"):
        download_task(Hub(pause=0), tmp_path, MNIST)
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    with pytest.raises(UserError, match=r"HF_ENDPOINT: 'hub\.example' is no http"):
        Hub()


def test_paths_that_lead_out(hub, tmp_path):
    hub.files[MNIST.source]["test/../../evil.tar"] = b"x"
    with pytest.raises(UserError, match="leads out of the folder"):
        download_task(Hub(pause=0), tmp_path, MNIST)
    assert not list(tmp_path.rglob("evil*"))


def archive(path, pictures):
    with zipfile.ZipFile(path, "w") as zipped:
        for name, color in pictures.items():
            zipped.writestr(f"folder/{name}", picture(color))
    return path.read_bytes()


def test_retrieval_is_converted(hub, tmp_path):
    pictures = {"10.jpg": (1, 5, 6), "20.jpg": (2, 5, 6)}
    table = "raw,sentids,filename\r\n"
    table += '"[""number 1"", ""a number 1\\nagain""]","[0, 1]",10.jpg\r\n'
    table += '"[""number 2""]",[2],20.jpg\r\n'
    zipped = archive(tmp_path / "p.zip", pictures)
    hub.files[FLICKR.source] = {"a.csv": table.encode(), "images.zip": zipped, "a.py": b"code"}
    data = tmp_path / "data"
    assert download_task(Hub(), data, FLICKR).new == 2
    task_set = open_task(data, FLICKR)
    assert [task_set.index.read(n).caption for n in range(2)] == [
        "number 1\na number 1 again",
        "number 2",
    ]
    assert judge(data, FLICKR) == 1.0
    hub.asked.clear()
    assert download_task(Hub(), data, FLICKR).new == 0
    assert fetched(hub) == []
    cached = [path.name for path in (tmp_path / "hf" / "neuclip").rglob("*.zip")]
    assert cached == ["images.zip"]


def winogavil_files(tmp_path, associations='["wolf"]'):
    names = [f"thing {n}" for n in range(9)]
    pictures = {f"{name}.jpg": (n, 20, 21) for n, name in enumerate(names)}
    pictures["wolf.jpg"] = (30, 20, 21)
    candidates = json.dumps([*names, "wolf"]).replace('"', '""')
    associations = associations.replace('"', '""')
    table = f'cue,candidates,associations\nnumber 30,"{candidates}","{associations}"\n'
    return {"t.csv": table.encode(), "i.zip": archive(tmp_path / "w.zip", pictures)}


@pytest.mark.parametrize("written", ['["wolf"]', "['wolf']"])
def test_winogavil_is_converted(hub, tmp_path, written):
    hub.files[WINOGAVIL.source] = winogavil_files(tmp_path, written)
    download_task(Hub(), tmp_path / "data", WINOGAVIL)
    task_set = open_task(tmp_path / "data", WINOGAVIL)
    assert len(task_set.index) == 10
    assert task_set.instances[0].associations == ("s0000009",)
    assert judge(tmp_path / "data", WINOGAVIL) == 1.0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"i.zip": b"no zip"}, "is no zip archive"),
        ({"t.csv": b"cue,candidates\nx,y\n"}, "no column associations"),
        ({"t.csv": b"cue,candidates,associations\n"}, "has no rows"),
        ({"t.csv": b"cue,candidates,associations\nx,wolf,wolf\n"}, "row 1: expected a list"),
        ({"more.csv": b"x"}, r"expected one \*\.csv, found 2"),
        (
            {"t.csv": b"cue,candidates,associations\nx,['elk'],['elk']\n"},
            r"i\.zip has no picture 'elk'",
        ),
        (
            {"t.csv": b"cue,candidates,associations\nx,['wolf'],['elk']\n"},
            "row 1: 'elk' is no candidate",
        ),
    ],
)
def test_sources_that_cannot_be_converted(hub, tmp_path, change, text):
    hub.files[WINOGAVIL.source] = {**winogavil_files(tmp_path), **change}
    with pytest.raises(UserError, match=text):
        download_task(Hub(), tmp_path / "data", WINOGAVIL)
    assert not (tmp_path / "data" / WINOGAVIL.folder).exists()


def test_the_command(hub, tmp_path, capsys):
    line = ["data", "download-evalsets", str(tmp_path / "data"), "--tasks", "mnist"]
    assert main(line) == 0
    assert capsys.readouterr().out == "[1/1] MNIST: 5 of 5 files fetched\n"
    assert main(line) == 0
    assert capsys.readouterr().out == "[1/1] MNIST: was there\n"
    assert main([*line[:-1], "mnits"]) == 2
    assert "unknown task 'mnits'; did you mean 'mnist'" in capsys.readouterr().err
