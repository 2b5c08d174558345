"""Which members of a tar file become samples, and that the others are counted."""

import random
import tarfile

import pytest

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.captions import CaptionRule
from neuclip.data.opening import open_source
from neuclip.data.sources.shards import build_index
from neuclip.errors import UserError


@pytest.fixture
def opened(tmp_path, write_tar, picture):
    """Opens a shard of members named; an image's number and a text are functions of the name."""

    def build(names, captions=None):
        members = [
            (name, name.encode() if name.endswith(("txt", "TXT", "caption")) else picture(number))
            for number, name in enumerate(names)
        ]
        shard = write_tar(tmp_path / "0.tar", members, tarfile.PAX_FORMAT)
        index = build_index([shard], captions=captions)
        again = build_index([shard], captions=captions)  # from the saved index
        assert (again.opened, again.unused) == (index.opened, index.unused)
        assert [again.locate(n) for n in range(len(again))] == [
            index.locate(n) for n in range(len(index))
        ]
        return index

    return build


def content(index):
    """Key and caption of each sample, which must be whole."""
    samples = [index.read(position) for position in range(len(index))]
    return {sample.key: sample.caption for sample in samples}


def pairs_of(keys, image="jpg", text="txt"):
    return [f"{key}.{ending}" for key in keys for ending in (image, text)]


@pytest.mark.parametrize(
    "keys",
    [
        ["photo v2.0", "photo 1", "photo v2.2"],
        ["a.b.c", "a.b.d", "a.b"],
        ["./1.5 mm", "./1.0 mm"],
        ["x.jpg", "y.jpg"],  # the captions are named after the whole image file
        ["2021.01.01/img.0.v1", "2021.01.01/img.1.v1"],
    ],
)
def test_keys_may_have_dots(opened, keys):
    index = opened(pairs_of(keys))
    assert content(index) == {key: f"{key}.txt" for key in keys}
    assert index.unused == () and index.damage == ()
    assert [index.locate(n)[1] for n in range(len(index))] == keys  # in the order of the shard


def test_long_keys_may_have_dots(opened):
    keys = [f"{'folder/' * 40}photo v2.{n}" for n in range(3)]
    index = opened([*pairs_of(keys[:2]), "7.jpg", "7.txt", *pairs_of(keys[2:])])
    assert [*content(index)] == [*keys[:2], "7", keys[2]]


def test_an_unknown_ending_beside_a_sample_is_counted(opened):
    index = opened([name for n in range(9) for name in (f"{n}.jpg", f"{n}.seg.png", f"{n}.txt")])
    assert content(index) == {str(n): f"{n}.txt" for n in range(9)}
    assert index.unused == ("9 of 27 members, unknown ending (.seg.png)",)


def test_a_second_ending_that_all_keys_share(opened):
    index = opened(pairs_of("abc", "input.jpg", "outputs.txt"))
    assert content(index) == {key: f"{key}.outputs.txt" for key in "abc"}
    assert "keys of members end before .input.jpg, .outputs.txt" in index.opened


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["photo v2.3.jpg"], "1 of 3 members, unknown ending (.3.jpg)"),
        (["photo.1.jpg", "photo.2.txt"], "2 of 4 members, unknown ending (.1.jpg, .2.txt)"),
        (["b.flac", "c.flac", "LICENSE"], "3 of 5 members, unknown ending (.flac, no ending)"),
        (["b.tar.gz"], "1 of 3 members, unknown ending (.tar.gz)"),
        (["._a.jpg", ".DS_Store"], "2 of 4 members, hidden, or of macOS (._a.jpg, .DS_Store)"),
        (["__MACOSX/a.jpg"], "1 of 3 members, hidden, or of macOS (__MACOSX/a.jpg)"),
        (["x/.git/b.jpg"], "1 of 3 members, hidden, or of macOS (x/.git/b.jpg)"),
        (["stats.json"], "1 of 3 members, without the rest of a sample (.json)"),
        (["b.cls"], "1 of 3 members, without the rest of a sample (.cls)"),
        (["a.json", "b.json"], "1 of 4 members, without the rest of a sample (.json)"),
    ],
)
def test_what_is_not_read_is_counted_by_reason(opened, names, line):
    index = opened(["a.jpg", "a.txt", *names])
    assert content(index) == {"a": "a.txt"}
    assert index.unused == (line,)


