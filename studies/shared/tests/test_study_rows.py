"""The file of results, and the digest of the code."""

import json
from pathlib import Path

import pytest
from studies.shared.code_digest import TRAINING, code_digest, import_closure
from studies.shared.folder_lock import lock
from studies.shared.results_file import ResultsFile

import neuclip
from neuclip.errors import UserError

PACKAGE = Path(neuclip.__file__).parent


def file_of(path: Path, **others) -> ResultsFile:
    settings = {"rows": (2, {1: "rewrite it"}), "code": "c0de", "data": lambda _: "da7a"} | others
    return ResultsFile(path, **settings)


@pytest.fixture
def results(tmp_path) -> ResultsFile:
    return file_of(tmp_path / "results.jsonl")


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
        ({"format": 0}, "has format 0, expected 2: .*choose another --out"),
        ({"format": 1}, "has format 1, expected 2: rewrite it"),
        ({"code": "01d"}, "computed by code 01d, the present code is c0de.* --same-code 01d"),
        ({"data": "other"}, "was computed on data other, the data given are da7a"),
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
    assert list(file_of(results.path, same_code=["01d"]).read()) == ["one"]
    assert list(file_of(results.path, code=None, data=None).read()) == ["one"]


def test_lines_that_are_not_results_are_refused(results):
    results.path.write_text("[]\n")
    with pytest.raises(UserError, match="format None"):
        results.read()
    results.path.write_text("{\n")
    with pytest.raises(UserError, match="not JSON"):
        results.read()


def test_a_second_runner_is_refused(tmp_path):
    with lock(tmp_path), pytest.raises(UserError, match="in use by another run of this script"):
        lock(tmp_path)


# --- the digest ---------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path):
    """Writes a file of a package `pack` and returns the digest from its module `start`."""
    root = tmp_path / "pack"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "start.py").write_text("from pack import loss\n\n\ndef go():\n    import pack.step\n")

    def write(name: str, text: str) -> str:
        (root / name).write_text(text)
        return code_digest(["pack.start"], (), {"pack": root})

    write("step.py", "y = 1\n")
    write("loss.py", "x = 1\n")
    return write


def test_the_digest_depends_on_code_only(package):
    one = package("loss.py", '"""Text."""\ndef f(a):\n    return a\n')
    assert (
        package("loss.py", '"""Other."""\n\ndef f(a):  # here\n    """Why."""\n    return a\n')
        == one
    )
    assert package("loss.py", "import math\n\ndef f(a: int) -> int:\n    return a\n") == one
    assert package("loss.py", '"""Text."""\ndef f(a):\n    return a + 1\n') != one


def test_the_digest_covers_what_functions_import_and_nothing_else(package):
    one = package("loss.py", "x = 1\n")
    assert package("search.py", "z = 3\n") == one
    assert package("step.py", "y = 2\n") != one


def test_the_digest_survives_a_move(package):
    one = package("loss.py", "def f():\n    return 1\n\n\ndef g():\n    return 2\n")
    package("loss.py", "from pack.step import g\n\n\ndef f():\n    return 1\n")
    assert package("step.py", "y = 1\n\n\ndef g():\n    return 2\n") == one


def test_imports_for_type_checkers_and_lazy_names_of_packages_are_left_out(package):
    one = package("loss.py", "x = 1\n")
    package("other.py", "w = 1\n")
    lazy = "def __getattr__(name):\n    from pack import other\n    return other\n"
    assert package("__init__.py", lazy) != one  # the function itself is code
    two = package("loss.py", "if TYPE_CHECKING:\n    from pack import other\nx = 1\n")
    assert package("other.py", "w = 2\n") == two


def test_the_closure_of_training_has_what_decides_numbers_and_no_more():
    """Checked on the package itself: no import drags in the command line or another program."""
    found = {
        str(path.relative_to(PACKAGE))
        for path in import_closure(TRAINING).values()
        if path.is_relative_to(PACKAGE)
    }
    for path in (
        "catalogue/neuclip.py", "data/decode.py", "data/groups.py", "data/order.py",
        "data/sources/tar_samples.py", "evaluation/zero_shot.py", "method/normalizers/pool.py",
        "method/thresholds.py", "model/clip.py", "model/ema.py", "training/accumulation.py",
        "training/momentum.py", "training/step.py", "training/trainer.py",
    ):  # fmt: skip
        assert path in found, path
    outside = {"cli", "report", "search", "export", "embedding", "templates"}
    assert not {path.split("/")[0] for path in found} & outside
    assert not [path for path in found if path.startswith(("data/demo", "data/icons"))]


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("method/objective.py", True),
        ("data/decode.py", True),
        ("data/groups.py", True),
        ("training/learning_rate.py", True),
        ("search/engine.py", False),
        ("export/repository.py", False),
    ],
)
def test_a_changed_function_changes_the_digest_if_training_reaches_it(monkeypatch, path, changes):
    before = code_digest()
    changed = PACKAGE / path
    read = Path.read_text

    def with_a_function(self, *args, **others):
        more = "\ndef more():\n    return 1\n" if self == changed else ""
        return read(self, *args, **others) + more

    monkeypatch.setattr(Path, "read_text", with_a_function)
    assert (code_digest() != before) == changes


def test_a_changed_model_changes_the_digest():
    assert code_digest(data=("neuclip/model/model_configs/glyph*.json",)) != code_digest()
