"""Sets that are not as they should be."""

import dataclasses
import json

import pytest
import torch

from datacomp_sets import (
    CodedTowers,
    picture,
    prompts,
    write_association,
    write_classification,
    write_retrieval,
    write_set,
)
from neuclip.errors import UserError
from neuclip.evaluation.datacomp.sets import open_task, open_tasks
from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.evaluation.evaluate import evaluate
from neuclip.evaluation.interfaces import EvaluatedModel, EvaluationSettings

TASKS = load_suite().tasks
ROWS = [((n % 4, 4, 5), n % 4, None) for n in range(8)]


@pytest.fixture
def classification(tmp_path):
    return write_classification(tmp_path / TASKS["mnist"].folder, ROWS, 6)


@pytest.fixture
def association(tmp_path):
    colors = [(n, 9, 9) for n in range(6)]
    return write_association(tmp_path / "wds_winogavil_test", colors, [(1, range(5), [1, 2])])


def metrics_of(towers, task_set, batch_size=256, **settings):
    settings = EvaluationSettings(batch_size=batch_size, workers=0, **settings)
    return evaluate(EvaluatedModel(towers), task_set, settings).metrics


def metrics_for(data_dir, key, **settings):
    return metrics_of(CodedTowers(), open_task(data_dir, TASKS[key]), 3, **settings)


def test_a_whole_set(classification, tmp_path):
    metrics = metrics_for(tmp_path, "mnist")
    assert metrics["acc1"] == metrics["main_metric"] == 1.0
    assert metrics["num_samples"] == 8
    assert "num_damaged" not in metrics


class TestPart:
    def test_samples_are_evenly_spread_and_counted(self, classification, tmp_path):
        whole = open_task(tmp_path, TASKS["mnist"])
        part = whole.part(3)
        assert part.positions.tolist() == [0, 2, 5]
        assert (whole.key, part.key) == ("mnist", "mnist@3")
        towers = CodedTowers()
        metrics = metrics_of(towers, part, 2)
        assert towers.images_seen == 3
        assert (metrics["num_samples"], metrics["partial_of"]) == (3, 8)

    def test_of_a_smaller_set_is_the_set(self, classification, tmp_path):
        whole = open_task(tmp_path, TASKS["mnist"])
        assert whole.part(8) is whole
        assert "partial_of" not in metrics_for(tmp_path, "mnist")

    def test_of_instances_reads_their_images_only(self, tmp_path):
        colors = [(n, 40, 41) for n in range(30)]
        instances = [(1, range(10), [1]), (12, range(10, 20), [12]), (21, range(20, 30), [21])]
        write_association(tmp_path / TASKS["misc/winogavil"].folder, colors, instances)
        part = open_task(tmp_path, TASKS["misc/winogavil"]).part(1)
        assert part.key == "misc/winogavil@1"
        towers = CodedTowers()
        metrics = metrics_of(towers, part)
        assert towers.images_seen == 10
        assert (metrics["main_metric"], metrics["num_samples"]) == (1.0, 1)
        assert metrics["partial_of"] == 3


def test_no_set(tmp_path):
    message = r"the set of mnist is missing in .*'neuclip data download-evalsets .* --tasks mnist'"
    with pytest.raises(UserError, match=message):
        open_task(tmp_path, TASKS["mnist"])


def test_all_missing_and_incomplete_sets_are_named_at_once(classification, tmp_path):
    (classification / "test" / "1.tar").unlink()
    tasks = [TASKS[key] for key in ("mnist", "cars", "vtab/dtd")]
    with pytest.raises(UserError) as caught:
        open_tasks(tmp_path, tasks)
    first, second = str(caught.value).splitlines()
    assert first == (
        f"2 evaluation sets are missing in {tmp_path} (cars, vtab/dtd); download with "
        f"'neuclip data download-evalsets {tmp_path} --tasks cars,vtab/dtd'"
    )
    assert "1 of 2 shards are missing" in second
    with pytest.raises(UserError, match=r"38 .* missing at .*nowhere: no such folder .*nowhere'$"):
        open_tasks(tmp_path / "nowhere", list(TASKS.values()))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("test/1.tar", r"1 of 2 shards are missing: 1\.tar"),
        ("test/nshards.txt", r"nshards\.txt is missing: the evaluation set is not complete"),
        ("classnames.txt", r"no classnames\.txt"),
        ("zeroshot_classification_templates.txt", r"no zeroshot_classification_templates\.txt"),
    ],
)
def test_a_missing_file(classification, tmp_path, name, text):
    (classification / name).unlink()
    with pytest.raises(UserError, match=text):
        open_task(tmp_path, TASKS["mnist"])


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("test/nshards.txt", "two", r"expected the number of shards, found 'two'"),
        ("test/nshards.txt", "0", r"expected the number of shards, found '0'"),
        ("test/nshards.txt", "3", r"1 of 3 shards are missing: 2\.tar"),
        ("zeroshot_classification_templates.txt", "a photo", r"'a photo' has no \{c\}"),
        ("dataset_type.txt", "retrieval\n", r"evaluated by classification.*set for retrieval"),
    ],
)
def test_a_wrong_file(classification, tmp_path, name, content, text):
    (classification / name).write_text(content)
    with pytest.raises(UserError, match=text):
        open_task(tmp_path, TASKS["mnist"])