def test_a_second_image_of_a_sample_is_counted(opened):
    index = opened(["a.jpg", "a.png", "a.txt", "b.webp", "b.txt", "b.caption"])
    assert content(index) == {"a": "a.txt", "b": "b.txt"}
    assert index.unused == ("2 of 6 members, second of its kind in a sample (.png, .caption)",)
    assert index.damage == ()


def test_many_examples_are_cut(opened):
    index = opened(["a.jpg", "a.txt", *(f"b.{n}x" for n in range(7))])
    assert index.unused == ("7 of 9 members, unknown ending (.0x, .1x, .2x, .3x, .4x, ...)",)


@pytest.mark.parametrize("dots", ["", ".5"])
def test_members_need_not_be_adjacent(opened, dots):
    keys = [f"{n}{dots}" for n in range(6)]
    in_order = content(opened(pairs_of(keys)))
    images, texts = [f"{key}.jpg" for key in keys], [f"{key}.txt" for key in keys]
    for names in (images + texts, texts + images, random.Random(0).sample(images + texts, 12)):
        index = opened(names)
        assert content(index) == in_order and index.damage == ()
        if not dots:
            assert "not adjacent" in index.opened and "webdataset" in index.opened


def test_a_key_that_comes_again_whole_is_a_duplicate_not_a_part(opened):
    """Two folders packed into one shard: an image must not get the caption of another."""
    index = opened(["a.jpg", "b.jpg", "b.txt", "a.jpg", "a.txt"])
    assert content(opened(["b.jpg", "b.txt"])) == {"b": "b.txt"}
    assert [damage.key for damage in index.damage if damage.kind == "duplicate_key"] == ["a"]
    assert index.opened == ""


def test_images_alone(opened):
    optional = CaptionRule(required=False)
    index = opened(["photo v2.1.jpg", "photo v2.2.jpg", "c.jpg", "c.seg.png"], optional)
    assert [*content(index)] == ["photo v2.1", "photo v2.2", "c"]
    assert not index.has_captions
    assert index.unused == ("1 of 4 members, unknown ending (.seg.png)",)


def test_classes_without_captions_are_named(opened):
    index = opened(["a.jpg", "a.cls", "b.jpg", "b.cls"])
    assert index.opened == "no captions, but classes (.cls)"


def test_a_shard_without_samples_names_what_it_holds(opened):
    with pytest.raises(UserError, match=r"no samples.*\n.*3 of 3 members, unknown ending \(\.flac"):
        opened(["a.flac", "b.flac", "c.flac"])


def test_the_endings_of_members_can_be_chosen(tmp_path, write_tar, picture):
    """open_clip's --image-key and --text-key; the saved index knows for which endings it is."""
    members = [(f"{key}.{end}", picture(1)) for key in "ab" for end in ("img", "jpg")]
    members += [(f"{key}.{end}", end.encode()) for key in "ab" for end in ("cap", "txt")]
    shard = write_tar(tmp_path / "0.tar", sorted(members), tarfile.PAX_FORMAT)

    def read(image_key=None, text_key=None):
        reading = ReadingConfig(image_key=image_key, text_key=text_key)
        return content(open_source(str(shard), reading))

    assert read() == {"a": "txt", "b": "txt"}
    assert read("img;jpeg", "cap") == {"a": "cap", "b": "cap"}
    assert read(text_key=".CAP") == {"a": "cap", "b": "cap"}
    assert read("jpg") == {"a": "txt", "b": "txt"}
    with pytest.raises(UserError, match="no samples in 1 shard"):
        read("png", "nothing")
    with pytest.raises(UserError, match="expected endings joined by ';'"):
        read("jpg;")
    with pytest.raises(UserError, match="--image-key img: the endings of members in local tar"):
        open_source("synthetic:4", ReadingConfig(image_key="img"))
