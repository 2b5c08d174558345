import hashlib
import io
import json
import os
import resource
import shutil
import tarfile
import time
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from neuclip.data.demo.build import build_demo, tiny_demo
from neuclip.data.demo.fonts import Face, Glyph, draw_face, find_faces, names_by_shared_image
from neuclip.data.demo.splits import CAPTIONS, SPLITS, UNSEEN_FACES
from neuclip.data.shard_writer import write_shards
from neuclip.data.sources.shards import build_index, expand_patterns
from neuclip.errors import UserError

CHARACTERS = ("unseen_character_development", "unseen_character_test")
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture(scope="module")
def faces():
    return {face.name: face for face in find_faces()}


@pytest.fixture(scope="module")
def five_faces_dir(tmp_path_factory, faces):
    """The demo data of all characters of the two unseen faces and three of different styles."""
    names = (*UNSEEN_FACES.values(), "DejaVu Sans Mono", "STIXGeneral", "STIXGeneral Italic")
    out = tmp_path_factory.mktemp("five") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "neuclip.data.demo.build.find_faces", lambda fonts: tuple(faces[name] for name in names)
        )
        build_demo(out)
    yield out
    shutil.rmtree(out)


def read_split(folder):
    """All samples of a split as dicts of what their members hold."""
    samples = []
    for shard in expand_patterns(str(folder)):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                content = tar.extractfile(member).read()
                if not samples or samples[-1]["key"] != key:
                    samples.append({"key": key})
                samples[-1][extension] = content
    for sample in samples:
        sample["json"] = json.loads(sample["json"])
        sample["name"] = sample["json"]["name"]
    return samples


def digests(folder):
    paths = sorted(
        path for path in folder.rglob("*") if path.is_file() and ".neuclip" not in str(path)
    )
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


# --- faces and glyphs


def test_the_embedded_faces(faces):
    assert len(faces) == 16
    styles = {name: face.style for name, face in faces.items()}
    assert styles["DejaVu Sans"] == "regular sans"
    assert styles["DejaVu Serif Bold"] == "bold serif"
    assert styles["DejaVu Sans Mono Bold Oblique"] == "bold oblique monospaced sans"
    assert styles["DejaVu Serif Italic"] == "italic serif"
    assert styles["STIXGeneral Bold Italic"] == "bold italic serif"
    assert not any("Display" in name or "LastResort" in name for name in faces)


def test_names_are_unicode_names(faces):
    names = faces["DejaVu Sans"].names
    assert names[0x41] == "latin capital letter a"
    assert names[0x391] == "greek capital letter alpha"
    assert 0x0A not in names  # a control character
    assert not any(0xE000 <= codepoint <= 0xF8FF for codepoint in names)  # private use


@pytest.mark.parametrize("size", [16, 32, 61])
@pytest.mark.parametrize("name", ["DejaVu Sans Bold Oblique", "STIXGeneral Italic"])
def test_every_glyph_is_complete_and_visible(faces, name, size):
    glyphs = list(draw_face(faces[name], size))
    assert len(glyphs) > 1000
    for glyph in glyphs:
        picture = Image.open(io.BytesIO(glyph.png))
        assert (picture.size, picture.mode) == ((size, size), "L")
        left, top, right, bottom = ImageOps.invert(picture).getbbox()
        assert 1 <= left < right <= size - 1
        assert 1 <= top < bottom <= size - 1


def test_height_and_side_tell_characters_apart(faces):
    names = {name: code for code, name in faces["DejaVu Sans"].names.items()}
    wanted = ["comma", "apostrophe", "low line", "macron", "left half block", "right half block"]
    glyphs = list(draw_face(faces["DejaVu Sans"], 32, {names[name] for name in wanted}))
    assert len({glyph.png for glyph in glyphs}) == len(wanted)


