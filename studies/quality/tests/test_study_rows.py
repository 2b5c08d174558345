"""The file of results."""

import json
from pathlib import Path

import pytest
from rows import DECIDING, ResultsFile, code_digest, data_digest, lock

import neuclip
from neuclip.errors import UserError


@pytest.fixture
def results(tmp_path) -> ResultsFile:
    return ResultsFile(tmp_path / "results.jsonl", "da7a")


def test_rows_come_back_and_a_torn_line_is_dropped(results):
    results.append({"cell": "one", "data": "da7a"})
    with results.path.open("a") as file:
        file.write('{"format": 1, "cell": "to')
    assert list(results.read()) == ["one"]
    results.append({"cell": "two", "data": "da7a"})
    assert list(results.read()) == ["one", "two"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 0}, "has format 0, expected 2"),
        ({"format": 1}, "has format 1, .*migrate.py"),
        ({"code": "01d"}, "computed by code 01d, the present code is .* --same-code 01d"),
        ({"data": "other"}, "was computed on data other, --data is da7a"),
    ],
)
def test_other_versions_are_refused(results, changes, message):
    results.append({"cell": "one", "data": "da7a"})
    row = json.loads(results.path.read_text())
    results.path.write_text(json.dumps({**row, **changes}) + "\n")
    with pytest.raises(UserError, match=message):
        results.read()
    with pytest.raises(UserError, match=r"results\.jsonl, line 1"):
        results.read()


def test_code_declared_equal_is_accepted(results):
    results.append({"cell": "one", "data": "da7a"})
    row = json.loads(results.path.read_text())
    results.path.write_text(json.dumps({**row, "code": "01d"}) + "\n")
    assert list(ResultsFile(results.path, "da7a", ["01d"]).read()) == ["one"]
    assert list(ResultsFile(results.path, any_code=True).read()) == ["one"]


def test_lines_that_are_not_results_are_refused(results):
    results.path.write_text("[]\n")
    with pytest.raises(UserError, match="format None"):
        results.read()
    results.path.write_text("{\n")
    with pytest.raises(UserError, match="not JSON"):
        results.read()


@pytest.fixture
def package(tmp_path):
    """Writes a file of a package and returns the package's digest."""

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return code_digest(tmp_path)

    return write


def test_the_digest_depends_on_code_only(package):
    one = package("method/loss.py", '"""Text."""\nx = 1\n')
    assert package("method/loss.py", '"""Other text."""\n\n# why\nx = 1  # here\n') == one
    assert package("method/loss.py", "import math\n\nx = 1\n") == one
    assert package("method/loss.py", '"""Text."""\nx = 2\n') != one


def test_the_digest_survives_a_move(package):
    one = package("method/loss.py", "def f():\n    return 1\n\n\ndef g():\n    return 2\n")
    package("method/loss.py", "from other import g\n\n\ndef f():\n    return 1\n")
    assert package("training/step.py", "def g():\n    return 2\n") == one
    assert package("report/page.py", "def h():\n    return 3\n") == one  # decides no number


def test_every_deciding_pattern_matches_a_file():
    package = Path(neuclip.__file__).parent
    assert [pattern for pattern in DECIDING if not list(package.glob(pattern))] == []


def test_no_data_and_a_second_runner_are_refused(tmp_path):
    with pytest.raises(UserError, match="no embedded data"):
        data_digest(tmp_path)
    with lock(tmp_path), pytest.raises(UserError, match="in use by another run of this script"):
        lock(tmp_path)
