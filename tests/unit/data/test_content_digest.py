"""Digests follow the pictures of every kind of source."""

import os
import shutil

import pyarrow
import pyarrow.parquet
import pytest

from datacomp_sets import picture
from neuclip.data.identity import identify
from neuclip.data.opening import open_source
from neuclip.data.sources.source import content_digest


def write_folder(folder):
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture((number, 1, 2)))
        (folder / f"{number}.txt").write_text("words")
    return folder


def write_csv(folder):
    write_folder(folder)
    rows = "".join(f"{number}.png,words\n" for number in range(3))
    (folder / "table.csv").write_text("filepath,title\n" + rows)
    return folder / "table.csv"


def write_parquet(folder):
    folder.mkdir()
    images = [{"bytes": picture((number, 1, 2)), "path": None} for number in range(3)]
    table = pyarrow.table({"image": images, "caption": ["words"] * 3})
    pyarrow.parquet.write_table(table, folder / "table.parquet")
    return folder / "table.parquet"


def write_shards(folder, demo_dir):
    shutil.copytree(demo_dir / "unseen_face_test", folder)
    return folder


@pytest.fixture(params=["folder", "csv", "parquet", "shards", "mixture"])
def source(request, tmp_path, demo_dir):
    """What to open, and a file that holds pictures of it."""
    folder = tmp_path / "data"
    if request.param == "csv":
        return str(write_csv(folder)), folder / "1.png"
    if request.param == "parquet":
        return str(write_parquet(folder)), folder / "table.parquet"
    if request.param == "shards":
        return str(write_shards(folder, demo_dir)), next(folder.glob("*.tar"))
    write_folder(folder)
    if request.param == "mixture":
        table = write_parquet(tmp_path / "more")
        return f"{table}::{folder}", folder / "1.png"
    return str(folder), folder / "1.png"


def test_it_follows_the_files(source):
    spec, file = source
    before = content_digest(open_source(spec))
    assert content_digest(open_source(spec)) == before
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    assert content_digest(open_source(spec)) != before


def test_identity_is_that_of_copies_and_follows_the_content(source, tmp_path):
    spec, file = source
    before = identify(open_source(spec))
    assert before.samples == len(open_source(spec))
    copies = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-copy")
    copied = spec.replace(str(tmp_path), str(copies))
    for path in copies.rglob("*"):
        os.utime(path, ns=(1, 1))
    assert identify(open_source(copied)) == before
    shutil.rmtree(copies)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if file.suffix == ".png" else 600] ^= 1  # .tar: in an image
    file.write_bytes(content)
    assert identify(open_source(spec)) != before


@pytest.mark.parametrize("samples", [1, 2, 63, 64, 65, 1000])
def test_identity_looks_at_both_ends(tmp_path, samples):
    def write(last):
        rows = "".join(f"{number}.png,words\n" for number in range(samples - 1))
        (tmp_path / "table.csv").write_text(f"filepath,title\n{rows}{last}.png,words\n")
        for name in [*range(samples), last]:
            (tmp_path / f"{name}.png").touch()
        return identify(open_source(str(tmp_path / "table.csv")))

    assert write("same") == write("same") != write("emas")
