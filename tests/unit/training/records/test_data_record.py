"""The record of what a run has read, over a resume and a failure."""

import json
import shutil
from dataclasses import replace

import pytest

from neuclip.data.identity import DataIdentity
from neuclip.data.samples import Damage
from neuclip.errors import UserError
from neuclip.run_folder import RunFolder
from neuclip.training.records.data_record import DataRecord
from step_parts import batch

CORRUPT = Damage("00000.tar", "5", "image", "truncated")
DATA = DataIdentity(8, "abc")
SHARD = Damage("00001.tar", "", "shard", "unexpected end")


def test_a_resumed_record_equals_an_uninterrupted_one():
    batches = [batch(number) for number in range(4)]
    batches[1] = replace(batches[1], damage=(CORRUPT,))
    whole, first, second = (DataRecord(0.5, [SHARD], DATA) for _ in range(3))
    whole.add(batches)
    first.add(batches[:2])
    second.resume(first.fingerprint(), first.damage())
    second.add(batches[2:])
    assert second.fingerprint() == whole.fingerprint() != first.fingerprint()
    assert second.damage() == whole.damage()
    assert whole.damage()["by_kind"] == {"shard": 1, "image": 1}


def test_too_many_corrupt_samples_end_the_run():
    record = DataRecord(0.0, [SHARD], DATA)
    record.add([batch(1)])  # the index's damage does not count as a corrupt sample
    with pytest.raises(UserError, match="--max-bad-fraction 0 allows"):
        record.add([replace(batch(2), damage=(CORRUPT,))])


def test_the_report_is_written_even_if_the_run_fails(tmp_path):
    record, folder = DataRecord(0.5, [SHARD], DATA, ["3 of 9 members"]), RunFolder(tmp_path)
    with pytest.raises(RuntimeError), record.reporting(folder):
        record.add([replace(batch(1), damage=(CORRUPT,))])
        raise RuntimeError
    report = json.loads(folder.data_report.read_text())
    expected = {"data": {"samples": 8, "digest": "abc"}, "not_read": ["3 of 9 members"]}
    assert report == {**expected, **record.damage()}
    assert report["total"] == 2


def test_a_report_that_cannot_be_written_does_not_hide_a_failure(tmp_path):
    record, folder = DataRecord(0.5, [SHARD], DATA), RunFolder(tmp_path / "run")
    with pytest.raises(RuntimeError, match="first"), record.reporting(folder):
        shutil.rmtree(folder.path)
        folder.path.write_text("")
        raise RuntimeError("first")
    folder.path.unlink()
    with pytest.raises(UserError, match="cannot write"), record.reporting(folder):
        shutil.rmtree(folder.path)
        folder.path.write_text("")


def test_the_report_is_there_before_the_run_ends(tmp_path):
    record, folder = DataRecord(0.5, [SHARD], DATA), RunFolder(tmp_path)
    with record.reporting(folder):
        report = json.loads(folder.data_report.read_text())
        assert (report["data"]["digest"], report["total"]) == ("abc", 1)