def test_fewer_names_than_classes(classification, tmp_path):
    (classification / "classnames.txt").write_text("number 0\nnumber 1\n")
    with pytest.raises(UserError, match=r"mnist: sample 's0000002' has class 2.*2 class names"):
        metrics_for(tmp_path, "mnist")


def test_an_image_without_a_class(tmp_path):
    samples = [{"png": picture((0, 1, 2)), "cls": b"0"}, {"png": picture((0, 1, 2))}]
    write_set(tmp_path / TASKS["mnist"].folder, samples, **prompts(3))
    with pytest.raises(UserError, match=r"'s0000001' has no class \(\.cls\)"):
        metrics_for(tmp_path, "mnist")


def test_damaged_images_are_counted_and_fatal(tmp_path):
    samples = [{"png": picture((n, 4, 5)), "cls": b"%d" % n} for n in range(4)]
    samples[1]["png"] = samples[2]["png"] = b"no picture"
    write_set(tmp_path / TASKS["mnist"].folder, samples, **prompts(6))
    with pytest.raises(UserError, match=r"mnist: .*must be complete.*s0000002.*and 1 more"):
        metrics_for(tmp_path, "mnist")
    metrics = metrics_for(tmp_path, "mnist", allow_damage=True)
    assert (metrics["num_samples"], metrics["num_damaged"], metrics["acc1"]) == (2, 2, 1.0)


def test_a_shard_that_is_cut(classification, tmp_path):
    shard = classification / "test" / "0.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"mnist: .*must be complete.*0\.tar"):
        metrics_for(tmp_path, "mnist")


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        (None, r"wilds/fmow: sample 's0000000' has no metadata \(\.npy\)"),
        ([], r"sample 's0000000': its metadata .* not an array of numbers with a column 0"),
    ],
)
def test_metadata_that_cannot_be_grouped_by(tmp_path, metadata, text):
    write_classification(
        tmp_path / TASKS["wilds/fmow"].folder, [(c, y, metadata) for c, y, _ in ROWS], 6
    )
    with pytest.raises(UserError, match=text):
        metrics_for(tmp_path, "wilds/fmow")


def test_metadata_that_would_run_code(tmp_path):
    samples = [{"png": picture((0, 1, 2)), "cls": b"0", "npy": b"\x80\x04N."}]
    write_set(tmp_path / TASKS["wilds/fmow"].folder, samples, **prompts(3))
    with pytest.raises(UserError, match="is not an array of numbers"):
        metrics_for(tmp_path, "wilds/fmow")


def test_the_region_other_counts_as_in_the_published_code(tmp_path):
    """DataComp's FMoWEvaluator ends with `acc_worst_region` 0.0 on these rows."""
    rows = [((0, 1, 2), 0, [1, 9]), ((0, 1, 2), 0, [1, 9]), ((0, 1, 2), 1, [1, 9])]
    rows += [((0, 1, 2), 1, [5, 9])]
    write_classification(tmp_path / TASKS["wilds/fmow"].folder, rows, 6)
    metrics = metrics_for(tmp_path, "wilds/fmow")
    assert metrics["main_metric"] == metrics["acc_worst_region"] == metrics["acc_region:5"] == 0.0
    assert metrics["acc_worst_region_as_defined"] == pytest.approx(2 / 3)
    assert metrics["count_region:1"] == 3.0


def test_the_region_other_alone(tmp_path):
    rows = [((0, 1, 2), 0, [5, 9]), ((0, 1, 2), 1, [5, 9])]
    write_classification(tmp_path / TASKS["wilds/fmow"].folder, rows, 6)
    metrics = metrics_for(tmp_path, "wilds/fmow")
    assert metrics["main_metric"] == 0.5
    assert "acc_worst_region_as_defined" not in metrics


