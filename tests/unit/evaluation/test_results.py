import json
import multiprocessing

import pytest

from neuclip.errors import UserError
from neuclip.evaluation.results import (
    EvalResult,
    EvaluatedData,
    Gallery,
    Picture,
    Query,
    Retrieved,
    read_eval_results,
    read_gallery,
    write_eval_result,
    write_gallery,
    write_result,
)
from neuclip.run_folder import RunFolder


def test_lines_are_the_benchmarks(tmp_path):
    path = RunFolder(tmp_path).results(3)
    assert path == tmp_path / "eval_results" / "epoch_3_eval_results.jsonl"
    write_eval_result(path, "unseen_face_test", {"acc1": 0.25, "main_metric": 0.25})
    write_eval_result(path, "vtab/cifar100", {"acc1": 0.5}, dataset="CIFAR-100")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {
            "key": "unseen_face_test",
            "dataset": "unseen_face_test",
            "metrics": {"acc1": 0.25, "main_metric": 0.25},
        },
        {"key": "vtab/cifar100", "dataset": "CIFAR-100", "metrics": {"acc1": 0.5}},
    ]


def test_only_the_line_of_the_key_is_written_anew(tmp_path):
    path = tmp_path / "results.jsonl"
    odd = '{"key": "other",   "dataset": "Other", "metrics": {"acc1": 1}}'
    path.write_text(odd + "\n")
    for value in (0.1, 0.2):
        write_eval_result(path, "mine", {"acc1": value})
    assert path.read_text().splitlines()[0] == odd
    assert [(r.key, r.metrics["acc1"]) for r in read_eval_results(path)] == [
        ("other", 1.0),
        ("mine", 0.2),
    ]
    assert {file.name for file in tmp_path.iterdir()} == {path.name, f".{path.name}.lock"}


def write_many(path, who):
    for number in range(25):
        write_eval_result(path, f"{who}-{number}", {"acc1": 0.5})


def test_processes_that_write_at_once_lose_no_line(tmp_path):
    path = tmp_path / "results.jsonl"
    start = multiprocessing.get_context("fork").Process
    writers = [start(target=write_many, args=(path, who)) for who in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {result.key for result in read_eval_results(path)} == {
        f"{who}-{number}" for who in "ab" for number in range(25)
    }


def test_other_data_of_one_name_keep_both_results(tmp_path):
    path = tmp_path / "results.jsonl"

    def write(value, fingerprint, samples=4, key="val"):
        data = EvaluatedData(fingerprint * 16, samples)
        return write_result(path, EvalResult(key, key, {"acc1": value}, data=data)).key

    assert write(0.1, "a") == "val"
    assert write(0.2, "b") == "val@bbbbbbbb"
    assert write(0.3, "a") == "val"
    assert write(0.4, "b") == "val@bbbbbbbb"
    assert [(r.key, r.metrics["acc1"]) for r in read_eval_results(path)] == [
        ("val", 0.3),
        ("val@bbbbbbbb", 0.4),
    ]
    assert read_eval_results(path)[0].data == EvaluatedData("a" * 16, 4)


def test_a_result_of_an_earlier_version_is_replaced(tmp_path):
    path = tmp_path / "results.jsonl"
    write_eval_result(path, "val", {"acc1": 0.1})
    write_result(path, EvalResult("val", "val", {"acc1": 0.2}, data=EvaluatedData("a" * 16, 4)))
    assert [r.metrics["acc1"] for r in read_eval_results(path)] == [0.2]


@pytest.mark.parametrize("line", ["{", "[]", '{"dataset": "x"}'])
def test_a_line_that_is_no_result_is_not_thrown_away(tmp_path, line):
    path = tmp_path / "results.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"results\.jsonl, line 1 is not a result"):
        write_eval_result(path, "mine", {"acc1": 0.5})
    assert path.read_text() == f"{line}\n"


def test_no_way_to_write(tmp_path):
    (tmp_path / "eval_results").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot write"):
        write_eval_result(RunFolder(tmp_path).results(1), "mine", {})


def test_galleries_come_back_as_written(tmp_path):
    picture = Picture("k", "a <caption>", "aGk=")
    gallery = Gallery("s", 0, [Query("q", picture, [Retrieved(picture, 0.5, True)])])
    path = RunFolder(tmp_path).gallery("s")
    write_gallery(path, gallery)
    assert read_gallery(path) == gallery
    path.write_text('{"split": "s"}')
    with pytest.raises(UserError, match=r"gallery_s\.json is not a gallery"):
        read_gallery(path)
