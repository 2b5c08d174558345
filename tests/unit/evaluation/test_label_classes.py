"""Labels as class names: `--label-key` in evaluation."""

import pytest
import torch
from PIL import Image

from neuclip.config.data_sections import DataConfig, ReadingConfig
from neuclip.config.run_config import RunConfig
from neuclip.config.sections import EvaluationConfig
from neuclip.data.opening import open_source
from neuclip.errors import UserError
from neuclip.evaluation.evaluate import evaluate
from neuclip.evaluation.held_out import hold_out
from neuclip.evaluation.interfaces import EvaluatedModel, EvaluationSettings
from neuclip.evaluation.own_splits import open_own_splits
from neuclip.evaluation.splits import open_split, with_templates
from neuclip.evaluation.zero_shot import class_vectors

READING = ReadingConfig(label_key="kind")
SETTINGS = EvaluationSettings(batch_size=3, workers=0)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table of small pictures with these labels, with or without captions."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(labels, *, captions=True, name="pairs.csv"):
        rows = ["file,caption,kind" if captions else "file,kind"]
        for number, label in enumerate(labels):
            color = (number * 23 % 256, 255 - number * 11, number * number % 256)
            Image.new("RGB", (8, 8), color).save(tmp_path / f"{number}.png")
            caption = f"caption {number}," if captions else ""
            rows.append(f"{number}.png,{caption}{label}")
        (tmp_path / name).write_text("\n".join(rows) + "\n")
        return tmp_path / name

    return write


@pytest.mark.parametrize("captions", [True, False])
def test_accuracy_is_that_of_a_double_loop(table, encoder, captions, log):
    log.set_level("INFO", "neuclip")
    labels = ["dog", "arctic_fox", "dog", "", "Cat", "cat ", "arctic fox", ""]
    split = open_split(table(labels, captions=captions), reading=READING)
    assert split.classnames == ["arctic fox", "Cat", "dog"]
    [split] = with_templates([split], "a {c}::one {c} more")
    metrics = evaluate(EvaluatedModel(encoder), split, SETTINGS).metrics
    vectors = class_vectors(encoder, split.classnames, split.templates, 4)
    right, known = 0, [label for label in labels if label]
    for number, label in enumerate(labels):
        if not label:
            continue
        image = encoder.transform(Image.open(table(labels).parent / f"{number}.png"))
        scores = [float(encoder.encode_image(image[None])[0] @ vector) for vector in vectors]
        own = ["arctic fox", "cat", "dog"].index(label.replace("_", " ").strip().lower())
        right += scores.index(max(scores)) == own
    assert metrics["acc1"] == pytest.approx(right / len(known))
    assert (metrics["num_classes"], metrics["num_unlabelled"]) == (3, 2)
    assert ("mean_recall@1" in metrics) is captions
    assert "3 classes by --label-key kind: arctic fox, Cat, dog; 6 samples" in log.text


def test_numbers_need_names_beside_the_data(table, log, tmp_path):
    path = table(["1", "0.0", "1", "2"])
    assert not open_split(path, reading=READING).classnames
    assert "the labels are numbers, such as 1, and a prompt needs names" in log.text
    (tmp_path / "classnames.txt").write_text("owl\nbat\nelk\nhen\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("an {c}\n")
    split = open_split(path, reading=READING)
    assert (split.classnames, split.templates) == (["owl", "bat", "elk", "hen"], ["an {c}"])
    assert [split.index.texts(place).class_index for place in range(4)] == [1, 0, 1, 2]
    (tmp_path / "classnames.txt").write_text("owl\nbat\n")
    with pytest.raises(UserError, match="label 2 has no name among 2 lines; label 0 is the first"):
        open_split(path, reading=READING)


def test_labels_must_be_among_names_beside_the_data(table, tmp_path):
    path = table(["owl", "BAT"])
    (tmp_path / "classnames.txt").write_text("bat\nelk\nowl\n")
    split = open_split(path, reading=READING)
    assert [split.index.texts(place).class_index for place in range(2)] == [2, 0]
    (tmp_path / "classnames.txt").write_text("bat\nowls\n")
    with pytest.raises(
        UserError, match="label 'owl' is not among the 2 names: did you mean 'owls'"
    ):
        open_split(path, reading=READING)


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (["x", "X", "x"], "every label is 'X'"),
        (["", "", ""], "no sample has a label"),
        (["n01440764", "n01443537"], "the labels are WordNet ids, such as n01440764"),
    ],
)
def test_labels_that_name_no_classes_leave_retrieval(table, log, labels, why):
    split = open_split(table(labels), reading=READING)
    assert not split.classnames
    assert why.casefold() in log.text.casefold()


def test_labels_that_all_differ_are_said(table, log):
    log.set_level("INFO", "neuclip")
    assert len(open_split(table(["a", "b", "c"]), reading=READING).classnames) == 3
    assert "every sample has a label of its own, so accuracy is retrieval of the label" in log.text


def test_a_key_that_no_data_have_is_an_error_where_it_only_evaluates(table):
    path = str(table(["a", "b"]))
    evaluation = EvaluationConfig(val_data=path)
    with pytest.raises(UserError, match="--label-key sort has no effect: no evaluated data"):
        open_own_splits(evaluation, DataConfig(label_key="sort"), None)
    masked = DataConfig(label_key="sort", false_negatives="mask")
    assert not open_own_splits(evaluation, masked, None)[0].classnames
    with pytest.raises(UserError, match=r"add --false-negatives mask .* or --val-data"):
        RunConfig(data=DataConfig(label_key="sort", train_data=path)).check()


def test_a_held_out_share_has_all_classes_unless_labels_join(table):
    path = table([("owl", "bat", "elk")[number % 3] for number in range(24)])
    data = DataConfig(label_key="kind")
    held = hold_out(open_source(str(path), data), data, 0.5, 0)
    assert held.split.classnames == ["bat", "elk", "owl"]
    trained = {held.rest.texts(place).annotations.label for place in range(len(held.rest))}
    assert trained == {"owl", "bat", "elk"}
    joined = data.model_copy(update={"false_negatives": "mask"})
    held = hold_out(open_source(str(path), joined), joined, 0.5, 0)
    assert not held.split.classnames  # one label of three: nothing to tell apart
    assert torch.unique(torch.tensor(held.positions)).numel() == 8
