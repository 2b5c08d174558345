"""Text of somebody else, read as YAML: plain values within bounds, or one line."""

import ast
from pathlib import Path

import pytest

import neuclip
from neuclip.config import bounded_yaml
from neuclip.config.bounded_yaml import read_yaml_text
from neuclip.errors import UserError

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than 100,000 values"),
        ("a: &a {k: 1}\n" + "b: [" + "*a, " * 99_999 + "*a]", "more than 100,000 values"),
        ("a: &a [*a]", "stands inside of what it names"),
        ("a: &a {b: {c: *a}}", "stands inside of what it names"),
        ("[" * 5000, "nested deeper than 32"),
        ("{a: " * 200 + "1" + "}" * 200, "nested deeper than 32"),
        ("a: " + "9" * 5000, "a number of 5,000 characters"),
        ("a: 0x" + "f" * 5000, "a number of 5,002 characters"),
        ("a: 1" + ":59" * 900, "a number of 2,701 characters"),
        ("x" * 1_000_001, "more than 1,000,000 characters"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: 2026-13-45", "month must be in 1..12"),
        ("a: !!bool perhaps", "perhaps"),
        ("a: !!timestamp soon", "is not YAML"),
        ("a: !!int ''", "is not YAML"),
        ("? [1, 2]\n: b", "unhashable"),
        ("a: *b", "undefined alias"),
        ("a: [", r"\(line 1, column 5\)"),
        ("a: \x1b[2J", "special characters"),
        (b"\xff\xfe", "can't decode"),
    ],
)
def test_refused_in_one_line(text, message):
    with pytest.raises(UserError, match=message) as caught:
        read_yaml_text(text, "a.yaml")
    assert str(caught.value).startswith("a.yaml")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: &a [1, 2]\nb: *a\nc: {<<: {d: 4}}", {"a": [1, 2], "b": [1, 2], "c": {"d": 4}}),
        ("a: " + "9" * 40, {"a": int("9" * 40)}),
        ("[" * 32 + "]" * 32, [[[...]]]),
        ("a: ü", {"a": "ü"}),
        (
            "a: 1e-3\nb: 1.0e-3\nc: 0o17\nd: 1:30\ne: yes\nf: ~\ng: 017\nh: .inf",
            {
                "a": "1e-3",
                "b": 1e-3,
                "c": "0o17",
                "d": 90,
                "e": True,
                "f": None,
                "g": 15,
                "h": float("inf"),
            },
        ),
    ],
)
def test_what_people_write_is_read(text, value):
    found = read_yaml_text(text, "a.yaml")
    assert found == value or value == [[[...]]]
    assert read_yaml_text(text.encode(), "a.yaml") == found
    for loader in (bounded_yaml._Loader, bounded_yaml._FastLoader):  # with and without libyaml
        assert bounded_yaml._read(text, "a.yaml", loader) == found


def test_nothing_else_reads_yaml():
    """A second reader would have no bounds."""
    source = Path(neuclip.__file__).parent
    readers = {
        path.name
        for path in source.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in {"safe_load", "load", "load_all"}
        if isinstance(node.value, ast.Name) and node.value.id == "yaml"
    }
    assert readers == {"bounded_yaml.py"}
