import os

import numpy as np
import pytest
import torch

from datacomp_sets import CodedTowers, picture
from neuclip.errors import UserError


def test_features_and_positions(pictures, embed, exact_features):
    found, seen = embed(pictures)
    assert seen == len(found) == 7 and not found.reused
    assert found.features[:].dtype == np.float16
    np.testing.assert_allclose(found.features[:], exact_features, atol=1e-3)
    np.testing.assert_allclose(found.features[2:5], exact_features[2:5], atol=1e-3)
    assert found.features[5:5].shape == (0, 64)
    assert found.positions.tolist() == list(range(7))
    assert [found.row_of(place) for place in (0, 6, 7)] == [0, 6, None]


def test_damaged_pictures_are_counted_and_left_out(pictures, embed, exact_features):
    (pictures / "2.png").write_bytes(b"no picture")
    (pictures / "5.txt").unlink()
    found, _ = embed(pictures)
    assert (found.damaged, found.damage) == (2, "1 image, 1 caption_missing")
    assert found.positions.tolist() == [0, 1, 3, 4, 6]
    np.testing.assert_allclose(found.features[:5], exact_features[[0, 1, 3, 4, 6]], atol=1e-3)
    assert found.row_of(2) is None and found.row_of(3) == 2
    again, seen = embed(pictures)
    assert (again.damaged, again.damage, again.reused, seen) == (2, found.damage, True, 0)


def test_pictures_without_captions(pictures, embed, exact_features):
    for caption in pictures.glob("*.txt"):
        caption.unlink()
    found, _ = embed(pictures, captions="optional")
    assert (len(found), found.damaged) == (7, 0)
    np.testing.assert_allclose(found.features[:], exact_features, atol=1e-3)


def test_computed_once_for_a_checkpoint_and_data(pictures, embed):
    embed(pictures)
    assert embed(pictures)[1] == 0
    assert embed(pictures, checkpoint="d" * 64)[1] == 7
    assert embed(pictures)[1] == 0


@pytest.mark.parametrize("change", ["another picture", "same size, other time", "one more"])
def test_changed_data_are_embedded_again(pictures, embed, change):
    embed(pictures)
    first = pictures / "0.png"
    if change == "another picture":
        first.write_bytes(picture((20, 21, 22)))
    elif change == "one more":
        (pictures / "9.png").write_bytes(picture((20, 21, 22)))
        (pictures / "9.txt").write_text("one more")
    else:
        os.utime(first, ns=(1, 1))
    found, seen = embed(pictures)
    assert seen == len(found) == (8 if change == "one more" else 7)


def test_nothing_is_left_of_a_computation_that_failed(pictures, embed, tmp_path):
    class Diverged(CodedTowers):
        def encode_image(self, images):
            features = super().encode_image(images)
            return features * (torch.nan if self.images_seen > 4 else 1)

    with pytest.raises(UserError, match="not finite: the model has diverged"):
        embed(pictures, encoder=Diverged())
    assert list((tmp_path / "cache").iterdir()) == []
    assert embed(pictures)[1] == 7


def test_features_that_shrink_while_in_use(pictures, embed, tmp_path):
    found, _ = embed(pictures)
    (file,) = (tmp_path / "cache").glob("*/features.npy")
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(UserError, match="changed while in use"):
        found.features[:]
    assert len(found.features[:2]) == 2


def test_nothing_can_be_read(pictures, embed):
    for path in pictures.glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of 7 images could be read"):
        embed(pictures)


def test_no_place_for_the_features(pictures, embed, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="choose another folder with --embeddings"):
        embed(pictures)


def shape(rows, dim):
    def change(folder):
        np.save(folder / "features.npy", np.ones((rows, dim), np.float16))

    return change


def flip(name, place):
    def change(folder):
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 64
        (folder / name).write_bytes(content)

    return change


def replace_bytes(path, old, new):
    assert old in path.read_bytes() and len(old) == len(new)
    path.write_bytes(path.read_bytes().replace(old, new))


def pipe(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        shape(3, 64),
        lambda folder: np.save(folder / "features.npy", np.ones((7, 64))),
        lambda folder: np.save(folder / "features.npy", np.ones(7, np.float16)),
        lambda folder: np.save(folder / "positions.npy", np.arange(8)),
        lambda folder: np.save(folder / "positions.npy", np.arange(7)[::-1]),
        lambda folder: np.save(folder / "positions.npy", np.arange(7) - 1),
        lambda folder: np.save(folder / "positions.npy", np.array("x")),
        lambda folder: (folder / "positions.npy").unlink(),
        flip("positions.npy", 20),
        flip("features.npy", 8),
        flip("features.npy", 30),
        pipe("positions.npy"),
        pipe("features.npy"),
        pipe("damage.json"),
        lambda folder: replace_bytes(folder / "positions.npy", b"(7,)", b"(7, "),
        lambda folder: replace_bytes(folder / "features.npy", b"(7, 64)", b"(7, 64 "),
        write("damage.json", b"[]"),
        write("damage.json", b'{"total": "x", "summary": ""}'),
        write("damage.json", b"[" * 10**5),
        write("positions.npy", b""),
    ],
)
def test_features_that_somebody_has_changed_are_computed_again(
    pictures, embed, tmp_path, exact_features, change
):
    embed(pictures)
    (folder,) = (tmp_path / "cache").iterdir()
    change(folder)
    found, seen = embed(pictures)
    assert seen == 7 and not found.reused
    np.testing.assert_allclose(found.features[:], exact_features, atol=1e-3)
    assert embed(pictures)[0].reused
