"""Parts of equal size: which pairs they hold, and that a seed decides them."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from studies.quality import equal_size
from studies.quality.datasets import EQUAL_SIZE, GLYPHS, DataFolder
from studies.quality.equal_size import PICTURES, main, samples, write_part

from neuclip.data.shard_writer import write_shards
from neuclip.errors import UserError

NAMES = [f"letter {n}" for n in range(12)]


def _sample(name: str, number: int, **others: bytes) -> dict[str, bytes]:
    text = json.dumps({"name": name}).encode()
    return {"png": f"{name} {number}".encode(), "txt": b"words", "json": text, **others}


@pytest.fixture
def whole(tmp_path):
    """Glyphs of twelve names: ten have pictures enough, of which `letter 9` has nine."""
    folder = tmp_path / "whole"
    folder.mkdir()
    (folder / "demo.json").write_text("{}")
    counts = [PICTURES] * 9 + [9, 2, PICTURES - 1]
    pairs = [
        _sample(name, n) for name, count in zip(NAMES, counts, strict=True) for n in range(count)
    ]
    write_shards(folder / "train", ((f"{n:03d}", each) for n, each in enumerate(pairs)), 20)
    for split in (*GLYPHS.split_names("development"), *GLYPHS.split_names("test")):
        found = [_sample(name, 0, cls=str(n).encode()) for n, name in enumerate(NAMES)]
        write_shards(folder / split, ((f"{n:03d}", each) for n, each in enumerate(found)), 50)
        (folder / split / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    return DataFolder.open(GLYPHS, folder)


def test_as_many_classes_with_as_many_pictures(whole, tmp_path):
    write_part(whole, tmp_path / "part", classes=6)
    pairs = list(samples(tmp_path / "part" / "train"))
    counts = Counter(json.loads(each["json"])["name"] for each in pairs)
    assert set(counts.values()) == {PICTURES}
    assert len(counts) == 6
    assert counts.keys() <= set(NAMES[:10])
    assert len({each["png"] for each in pairs}) == len(pairs)
    labels = [json.loads(each["json"])["name"] for each in pairs]
    assert sum(a == b for a, b in pairwise(labels)) < len(pairs) / 2  # shuffled


def test_splits_of_trained_classes_keep_those_that_training_shows(whole, tmp_path):
    write_part(whole, tmp_path / "part", classes=6)
    trained = {json.loads(s["json"])["name"] for s in samples(tmp_path / "part" / "train")}
    for split, count in (("unseen_face_test", 6), ("unseen_character_test", 12)):
        folder = tmp_path / "part" / split
        names = (folder / "classnames.txt").read_text().splitlines()
        assert len(names) == count
        found = list(samples(folder))
        assert [names[int(s["cls"])] for s in found] == [
            json.loads(s["json"])["name"] for s in found
        ]
        assert (folder / "zeroshot_classification_templates.txt").read_text() == "{c}\n"
        assert (set(names) == trained) == (split == "unseen_face_test")


def test_the_seed_decides_the_part_and_its_description_every_byte(whole, tmp_path, monkeypatch):
    for name in ("one", "two"):
        write_part(whole, tmp_path / name, classes=6)
    monkeypatch.setattr(equal_size, "SEED", 1)
    write_part(whole, tmp_path / "other", classes=6)
    part = replace(EQUAL_SIZE["glyphs"], name="glyphs7")
    digests = {n: DataFolder.open(part, tmp_path / n).digest for n in ("one", "two", "other")}
    assert digests["one"] == digests["two"] != digests["other"]
    opened = DataFolder.open(part, tmp_path / "one")
    assert opened.pairs == 6 * PICTURES
    assert opened.floor("unseen_face_test") is None


def test_wrong_names_are_of_other_classes_in_training_alone(whole, tmp_path):
    for name, wrong in (("right", 0.0), ("wrong", 0.25)):
        write_part(whole, tmp_path / name, classes=8, wrong=wrong)
    right, found = (
        {each["png"]: json.loads(each["json"])["name"] for each in samples(tmp_path / n / "train")}
        for n in ("right", "wrong")
    )
    assert right.keys() == found.keys()
    assert sum(right[png] != found[png] for png in right) == 8 * PICTURES // 4
    assert set(found.values()) == set(right.values())
    for split in ("unseen_face_test", "unseen_character_development"):
        shards = [(tmp_path / n / split / "00000.tar").read_bytes() for n in ("right", "wrong")]
        assert shards[0] == shards[1]
    with pytest.raises(UserError, match=r"--wrong 1 must be a share below 1"):
        write_part(whole, tmp_path / "all", wrong=1.0)


def test_too_few_classes_and_a_folder_that_exists_are_refused(whole, tmp_path, capsys):
    with pytest.raises(UserError, match="10 classes have 7 pictures or more, and 11 are needed"):
        write_part(whole, tmp_path / "part", classes=11)
    assert not (tmp_path / "part").exists()
    assert main([str(whole.path), "--of", "glyphs", "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path} exists" in capsys.readouterr().err