def test_characters_without_ink_are_left_out(faces):
    assert list(draw_face(faces["DejaVu Sans"], 32, {0x20, 0xA0, 0x2003})) == []


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=20))
def test_groups_of_names_share_no_image_and_cannot_be_split(pairs):
    face = Face("F", "F", "regular sans", Path("f.ttf"), "0", {n: f"name {n}" for n in range(13)})
    glyphs = [Glyph(face, name, bytes([picture])) for name, picture in pairs]
    groups = names_by_shared_image(glyphs)
    assert sorted(name for group in groups for name in group) == sorted(
        {glyph.name for glyph in glyphs}
    )
    shown = [{g.png for g in glyphs if g.name in group} for group in groups]
    for i, pictures in enumerate(shown):
        assert not any(pictures & other for other in shown[:i])
    for group in groups:  # grown from any one name, step by step, nothing is missing or too much
        reached = {group[0]}
        while True:
            pictures = {g.png for g in glyphs if g.name in reached}
            larger = {g.name for g in glyphs if g.png in pictures}
            if larger == reached:
                break
            reached = larger
        assert reached == set(group)


# --- the data set


def test_the_same_seed_gives_the_same_bytes(demo_dir, tmp_path):
    tiny_demo(tmp_path / "again", characters=64, seed=0)
    assert digests(tmp_path / "again") == digests(demo_dir)
    tiny_demo(tmp_path / "other", characters=64, seed=1)
    assert digests(tmp_path / "other") != digests(demo_dir)


def test_splits_keep_their_promises(demo_dir):
    splits = {split: read_split(demo_dir / split) for split in SPLITS}
    assert min(map(len, splits.values())) > 50
    train, *parts = (splits[name] for name in ("train", *CHARACTERS))
    for part, face in UNSEEN_FACES.items():
        assert {s["json"]["face"] for s in splits[f"unseen_face_{part}"]} == {face}
    for samples in (train, *parts):
        assert not {s["json"]["face"] for s in samples} & set(UNSEEN_FACES.values())
    for one, other in combinations((train, *parts), 2):
        assert not {s["name"] for s in one} & {s["name"] for s in other}
        assert not {s["png"] for s in one} & {s["png"] for s in other}
    in_train = {s["png"] for s in train}
    for split in SPLITS[1:]:
        for sample in splits[split]:
            assert sample["json"]["picture_in_train"] == (sample["png"] in in_train)


