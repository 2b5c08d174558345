"""`neuclip embed`, `classify`, `score` and `duplicates`, with a real model of few parameters."""

import csv
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import neuclip
from datacomp_sets import picture
from embedding_folders import COLORS, content, write_pictures
from neuclip.cli.app import main
from neuclip.cli.embedding_flags import check_outputs
from neuclip.data.opening import open_source
from neuclip.embedding.embedding_store import EmbeddingStore
from neuclip.embedding.stored_images import StoredImages
from neuclip.errors import UserError
from neuclip.evaluation.embed import encode_split, start_reading
from neuclip.evaluation.interfaces import EvaluationSettings
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.load import load_run
from neuclip.search import server
from neuclip.search.local_server import LocalServer
from tiny_models import VIT, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    torch.save({"state_dict": tiny().towers.state_dict()}, path)
    return path


@pytest.fixture
def pictures(tmp_path):
    """Eleven pictures, of which 7 is the same as 0, and 8 the same as 1."""
    return write_pictures(tmp_path / "pictures", COLORS)


@pytest.fixture
def command(run, tmp_path, monkeypatch):
    """Runs a command with the model, four images a batch, in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(name, source, *flags, model=True):
        flags = [*map(str, flags), "--batch-size", "4", "--workers", "0", "--device", "cpu"]
        if model:
            flags += ["--run", str(run), "--arch", VIT]
        return main([name, str(source), *flags])

    return call


def rows_of(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.fixture
def search(run, monkeypatch):
    """Runs `neuclip search` until it serves; the exit code, and the images that it searches."""

    def stop(_):
        raise KeyboardInterrupt

    answers = server.page_answers

    def call(images, *flags, arch=VIT):
        opened = []

        def watched(engine, about):
            opened.append((engine.images, about))
            return answers(engine, about)

        monkeypatch.setattr(LocalServer, "serve_forever", stop)
        monkeypatch.setattr(server, "page_answers", watched)
        flags = [*map(str, flags), "--batch-size", "4", "--workers", "0", "--device", "cpu"]
        code = main(["search", str(run), "--images", str(images), "--arch", arch, "--port", "0",
                     *flags])  # fmt: skip
        return code, *(opened[0] if opened else (None, None))

    return call


def rows_of_images(images):
    return images.features(np.arange(len(images)))


def test_shell_python_search_and_evaluation_have_the_same_features(
    command, search, run, pictures, tmp_path
):
    assert command("embed", pictures, "--enable-text", "--out", tmp_path / "out") == 0
    (shard,) = EmbeddingStore.open(tmp_path / "out").shards()
    model = neuclip.load(run, arch=VIT, device="cpu", batch_size=4, workers=0)
    assert np.array_equal(shard.images, model.embed_images(str(pictures)).numpy())
    assert np.array_equal(shard.texts, model.embed_texts(shard.captions).numpy())
    restored = load_run(CheckpointChoice(run, arch=VIT), "cpu")
    settings, source = EvaluationSettings(batch_size=4, workers=0), open_source(str(pictures))
    evaluated = encode_split(restored.encoder, start_reading(restored.encoder, source, settings))
    assert np.array_equal(shard.images, evaluated.image_features.numpy())
    assert np.array_equal(shard.texts, evaluated.text_features.numpy())
    for flags in ((), ("--embeddings", tmp_path / "out"), ("--embeddings", tmp_path / "new")):
        code, images, _ = search(pictures, *flags)
        assert code == 0 and np.array_equal(shard.images, rows_of_images(images))


def test_search_embeds_once(command, search, pictures, tmp_path, capsys):
    (pictures / "003.png").write_bytes(b"no picture")
    code, images, about = search(pictures)
    assert code == 0 and (len(images), about.images, about.damaged) == (10, 10, 1)
    (folder,) = (tmp_path / "cache" / "neuclip" / "embeddings").iterdir()
    told = capsys.readouterr()
    assert f"10 images; features in {folder}" in told.out and "stopped" in told.out
    assert "1 corrupt sample left out: 1 image" in told.err
    before = content(folder)
    assert search(pictures)[0] == 0
    assert "1 of 1 shard already" in capsys.readouterr().err
    assert command("duplicates", pictures) == 0  # of the same features
    assert "1 of 1 shard already" in capsys.readouterr().err
    assert content(folder) == before


@pytest.mark.parametrize("name", ["folder", "images"])
def test_search_takes_a_folder_of_embed_as_it_is(command, search, pictures, tmp_path, capsys, name):
    flags = ("--dtype", "float16", "--enable-text", "--format", "parquet", "--shard-samples", 3)
    (pictures / "004.txt").unlink()  # with texts, a sample without one is corrupt
    assert command("embed", pictures, "--out", tmp_path / "out", *flags) == 0
    before = content(tmp_path / "out")
    given = (
        (tmp_path / "out",) if name == "folder" else (pictures, "--embeddings", tmp_path / "out")
    )
    code, images, about = search(*given)
    assert code == 0 and len(images) == 10 and images.row_of(4) is None
    assert about.data == str(pictures) and about.damaged == 1
    assert content(tmp_path / "out") == before
    # What is missing is embedded in the same form.
    (tmp_path / "out" / "finished" / "00001.json").unlink()
    (tmp_path / "out" / "parquet" / "embeddings_00001.parquet").unlink()
    assert search(*given)[0] == 0
    assert "2 of 3 shards already" in capsys.readouterr().err
    assert content(tmp_path / "out").keys() == before.keys()


def test_an_index_is_built_once_and_belongs_to_its_features(
    command, search, pictures, tmp_path, capsys
):
    pytest.importorskip("faiss")
    out = tmp_path / "out"
    assert command("embed", pictures, "--out", out) == 0
    assert search(out, "--index")[0] == 0
    assert "index built: recall@10 1.000 for texts, 1.000 for images" in capsys.readouterr().out
    _, _, about = search(out, "--index")
    assert about.search == "index: recall@10 1.000 for texts, 1.000 for images"
    assert "index there already: recall@10" in capsys.readouterr().out
    before = content(out)
    path = out / "img_emb" / "img_emb_00000.npy"
    np.save(path, np.load(path)[::-1])
    assert search(out, "--index")[0] == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"{out}/index is an index of other features" in told
    assert f"remove {out}/index, and the next search with --index builds it again" in told
    assert search(out)[2].search == "exact search"
    assert content(out) == before | {"img_emb/img_emb_00000.npy": path.read_bytes()}


def test_search_refuses_embeddings_of_something_else(
    command, search, run, pictures, tmp_path, capsys
):
    out = tmp_path / "out"
    assert command("embed", pictures, "--out", out) == 0
    before = content(out)
    other = tmp_path / "other.pt"
    torch.save({"state_dict": tiny(seed=1).towers.state_dict()}, other)
    flags = ("--arch", VIT, "--device", "cpu", "--port", "0")
    assert main(["search", str(other), "--images", str(out), *flags]) == 2
    told = capsys.readouterr().err
    assert f"another model: {run} ({VIT}), not {other} ({VIT})" in told
    assert (
        main(["search", str(run), "--images", str(out), *flags, "--image-mean", "0", "0", "0"]) == 2
    )
    told = capsys.readouterr().err
    assert "another preprocessing" in told and "not [0.0, 0.0, 0.0] of" in told
    (pictures / "011.png").write_bytes(picture((1, 1, 1)))
    assert search(out)[0] == 2
    assert "other data, or of these data before they changed" in capsys.readouterr().err
    assert search(pictures, "--embeddings", pictures)[0] == 2
    assert "is not empty, and has no manifest.json" in capsys.readouterr().err
    assert search(out, "--embeddings", out)[0] == 2
    assert "holds embeddings: leave out --embeddings" in capsys.readouterr().err
    pictures.rename(tmp_path / "elsewhere")
    assert search(out)[0] == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "cannot be opened from here" in told and f"--embeddings {out}" in told
    assert content(out) == before


def test_embed_says_what_it_did_and_resumes(command, pictures, tmp_path, capsys):
    (pictures / "003.png").write_bytes(b"no picture")
    flags = ("--out", tmp_path / "out", "--shard-samples", 3)
    assert command("embed", pictures, *flags) == 0
    told = capsys.readouterr()
    assert "10 images: " in told.out and "unit norm, float32, 3 shards" in told.out
    assert "1 corrupt sample left out: 1 image" in told.err and "003" in told.err
    before = content(tmp_path / "out")
    assert command("embed", pictures, *flags) == 0
    assert "3 of 3 shards already" in capsys.readouterr().err
    assert content(tmp_path / "out") == before
    assert command("embed", pictures, *flags, "--dtype", "float16") == 2
    assert "other settings (--dtype float32, not float16)" in capsys.readouterr().err
    assert command("embed", pictures, "--out", pictures / "001.png") == 2
    assert "001.png is a file: name a folder" in capsys.readouterr().err
    (tmp_path / "out" / "manifest.json").write_text("{")
    assert command("score", tmp_path / "out", model=False) == 2
    assert "embed again into another folder" in capsys.readouterr().err


HOLD = """
import pathlib, sys
from neuclip.embedding.embedding_store import locked_kind
from neuclip.parallel.folder_lock import FolderLock
with FolderLock(locked_kind("--out")) as lock:
    lock.acquire(pathlib.Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_one_command_at_a_time_fills_a_folder(command, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("neuclip.parallel.folder_lock.GRACE", 0.1)
    out = tmp_path / "out"
    out.mkdir()

    def start():
        other = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(out)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert other.stdout.readline() == "held\n"
        return other

    other = start()
    assert command("embed", pictures, "--out", out) == 2
    told = capsys.readouterr().err
    assert f"process {other.pid} on " in told and f"the folder of embeddings {out}" in told
    assert "choose another --out" in told
    assert [path.name for path in out.iterdir()] == ["embeddings.lock"]
    other.communicate()
    assert command("embed", pictures, "--out", out) == 0
    complete = content(out)
    assert "embeddings.lock" not in complete
    other = start()  # a complete folder is only read
    assert command("embed", pictures, "--out", out) == 0
    other.communicate()
    assert content(out) == complete


def test_parquet_without_pyarrow_is_refused_before_the_work(
    command, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert command("embed", pictures, "--out", tmp_path / "out", "--format", "parquet") == 2
    told = capsys.readouterr().err
    assert "need pyarrow" in told and "neuclip[parquet]" in told
    assert "embedding 11 samples" not in told and not (tmp_path / "out").exists()


def test_classify(command, run, pictures, tmp_path, capsys):
    (pictures / "004.png").write_bytes(b"no picture")
    (tmp_path / "names.txt").write_text("\ufeffcat\ndog\ntall tree\n", encoding="utf-8")
    flags = ("--classes", tmp_path / "names.txt", "--out", tmp_path / "out.csv", "--top", 2)
    assert command("classify", pictures, *flags, "--templates", "a {c}::{c}") == 0
    rows = rows_of(tmp_path / "out.csv")
    assert list(rows[0]) == ["key", "class", "probability", "class_2", "probability_2"]
    assert [row["key"] for row in rows] == [f"{row:03}" for row in range(11) if row != 4]
    model = neuclip.load(run, arch=VIT, device="cpu", batch_size=4, workers=0)
    names, templates = ["cat", "dog", "tall tree"], ["a {c}", "{c}"]
    found = model.classify(str(pictures), names, templates, unreadable="nan")
    best = [each for each in found.top(2) if each is not None]
    assert [(row["class"], row["class_2"]) for row in rows] == [(a, b) for (a, _), (b, _) in best]
    assert float(rows[0]["probability"]) == pytest.approx(best[0][0][1], rel=1e-4)
    assert "1 corrupt sample left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (b"", "none is given"),
        (b"cat\n\ndog\n", "line 2 is empty"),
        (b"cat\ndog\ncat\n", "number 3, 'cat', is the same as number 1"),
        ("Kätzchen\n".encode("latin-1"), "cannot be read as UTF-8 text"),
        ("cat\n".encode("utf-16"), "cannot be read as UTF-8 text"),
        (None, "no such file"),
    ],
)
def test_classes_that_cannot_be_used(command, pictures, tmp_path, capsys, names, message):
    if names is not None:
        (tmp_path / "names.txt").write_bytes(names)
    flags = ("--classes", tmp_path / "names.txt", "--out", tmp_path / "out.csv")
    assert command("classify", pictures, *flags) == 2
    told = capsys.readouterr().err
    assert "names.txt" in told and message in told


def test_an_output_does_not_replace_an_input_or_another_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table, link = Path("table.csv"), Path("link.csv")
    link.symlink_to(table)
    check_outputs([("--out", Path("new.csv")), ("--save-path", None)], [("SOURCE", table)])
    for outputs, inputs, message in (
        ([("--out", tmp_path / table)], [("SOURCE", table)], "would replace the file of SOURCE"),
        ([("--out", link)], [("SOURCE", table)], "--out link.csv would replace"),
        (
            [("--out", table), ("--save-path", Path("./table.csv"))],
            [],
            "--save-path table.csv would replace the file of --out",
        ),
    ):
        with pytest.raises(UserError, match=message):
            check_outputs(outputs, inputs)


def test_a_table_does_not_replace_what_is_read(command, pictures, tmp_path, capsys):
    names, table = tmp_path / "names.txt", tmp_path / "pairs.csv"
    names.write_text("cat\ndog\n")
    table.write_text(f"filepath,title\n{pictures / '000.png'},a cat\n")
    before = names.read_bytes(), table.read_bytes()
    assert command("classify", pictures, "--classes", names, "--out", names) == 2
    assert "would replace the file of --classes" in capsys.readouterr().err
    assert command("duplicates", table, "--out", table) == 2
    assert "would replace the file of SOURCE" in capsys.readouterr().err
    assert (names.read_bytes(), table.read_bytes()) == before
    assert not (tmp_path / "out.csv").exists()
    store = tmp_path / "store"
    store.mkdir()
    (store / "manifest.json").write_text("{}")
    inside = store / "manifest.json"
    assert command("classify", pictures, "--classes", names, "--out", inside) == 2
    assert "is in a folder of embeddings" in capsys.readouterr().err
    assert command("duplicates", table, "--out", inside) == 2
    assert "is in a folder of embeddings" in capsys.readouterr().err
    assert inside.read_text() == "{}"


def test_score_and_filter(command, run, pictures, tmp_path, capsys):
    flags = ("--fraction", 0.3, "--save-path", tmp_path / "kept.txt", "--out", tmp_path / "all.csv")
    assert command("score", pictures, *flags, "--worst", 2) == 0
    model = neuclip.load(run, arch=VIT, device="cpu", batch_size=4, workers=0)
    texts = [f"number {color[0]}" for color in COLORS]
    exact = model.similarity(str(pictures), texts).diagonal().double().numpy()
    rows = rows_of(tmp_path / "all.csv")
    np.testing.assert_allclose([float(row["score"]) for row in rows], exact, atol=1e-5)
    best = np.sort(exact)[-3]  # int(0.3 * 11)
    expected = [f"{row:03}" for row in range(11) if exact[row] >= best - 1e-6]
    assert (tmp_path / "kept.txt").read_text().split() == expected
    shown = capsys.readouterr().out.splitlines()
    worst = [line.split()[1] for line in shown[shown.index("worst pairs") + 1 :][:2]]
    assert worst == [f"{row:03}" for row in np.argsort(exact, kind="stable")[:2]]
    counts = [int(line.split()[3]) for line in shown if re.match(r" +-?\d\.\d+ to ", line)]
    assert len(counts) == 20 and sum(counts) == 11
    # The features are in the cache; a folder of embeddings gives the same.
    (store,) = (tmp_path / "cache" / "neuclip" / "embeddings").iterdir()
    kept = (tmp_path / "kept.txt").read_bytes()
    flags = ("--threshold", best - 1e-5, "--save-path", tmp_path / "kept.txt")
    assert command("score", store, *flags, model=False) == 0
    assert (tmp_path / "kept.txt").read_bytes() == kept


def test_uids_for_datacomp(command, tmp_path, capsys):
    """Two shards with the same keys, as DataComp's: only the uids tell samples apart."""
    folder = tmp_path / "shards"
    folder.mkdir()
    uids = []
    for shard in range(2):
        with tarfile.open(folder / f"{shard:08}.tar", "w") as tar:
            for row in range(3):
                uids.append(f"{(7 * shard + row) * 2**64 + 5 - row:032x}")
                members = {
                    "png": picture(COLORS[3 * shard + row]),
                    "txt": b"number 1",
                    "json": json.dumps({"uid": uids[-1]}).encode(),
                }
                for ending, data in members.items():
                    member = tarfile.TarInfo(f"{row:08}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    flags = ("--threshold", -1, "--save-path", tmp_path / "kept.npy")
    assert command("score", folder, *flags) == 2
    assert "'00000000' is not a uid" in capsys.readouterr().err
    assert command("score", folder, *flags, "--uid-key", "id") == 2
    assert "no 'id' for --uid-key" in capsys.readouterr().err
    assert command("score", folder, *flags, "--uid-key", "uid") == 0
    kept = np.load(tmp_path / "kept.npy")
    assert kept.dtype == np.dtype("u8,u8")
    assert [f"{high:016x}{low:016x}" for high, low in kept.tolist()] == sorted(uids)
    assert command("score", folder, "--threshold", -1, "--save-path", tmp_path / "kept.txt") == 2
    assert "2 samples have the key '00000000'" in capsys.readouterr().err


def test_duplicates_become_labels_for_training(command, run, pictures, tmp_path, capsys):
    out, kept = tmp_path / "groups.csv", tmp_path / "kept.txt"
    flags = ("--threshold", 0.99999, "--out", out, "--save-path", kept)
    assert command("duplicates", pictures, *flags) == 0
    model = neuclip.load(run, arch=VIT, device="cpu", batch_size=4, workers=0)
    features = model.embed_images(str(pictures)).double()
    near = features @ features.T >= 0.99999
    expected = list(range(11))  # the naive transitive closure
    for _ in range(11):
        expected = [min(expected[c] for c in range(11) if near[r, c]) for r in range(11)]
    rows = rows_of(out)
    assert [int(row["group"]) for row in rows] == expected
    assert expected[7] == expected[0] and expected[8] == expected[1]
    assert float(rows[7]["similarity"]) == pytest.approx(1, abs=1e-4)
    assert kept.read_text().split() == [f"{r:03}" for r in range(11) if expected[r] == r]
    source = open_source(str(out), label_reading())
    labels = [source.texts(position).annotations.label for position in range(len(source))]
    assert labels == [str(group) for group in expected]
    assert source.read(0).image.size == (8, 8)
    assert "images in groups" in capsys.readouterr().out


def label_reading():
    from neuclip.config.data_sections import ReadingConfig

    return ReadingConfig(label_key="group", csv_separator=",")


def test_images_of_one_name_are_told_apart(command, pictures, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    flags = ("--classes", tmp_path / "names.txt", "--out", tmp_path / "out.csv")
    (pictures / "000.bmp").write_bytes((pictures / "001.png").read_bytes())
    assert command("classify", pictures, *flags) == 0
    keys = [row["key"] for row in rows_of(tmp_path / "out.csv")]
    assert keys[:3] == ["000.bmp", "000.png", "001"] and len(set(keys)) == 12
    assert "repeat a key" not in capsys.readouterr().err
    assert command("embed", pictures, "--out", tmp_path / "out") == 0
    assert list(StoredImages.open(EmbeddingStore.open(tmp_path / "out")).keys) == keys
    other = tmp_path / "other"
    other.mkdir()
    (other / "001.png").write_bytes((pictures / "001.png").read_bytes())
    capsys.readouterr()
    assert command("classify", f"{pictures}::{other}", *flags) == 0
    assert "1 image of other shards, tables or folders repeat a key" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "out.csv")) == 13


@pytest.mark.parametrize(
    ("name", "flags", "model", "message"),
    [
        ("score", (), False, "name the model to embed data with"),
        ("score", ("--fraction", 0), True, "--fraction"),
        ("score", ("--fraction", 0.5), True, "give both, or neither"),
        ("score", ("--save-path", "a.npy"), True, "give both, or neither"),
        ("score", ("--fraction", 0.5, "--threshold", 0, "--save-path", "a.txt"), True, "give one"),
        ("score", ("--fraction", 0.5, "--save-path", "a.json"), True, ".txt writes the kept keys"),
        ("score", ("--uid-key", "uid"), True, "no effect without --save-path"),
        ("duplicates", ("--threshold", 0), True, "--threshold"),
        ("embed", ("--out", "out", "--shard-samples", 0), True, "--shard-samples"),
        ("duplicates", ("--out", "."), True, "--out . is a folder"),
        (
            "duplicates",
            ("--out", "a.txt", "--save-path", "./a.txt"),
            True,
            "--save-path a.txt would replace the file of --out",
        ),
    ],
)
def test_flags_that_do_not_fit(command, pictures, capsys, name, flags, model, message):
    assert command(name, pictures, *flags, model=model) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_embeddings_takes_no_model(command, pictures, tmp_path, capsys):
    assert command("embed", pictures, "--out", tmp_path / "out") == 0
    assert command("score", tmp_path / "out") == 2
    assert "--run is for data that are embedded now" in capsys.readouterr().err
    for flags in (("--caption-key", "text"), ("--no-ema",), ("--epoch", 3)):
        assert command("score", tmp_path / "out", *flags, model=False) == 2
        assert f"{flags[0]} is for data that are embedded now" in capsys.readouterr().err
    assert command("score", tmp_path / "out", model=False) == 2
    assert "embed again with --enable-text" in capsys.readouterr().err
