"""`--val-data` in all forms: sets of clip-benchmark as they lie on disk, tables, folders."""

import io
import json

import pytest
import torch
from PIL import Image

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.shard_writer import write_shards
from neuclip.errors import UserError
from neuclip.evaluation.evaluate import evaluate
from neuclip.evaluation.interfaces import EvaluatedModel, EvaluationSettings
from neuclip.evaluation.splits import open_split, open_splits, split_names

NAMES = ["red", "green", "blue"]
COLORS = [(250, 5, 5), (5, 250, 5), (5, 5, 250)]
CAPTIONS = [[f"a {name} square", f"the picture of {name}", f"{name}"] for name in NAMES * 2]
SETTINGS = EvaluationSettings(batch_size=4, workers=0)


def picture(number):
    """The picture of a sample; no two are equal."""
    red, green, blue = COLORS[number % 3]
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (red, green, blue - number)).save(buffer, "PNG")
    return buffer.getvalue()


def make(folder, *, cls=False, txt=None, names=True, templates=("a {c}",), kind=None, test=False):
    """A set of six samples in two shards."""

    def samples():
        for number in range(6):
            parts = {"png": picture(number)}
            parts |= {"cls": str(number % 3).encode()} if cls else {}
            parts |= {"txt": "\n".join(txt[number]).encode()} if txt else {}
            yield f"s{number}", parts

    shards = folder / "test" if test else folder
    shards.parent.mkdir(exist_ok=True)
    write_shards(shards, samples(), 3)
    if names:
        (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    if names and templates:
        text = "\n".join(templates) + "\n"
        (folder / "zeroshot_classification_templates.txt").write_text(text)
    if kind:
        (folder / "dataset_type.txt").write_text(kind)
    return folder


def metrics_of(encoder, split):
    return evaluate(EvaluatedModel(encoder), split, SETTINGS).metrics


ONE = [captions[:1] for captions in CAPTIONS]


@pytest.mark.parametrize(
    ("form", "published"),
    [
        ({"cls": True, "test": True}, True),
        ({"cls": True}, False),
        ({"cls": True, "txt": ONE}, False),
        ({"cls": True, "txt": ONE, "test": True, "kind": "classification"}, True),
        ({"cls": True, "templates": ("a {}",)}, False),
    ],
)
def test_classes(encoder, tmp_path, form, published):
    split = open_split(make(tmp_path / "wds_colors", **form))
    assert (split.name, split.classnames, split.templates) == ("wds_colors", NAMES, ["a {c}"])
    assert split.published == published
    metrics = metrics_of(encoder, split)
    assert metrics["num_samples"] == 6
    assert metrics["main_metric"] == metrics["acc1"]
    assert ("mean_recall@1" in metrics) == ("txt" in form)


def naive_recall_at_1(encoder, captions):
    """Recall@1 in both directions, as clip-benchmark defines it."""
    pictures = [Image.open(io.BytesIO(picture(number))).convert("RGB") for number in range(6)]
    images = encoder.encode_image(torch.stack([encoder.transform(image) for image in pictures]))
    owner = [number for number, own in enumerate(captions) for _ in own]
    texts = encoder.encode_text(encoder.tokenize([text for own in captions for text in own]))
    scores = texts @ images.T
    of_texts = [owner[i] == int(best) for i, best in enumerate(scores.argmax(1))]
    of_images = [owner[int(best)] == i for i, best in enumerate(scores.argmax(0))]
    return sum(of_texts) / len(of_texts), sum(of_images) / len(of_images)


@pytest.mark.parametrize("test", [True, False])
def test_several_captions_a_line_each(encoder, tmp_path, test):
    captions = [[f"{text} {number}" for text in own] for number, own in enumerate(CAPTIONS)]
    folder = make(tmp_path / "coco", txt=captions, names=False, kind="retrieval\n", test=test)
    metrics = metrics_of(encoder, open_split(folder))
    expected = naive_recall_at_1(encoder, captions)
    found = metrics["image_retrieval_recall@1"], metrics["text_retrieval_recall@1"]
    assert found == pytest.approx(expected)
    assert 0 < expected[0] < 1
    assert (metrics["num_samples"], metrics["num_captions"]) == (6, 18)


def test_lines_that_are_not_declared_as_captions(encoder, tmp_path, log):
    metrics = metrics_of(encoder, open_split(make(tmp_path / "s", txt=CAPTIONS, names=False)))
    assert "num_captions" not in metrics
    assert "6 of 6 captions have several lines" in log.text
    assert "write `retrieval` to dataset_type.txt" in log.text


def test_several_captions_in_a_table(encoder, tmp_path):
    rows = [{"image": f"{n}.png", "captions": own} for n, own in enumerate(CAPTIONS)]
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    table = tmp_path / "pairs.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    metrics = metrics_of(encoder, open_split(table))
    assert (metrics["num_samples"], metrics["num_captions"]) == (6, 18)


@pytest.mark.parametrize("given", ["one.tar", "{one,one}.tar", "pairs.csv", "pictures", ""])
def test_what_training_reads(encoder, tmp_path, given):
    make(tmp_path / "s", txt=ONE, names=False)
    (tmp_path / "s" / "00000.tar").rename(tmp_path / "one.tar")
    (tmp_path / "pictures").mkdir()
    lines = ["path\ttext"]
    for number, (caption,) in enumerate(ONE):
        image = tmp_path / "pictures" / f"{number}.png"
        image.write_bytes(picture(number))
        image.with_suffix(".txt").write_text(caption)
        lines.append(f"{image}\t{caption}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    reading = ReadingConfig(csv_img_key="path", csv_caption_key="text")
    split = open_split(tmp_path / (given or "s"), reading=reading)
    assert len(split.index) == {"pairs.csv": 6, "pictures": 6}.get(given, 3 + 3 * ("{" in given))
    assert "mean_recall@1" in metrics_of(encoder, split)


@pytest.mark.parametrize("below", ["", "test"])
def test_a_folder_per_class(encoder, tmp_path, below):
    for number in range(6):
        folder = tmp_path / below / f"dark_{NAMES[number % 3]}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(picture(number))
    split = open_split(tmp_path)
    assert split.classnames == ["dark blue", "dark green", "dark red"]
    assert split.templates == ["a photo of a {c}."]
    assert metrics_of(encoder, split)["num_samples"] == 6
    (tmp_path / "classnames.txt").write_text("sea\nleaf\nfire\n")
    assert open_split(tmp_path).classnames == ["sea", "leaf", "fire"]
    (tmp_path / "classnames.txt").write_text("sea\nleaf\n")
    with pytest.raises(UserError, match="3 folders of classes, but 2 class names"):
        open_split(tmp_path)


@pytest.mark.parametrize("names", [["0", "1", "10"], ["n01440764", "n01443537"]])
def test_folders_whose_names_are_no_names(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture(0))
    with pytest.raises(UserError, match=r"is not a name for a prompt: write the names, .*names\."):
        open_split(tmp_path)
    (tmp_path / "classnames.txt").write_text("\n".join(NAMES[: len(names)]))
    index = open_split(tmp_path).index
    assert [index.read(position).class_index for position in range(len(index))] == [
        *range(len(names))
    ]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ({"cls": True, "names": False}, "neither captions nor class names: .* needs classnames"),
        ({"cls": True, "kind": "multilabel"}, "multilabel is not supported"),
    ],
)
def test_sets_that_cannot_be_evaluated(tmp_path, form, text):
    with pytest.raises(UserError, match=text):
        open_split(make(tmp_path / "s", **form))