@pytest.mark.parametrize("characters", [8, 24])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_few_characters_fill_every_split(tmp_path, characters, seed):
    summary = tiny_demo(tmp_path / "demo", characters=characters, seed=seed)
    assert list(summary.pairs) == list(SPLITS) and min(summary.pairs.values()) > 0
    assert {summary.classes[split] for split in CHARACTERS} == {characters // 8}


def test_samples_say_what_they_show(demo_dir, faces):
    for split in SPLITS:
        for position, sample in enumerate(read_split(demo_dir / split)):
            record, caption = sample["json"], sample["txt"].decode()
            assert sample["key"] == record["key"] == f"{position:08d}"
            face = faces[record["face"]]
            codepoint = int(record["codepoint"].removeprefix("U+"), 16)
            assert face.names[codepoint] == record["name"]
            assert face.style == record["style"]
            wordings = {c.format(c=record["name"], style=face.style) for c in CAPTIONS}
            assert caption in wordings
            assert sample["png"] == next(draw_face(face, 32, {codepoint})).png


def test_captions_use_every_wording(demo_dir):
    ends = defaultdict(int)
    for sample in read_split(demo_dir / "train"):
        record = sample["json"]
        ends[
            sample["txt"]
            .decode()
            .replace(record["name"], "{c}")
            .replace(record["style"], "{style}")
        ] += 1
    assert set(ends) == set(CAPTIONS)
    assert min(ends.values()) > sum(ends.values()) / 8


@pytest.mark.parametrize("split", SPLITS[1:])
def test_classes_and_prompts_of_evaluation_splits(demo_dir, split):
    names = (demo_dir / split / "classnames.txt").read_text("utf-8").splitlines()
    templates = (
        (demo_dir / split / "zeroshot_classification_templates.txt").read_text().splitlines()
    )
    assert len(set(names)) == len(names)
    assert all("{c}" in template and "{style}" not in template for template in templates)
    samples = read_split(demo_dir / split)
    assert {s["name"] for s in samples} == set(names)
    assert all(names[int(s["cls"])] == s["name"] for s in samples)
    index = build_index(expand_patterns(str(demo_dir / split)))
    assert names[index.read(3).class_index] == samples[3]["name"]
    styles = {s["json"]["style"] for s in samples}
    assert all(any(style in template for style in styles) for template in templates)


def test_training_shards_have_no_classes_and_integer_keys(demo_dir):
    train = read_split(demo_dir / "train")
    assert all("cls" not in sample for sample in train)
    index = build_index(expand_patterns(str(demo_dir / "train")), data_size=len(train))
    assert [index.sample_id(n) for n in range(len(index))] == list(range(len(train)))


@pytest.mark.slow
def test_data_of_all_characters(five_faces_dir, faces):
    assert sum(len(face.names) for face in faces.values()) > 54_000  # a few have no ink
    counts = json.loads((five_faces_dir / "demo.json").read_text())["splits"]
    splits = {split: read_split(five_faces_dir / split) for split in SPLITS}
    assert sum(map(len, splits.values())) >= 10_900
    names = {split: {s["name"] for s in samples} for split, samples in splits.items()}
    assert len(names["unseen_face_test"]) == len(splits["unseen_face_test"]) == 3339
    assert len(names["unseen_face_development"]) == len(splits["unseen_face_development"]) == 3343
    assert [len(names[split]) for split in CHARACTERS] == [600, 600]
    # No picture of an unseen character is in train or in the other split, under whatever name.
    pictures = {split: {s["png"] for s in samples} for split, samples in splits.items()}
    for one, other in combinations(("train", *CHARACTERS), 2):
        assert not names[one] & names[other]
        assert not pictures[one] & pictures[other]
    for split, samples in splits.items():
        assert counts[split]["pairs"] == len(samples)
        assert counts[split]["classes"] == len(names[split])
        assert counts[split]["names_not_in_train"] == len(names[split] - names["train"])
        known = sum(s["png"] in pictures["train"] for s in samples)
        assert counts[split]["pictures_in_train"] == known
    floors = {split: facts.get("floor_top1") for split, facts in counts.items()}
    assert floors.pop("train") is None
    assert all(0.1 < floors.pop(f"unseen_face_{part}") < 1 for part in ("development", "test"))
    assert set(floors.values()) == {None}  # no training picture shows their names
    # Latin A and Greek Alpha share a picture: they are on the same side.
    pair = {"latin capital letter a", "greek capital letter alpha"}
    assert sum(pair <= names[split] for split in ("train", *CHARACTERS)) == 1
    by_name = {s["name"]: s["png"] for s in splits["unseen_face_test"]}
    assert len({by_name[name] for name in pair}) == 1


# --- what is there already


def test_a_complete_set_is_reused(tmp_path):
    first = tiny_demo(tmp_path / "demo", characters=8)
    before = digests(tmp_path / "demo")
    again = tiny_demo(tmp_path / "demo", characters=8)
    assert (first.reused, again.reused) == (False, True)
    assert (again.pairs, again.classes, again.faces) == (first.pairs, first.classes, first.faces)
    assert "reused" in str(again)
    assert digests(tmp_path / "demo") == before


def test_other_settings_need_overwrite(tmp_path):
    tiny_demo(tmp_path / "demo", characters=8)
    with pytest.raises(UserError, match=r"seed 0 \(now: 3\)"):
        tiny_demo(tmp_path / "demo", characters=8, seed=3)
    assert not tiny_demo(tmp_path / "demo", characters=8, seed=3, overwrite=True).reused
    assert tiny_demo(tmp_path / "demo", characters=8, seed=3).reused
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_data_of_an_older_format_need_overwrite(tmp_path):
    tiny_demo(tmp_path / "demo", characters=8)
    description = tmp_path / "demo" / "demo.json"
    old = json.loads(description.read_text())
    old["settings"]["format"] = 1
    description.write_text(json.dumps(old))
    with pytest.raises(
        UserError, match=r"format 1 \(now: 2\)\. Choose another folder, or remove .*--overwrite"
    ):
        tiny_demo(tmp_path / "demo", characters=8)
    assert not tiny_demo(tmp_path / "demo", characters=8, overwrite=True).reused


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_demo_set_is_never_touched(tmp_path, overwrite):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("mine", "file"):
        with pytest.raises(UserError, match="is not demo data"):
            tiny_demo(tmp_path / name, characters=8, overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("content", ["", "[]", '{"settings": {}}'])
def test_a_strange_description_is_named(tmp_path, content):
    (tmp_path / "demo.json").write_text(content)
    with pytest.raises(UserError, match=r"demo\.json is invalid"):
        tiny_demo(tmp_path, characters=8)


def test_incomplete_data_are_not_reused(tmp_path):
    tiny_demo(tmp_path / "demo", characters=8)
    (tmp_path / "demo" / "train" / "00000.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"incomplete: .*train/00000\.tar .*remove the folder"):
        tiny_demo(tmp_path / "demo", characters=8)
    tiny_demo(tmp_path / "demo", characters=8, overwrite=True)
    assert tiny_demo(tmp_path / "demo", characters=8).reused


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    written = []

    def interrupt_the_second(folder, *rest):
        if written:
            raise KeyboardInterrupt
        written.append(folder)
        return write_shards(folder, *rest)

    monkeypatch.setattr("neuclip.data.demo.build.write_shards", interrupt_the_second)
    with pytest.raises(KeyboardInterrupt):
        tiny_demo(tmp_path / "demo", characters=8)
    assert written
    assert list(tmp_path.iterdir()) == []


def test_a_build_reports_progress(tmp_path, monkeypatch, faces):
    few = [faces[name] for name in (*UNSEEN_FACES.values(), "STIXGeneral Italic")]
    monkeypatch.setattr("neuclip.data.demo.build.find_faces", lambda fonts: tuple(few))
    said = []
    build_demo(tmp_path / "demo", size=16, progress=lambda *step: said.append(step))
    assert [what for what, _, _ in said] == [
        *(f"drawing {face.name}" for face in few),
        "comparing outlines",
        *(f"writing {split}" for split in SPLITS),
    ]
    assert all(0 <= done <= total for _, done, total in said)


def test_leftovers_of_a_killed_build_are_removed(tmp_path):
    old, recent = tmp_path / ".demo.partial-1", tmp_path / ".demo.partial-2"
    for folder in (old, recent):
        (folder / "new").mkdir(parents=True)
    for folder in (old / "new", old):
        os.utime(folder, (time.time() - 3600,) * 2)
    tiny_demo(tmp_path / "demo", characters=8)
    assert not old.exists()
    assert recent.exists()


# --- what users get wrong


def test_image_size_too_small(tmp_path):
    with pytest.raises(UserError, match="at least 16 pixels"):
        build_demo(tmp_path / "demo", size=8)


def test_font_folders_of_no_use(tmp_path):
    with pytest.raises(UserError, match=r"no such folder: .*none"):
        build_demo(tmp_path / "demo", fonts=[tmp_path / "none"])
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    shutil.copy(FONTS / "cmex10.ttf", tmp_path / "empty.otf.txt")
    with pytest.raises(UserError, match="no usable face in"):
        find_faces([tmp_path])


def test_more_fonts(tmp_path, faces):
    (tmp_path / "deep").mkdir()
    shutil.copy(FONTS / "DejaVuSansDisplay.ttf", tmp_path / "deep" / "renamed.TTF")
    shutil.copy(FONTS / "DejaVuSerif-Bold.ttf", tmp_path / "copy-of-the-unseen-face.ttf")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    found = {face.name for face in find_faces([tmp_path])}
    assert found - set(faces) == {"DejaVu Sans Display Display"}


@pytest.mark.parametrize("missing", UNSEEN_FACES.values())
def test_matplotlib_without_an_unseen_face(tmp_path, monkeypatch, faces, missing):
    others = tuple(face for name, face in faces.items() if name != missing)
    monkeypatch.setattr("neuclip.data.demo.build.find_faces", lambda fonts: others)
    with pytest.raises(UserError, match=f"the face {missing} is missing"):
        build_demo(tmp_path / "demo")


def test_nowhere_to_write(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"cannot write the demo data to .*/demo: File exists: .*/file$"
    ):
        tiny_demo(tmp_path / "file" / "demo", characters=8)


def test_no_right_to_write(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot write .*: Permission denied"):
        tiny_demo(tmp_path / "demo", characters=8)


def test_no_space_to_write(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .* \(about \d+ MB are needed\)"):
            tiny_demo(tmp_path / "demo", characters=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
