"""`neuclip data download-evalsets` against a local server with the hub's routes."""

import gzip
import json
import os
import subprocess
import sys
import zipfile

import pytest
from huggingface_hub import close_session

from datacomp_sets import CodedTowers, picture, write_classification
from hub_server import COMMIT, Fake, serving
from neuclip.cli.app import main
from neuclip.errors import UserError
from neuclip.evaluation.datacomp import download
from neuclip.evaluation.datacomp.download import download_task
from neuclip.evaluation.datacomp.sets import open_task
from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.evaluation.evaluate import evaluate
from neuclip.evaluation.interfaces import EvaluatedModel, EvaluationSettings

TASKS = load_suite().tasks
MNIST = TASKS["mnist"]
FLICKR = TASKS["retrieval/flickr_1k_test_image_text_retrieval"]
WINOGAVIL = TASKS["misc/winogavil"]


@pytest.fixture
def hub(tmp_path, set_hub):
    fake = Fake()
    source = write_classification(
        tmp_path / "source", [((n % 3, 4, 5), n % 3, None) for n in range(8)], 6
    )
    files = {str(p.relative_to(source)): p.read_bytes() for p in source.rglob("*") if p.is_file()}
    fake.files[MNIST.source] = {**files, "README.md": b"not needed"}
    with serving(fake):
        set_hub("ENDPOINT", fake.address)
        yield fake


def score(data_dir, task):
    model, settings = EvaluatedModel(CodedTowers()), EvaluationSettings(workers=0)
    return evaluate(model, open_task(data_dir, task), settings).metrics["main_metric"]


def downloaded(hub):
    return [path.partition(f"{COMMIT}/")[2] for verb, path in hub.requests if verb == "GET"][1:]


def test_a_set_is_downloaded(hub, tmp_path):
    seen = []
    done = download_task(tmp_path / "data", MNIST, lambda *state: seen.append(state))
    assert (done.files, done.new) == (5, 5)
    assert "README.md" not in downloaded(hub)
    assert score(tmp_path / "data", MNIST) == 1.0
    size = len(hub.files[MNIST.source]["test/0.tar"])
    assert ("test/0.tar", size, size) in seen


@pytest.mark.parametrize("same_size", [True, False])
def test_complete_files_are_kept_and_corrupt_ones_downloaded_again(hub, tmp_path, same_size):
    download_task(tmp_path, MNIST)
    hub.requests.clear()
    assert download_task(tmp_path, MNIST).new == 0
    assert len(hub.requests) == 1  # the listing
    shard = tmp_path / MNIST.folder / "test" / "1.tar"
    content, status = shard.read_bytes(), shard.stat()
    shard.write_bytes(content[:-1] + b"x" * same_size)
    os.utime(shard, (status.st_atime, status.st_mtime + 100 * same_size))
    hub.requests.clear()
    assert download_task(tmp_path, MNIST).new == 1
    assert downloaded(hub) == ["test/1.tar"]
    assert shard.read_bytes() == content


def test_shards_from_elsewhere_are_checked_and_kept(hub, tmp_path):
    folder = tmp_path / MNIST.folder
    for path, content in hub.files[MNIST.source].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    download_task(tmp_path, MNIST)
    assert not any(path.endswith(".tar") for path in downloaded(hub))


def test_an_interrupted_transfer_is_tried_again(hub, tmp_path):
    hub.cut_after = [1000]
    download_task(tmp_path, MNIST)
    assert downloaded(hub).count("test/0.tar") == 2
    assert score(tmp_path, MNIST) == 1.0


@pytest.mark.parametrize("other", [b"", b"x"])
def test_content_that_differs_from_the_listing(hub, tmp_path, other):
    shard = hub.files[MNIST.source]["test/0.tar"]
    hub.listed_as["test/0.tar"] = shard[:-1] + b"x" + other
    with pytest.raises(UserError, match=r"(0\.tar arrived corrupt \(expected sha256:|cannot)"):
        download_task(tmp_path, MNIST)
    assert not (tmp_path / MNIST.folder / "test" / "0.tar").exists()


def test_a_busy_hub(hub, tmp_path):
    hub.status = 503
    with pytest.raises(UserError, match=r"mnist_test.*: HTTP 503; run the command again"):
        download_task(tmp_path, MNIST)


def test_a_repository_behind_terms(hub, tmp_path):
    hub.token = "secret"
    with pytest.raises(UserError, match=r"no access to .*accept its terms.*HF_TOKEN") as caught:
        download_task(tmp_path, MNIST)
    assert "secret" not in str(caught.value)
    (tmp_path / "hf").mkdir(exist_ok=True)
    (tmp_path / "hf" / "token").write_text("secret\n")
    assert download_task(tmp_path, MNIST).new == 5


def test_no_such_repository(hub, tmp_path):
    with pytest.raises(UserError, match=r"wds_cifar10_test: no such dataset repository"):
        download_task(tmp_path, TASKS["cifar10"])


def test_a_repository_of_another_layout(hub, tmp_path):
    hub.files[MNIST.source] = {"data.parquet": b"x"}
    with pytest.raises(UserError, match=r"no test/\*\.tar.*files: data\.parquet"):
        download_task(tmp_path, MNIST)