def test_all_problems_are_named_at_once(tmp_path):
    make(tmp_path / "good", cls=True)
    make(tmp_path / "bad", cls=True, names=False)
    with pytest.raises(UserError) as caught:
        open_splits(f"{tmp_path}/nowhere::{tmp_path}/good::{tmp_path}/bad")
    message = str(caught.value)
    assert f"{tmp_path}/nowhere: no such file or folder" in message
    assert "neither captions nor class names" in message


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        (["/d/faces"], ["faces"]),
        (["/d/cc3m/val", "/d/coco/val"], ["cc3m/val", "coco/val"]),
        (["/d/val"], ["d/val"]),
        (["/a/x/wds", "/b/x/wds", "/c/wds"], ["a/x/wds", "b/x/wds", "c/wds"]),
        (["/d/cc3m/{0..3}.tar", "/d/x.csv"], ["cc3m", "x.csv"]),
        (["/d/one.tar", "http://host/coco/{0..3}.tar"], ["d", "coco"]),
        (["/d/x", "/d/x"], ["d/x", "d/x#2"]),
    ],
)
def test_names_are_unique(parts, names):
    assert split_names(parts) == names


def test_the_same_data_are_the_same_wherever_they_lie(encoder, tmp_path):
    def read(folder):
        return evaluate(EvaluatedModel(encoder), open_split(folder), SETTINGS).data

    first = read(make(tmp_path / "a", cls=True, txt=ONE))
    assert first.samples == 6
    assert read(make(tmp_path / "b", cls=True, txt=ONE)) == first
    other_captions = [["other"], *ONE[1:]]
    assert read(make(tmp_path / "c", cls=True, txt=other_captions)) != first
    assert read(make(tmp_path / "d", cls=True, txt=ONE, templates=("{c}",))) != first
