import json
import math
import resource

import pytest

from neuclip.errors import UserError
from neuclip.run_folder import read_records, record_lines
from neuclip.training.records.sinks import JsonLines, evaluation_line, training_line


def test_records_are_one_object_a_line(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl", from_step=0)
    lines({"kind": "train", "step": 1, "loss": math.nan, "metrics": {"x": math.inf}})
    (text,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(text) == {"kind": "train", "step": 1, "loss": None, "metrics": {"x": None}}
    lines.close()


def test_a_resumed_run_drops_later_records_and_broken_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 5}\n[5]\n{"step": 9}\n{"step": 1')
    broken = [number for number, record in enumerate(record_lines(path), 1) if record is None]
    assert broken == [2, 4, 6]
    assert [record["step"] for record in read_records(path)] == [1, 5, 9]
    lines = JsonLines(path, from_step=5)
    lines({"step": 6})
    lines.close()
    assert record_lines(path) == [{"step": 1}, {"step": 5}, {"step": 6}]


@pytest.mark.parametrize("room", [0, 10, 100])
def test_a_full_disk_is_one_line_and_keeps_whole_records(tmp_path, room):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, from_step=0)
    lines({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(UserError, match=r"^cannot write .*metrics\.jsonl: File too large$"):
            for step in range(2, 20):
                lines({"step": step, "text": "x" * 20})
        lines.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_records(path)[0] == {"step": 1}
    JsonLines(path, from_step=1).close()
    assert path.read_text() == '{"step": 1}\n'


def test_records_of_a_planted_link_stay_in_the_folder(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "theirs")
    JsonLines(tmp_path / "metrics.jsonl", from_step=0).close()
    assert (tmp_path / "theirs").read_text() == "theirs"


@pytest.mark.parametrize("line", ["[1]", "{}", '{"step": "x"}', "[" * 5000, "\udcff", "null"])
def test_garbage_between_records_is_dropped(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'.encode(errors="surrogateescape"))
    JsonLines(path, from_step=5).close()
    assert [record["step"] for record in read_records(path)] == [1, 2]


def test_log_lines():
    record = {
        "epoch": 0.5, "loss": 0.25, "temperature": 0.07, "lr": 1e-3, "gamma": 0.4,
        "samples_per_second": 1234.5, "share_data": 0.02, "share_encode": 0.5, "share_x": 0.001,
    }  # fmt: skip
    line = training_line(record)
    assert "loss 0.2500" in line
    assert "1234 samples/s" in line
    assert line.endswith("time: data 2% encode 50%")
    line = evaluation_line(
        {"split": "faces", "epoch": 2.0, "metrics": {"acc1": 0.5, "chance": 0.001}}
    )
    assert line == "faces after epoch 2: acc1 50.00%  chance 0.10%"
    metrics = {"acc1": 0.5, "main_metric": 0.25, "num_samples": 100.0, "partial_of": 400.0}
    line = evaluation_line({"split": "fmow", "epoch": 2, "metrics": metrics})
    assert line == "fmow after epoch 2: acc1 50.00%  main metric 25.00%  on 100 of 400 samples"