def test_no_hub(tmp_path, set_hub):
    set_hub("ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"from http://127\.0\.0\.1:9: .*refused.*HF_ENDPOINT"):
        download_task(tmp_path, MNIST)
    set_hub("ENDPOINT", "hub.example")
    with pytest.raises(UserError, match=r"from hub\.example: .*missing an 'http://'"):
        download_task(tmp_path, MNIST)


def test_offline(hub, tmp_path, set_hub):
    set_hub("HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; unset it"):
        download_task(tmp_path, MNIST)
    assert not hub.requests


def test_a_folder_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*wds_mnist_test: Not a directory"):
        download_task(tmp_path / "file", MNIST)


def test_paths_that_lead_out(hub, tmp_path):
    hub.files[MNIST.source]["test/../../evil.tar"] = b"x"
    with pytest.raises(UserError, match=r"evil\.tar': cannot contain a '\.\.' path segment"):
        download_task(tmp_path, MNIST)
    assert not list(tmp_path.rglob("evil*"))


ODD_LISTINGS = [
    7,
    "text",
    [7],
    [None],
    [{}],
    [{"size": 3}],
    [{"rfilename": None, "size": 3}],
    [{"rfilename": 5, "size": 3}],
    [{"rfilename": "test/0.tar"}],
    [{"rfilename": "test/0.tar", "size": "3"}],
    [{"rfilename": "test/0.tar", "size": -3}],
    [{"rfilename": "\x1b[2J.tar", "size": 3}],
    [{"rfilename": "test/0.tar", "size": 3, "lfs": 7}],
    [{"rfilename": f"{n}", "size": 0} for n in range(100_001)],
]


def test_odd_listings_are_one_line(hub, tmp_path):
    for siblings in ODD_LISTINGS:
        hub.siblings = siblings
        with pytest.raises(UserError, match="the hub's answer is not a list of files") as caught:
            download_task(tmp_path, MNIST)
        assert str(caught.value).isprintable()
    assert len(hub.requests) == len(ODD_LISTINGS)


def test_answers_that_are_no_listing(hub, tmp_path):
    for answer in (b"[]", b"7", b"{", b"[" * 10**5, b"\xff"):
        hub.listing = answer
        with pytest.raises(UserError) as caught:
            download_task(tmp_path, MNIST)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_listing_without_end(hub, tmp_path, monkeypatch, compressed):
    monkeypatch.setattr(download, "_LARGEST_LISTING", 2**20)
    hub.listing = b" " * 2**22
    if compressed:
        hub.listing = gzip.compress(hub.listing)
        hub.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(UserError, match="list of files is longer than 1,048,576 bytes"):
        download_task(tmp_path, MNIST)
    hub.listing, hub.headers = None, {}
    assert download_task(tmp_path, MNIST).new  # the bound is gone with the listing


def test_a_next_page_is_not_followed_and_the_token_stays_with_the_hub(hub, tmp_path, monkeypatch):
    """A listing may name another host, or itself without end; a file may lie on another host."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    other = Fake(files=hub.files)
    with serving(other):
        hub.headers = {"Link": f'<{other.address}/next>; rel="next", <{hub.address}>; rel="next"'}
        hub.elsewhere = other.address
        download_task(tmp_path, MNIST)
    assert hub.tokens == {"Bearer hf_secret"} and other.requests and other.tokens == {None}
    assert sum(path.startswith("/api/") for _, path in hub.requests) == 1


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
    assert download_task(data, FLICKR).new == 2
    task_set = open_task(data, FLICKR)
    assert [task_set.index.read(n).captions for n in range(2)] == [
        ("number 1", "a number 1 again"),
        ("number 2",),
    ]
    assert score(data, FLICKR) == 1.0
    hub.requests.clear()
    assert download_task(data, FLICKR).new == 0
    assert downloaded(hub) == []
    assert [path.name for path in (tmp_path / "hf" / "hub").rglob("*.zip")] == ["images.zip"]


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
    download_task(tmp_path / "data", WINOGAVIL)
    task_set = open_task(tmp_path / "data", WINOGAVIL)
    assert len(task_set.index) == 10
    assert task_set.instances[0].associations == ("s0000009",)
    assert score(tmp_path / "data", WINOGAVIL) == 1.0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"i.zip": b"no zip"}, "is not a zip archive"),
        ({"t.csv": b"cue,candidates\nx,y\n"}, "no column associations"),
        ({"t.csv": b"cue,candidates,associations\n"}, "has no rows"),
        ({"t.csv": b"cue,candidates,associations\nx,wolf,wolf\n"}, "row 1: expected a list"),
        ({"more.csv": b"x"}, r"expected one \*\.csv, found 2"),
        (
            {"t.csv": b"cue,candidates,associations\nx,['elk'],['elk']\n"},
            r"i\.zip has no image 'elk'",
        ),
        (
            {"t.csv": b"cue,candidates,associations\nx,['wolf'],['elk']\n"},
            "row 1: 'elk' is not a candidate",
        ),
    ],
)
def test_sources_that_cannot_be_converted(hub, tmp_path, change, text):
    hub.files[WINOGAVIL.source] = {**winogavil_files(tmp_path), **change}
    with pytest.raises(UserError, match=text):
        download_task(tmp_path / "data", WINOGAVIL)
    assert not (tmp_path / "data" / WINOGAVIL.folder).exists()


def test_the_command(hub, tmp_path, capsys):
    """In a process of its own: the library reads the hub's address from the environment."""
    line = ["data", "download-evalsets", str(tmp_path / "data"), "--tasks", "mnist"]
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-m", "neuclip", *line],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "[1/1] MNIST: 5 of 5 files downloaded\n"
    assert main(line) == 0
    assert capsys.readouterr().out == "[1/1] MNIST: already complete\n"
    assert main([*line[:-1], "mnits"]) == 2
    assert "unknown task 'mnits'; did you mean 'mnist'" in capsys.readouterr().err