def test_an_image_without_a_caption(tmp_path):
    folder = tmp_path / "wds_mscoco_2014_5k_test_image_text_retrieval_test"
    write_retrieval(folder, [((0, 1, 2), [0]), ((1, 2, 3), [])])
    with pytest.raises(UserError, match=r"image 's0000001' has no caption"):
        metrics_for(tmp_path, "retrieval/mscoco_2014_5k_test_image_text_retrieval")


def test_one_image_is_no_retrieval(tmp_path):
    folder = tmp_path / "wds_mscoco_2014_5k_test_image_text_retrieval_test"
    write_retrieval(folder, [((0, 1, 2), [0, 1])])
    with pytest.raises(UserError, match="too small for its main metric"):
        metrics_for(tmp_path, "retrieval/mscoco_2014_5k_test_image_text_retrieval")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"cue": " "}, "line 1: the cue is empty"),
        ({"associations": []}, "the associations must be one or more of the candidates"),
        ({"associations": ["s0000005"]}, "the associations must be one or more of the candidates"),
        ({"candidates": 3}, "line 1: invalid instance"),
        ({"candidates": ["elsewhere", "s0000001", "s0000002"]}, "there is no image 'elsewhere'"),
    ],
)
def test_instances_that_contradict_themselves(association, tmp_path, change, text):
    path = association / "instances.jsonl"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}) + "\n")
    with pytest.raises(UserError, match=text):
        metrics_for(tmp_path, "misc/winogavil")


def test_no_instances(association, tmp_path):
    (association / "instances.jsonl").write_text("")
    with pytest.raises(UserError, match="contains no instances"):
        open_task(tmp_path, TASKS["misc/winogavil"])


def test_cues_become_the_authors_prompts(association, tmp_path):
    lines = [
        {"cue": cue, "candidates": ["s0000000", "s0000001"] * 5, "associations": ["s0000000"]}
        for cue in ("Owl", "full Moon")
    ]
    (association / "instances.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seen = []

    class Listening(CodedTowers):
        @property
        def tokenize(self):
            def tokenize(texts):
                seen.extend(texts)
                return CodedTowers().tokenize(texts)

            return tokenize

    task_set = open_task(tmp_path, TASKS["misc/winogavil"])
    metrics_of(Listening(), task_set)
    assert [text for text in seen if text] == ["An owl", "A full moon"]


def test_the_fingerprint_tells_sets_apart(classification, tmp_path):
    first = open_task(tmp_path, TASKS["mnist"]).fingerprint
    assert open_task(tmp_path, TASKS["mnist"]).fingerprint == first
    with (classification / "classnames.txt").open("a") as names:
        names.write("number 6\n")
    assert open_task(tmp_path, TASKS["mnist"]).fingerprint != first


def test_a_set_of_another_size_than_the_published(classification, tmp_path, log):
    metrics_for(tmp_path, "mnist")
    assert "mnist: 8 samples, but the published set has 10000" in log.text
    log.clear()
    task_set = open_task(tmp_path, dataclasses.replace(TASKS["mnist"], size=8))
    metrics_of(CodedTowers(), task_set)
    assert not log.text


@pytest.mark.parametrize(
    ("key", "images", "texts"),
    [
        ("mnist", False, True),
        ("retrieval/mscoco_2014_5k_test_image_text_retrieval", True, True),
        ("misc/winogavil", True, True),
    ],
)
@pytest.mark.parametrize("amp", ["cpu", None])
def test_where_the_benchmark_has_autocast(tmp_path, key, images, texts, amp):
    """On CUDA as here on the CPU: the images of a classification set are always in float32."""
    seen = {}

    class Noticing(CodedTowers):
        def encode_image(self, images):
            seen["images"] = torch.is_autocast_enabled("cpu")
            return super().encode_image(images)

        def encode_text(self, tokens):
            seen["texts"] = torch.is_autocast_enabled("cpu")
            return super().encode_text(tokens)

    folder = tmp_path / TASKS[key].folder
    if key == "mnist":
        write_classification(folder, ROWS, 6)
    elif key == "misc/winogavil":
        write_association(folder, [(n, 9, 9) for n in range(10)], [(1, range(10), [1, 2])])
    else:
        write_retrieval(folder, [((n, 9, 8), [n]) for n in range(3)])
    metrics = metrics_of(Noticing(), open_task(tmp_path, TASKS[key]), amp=amp)
    assert seen == {"images": amp is not None and images, "texts": amp is not None and texts}
    assert metrics["main_metric"] > 0.3
    assert EvaluationSettings(amp=amp).precision == ("fp32" if amp is None else "amp")
