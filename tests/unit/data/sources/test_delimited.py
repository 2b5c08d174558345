"""Tables are cut as `csv` cuts them, and quotes never swallow rows."""

import csv
import io
import random

import pytest

from neuclip.data.sources import delimited
from neuclip.data.sources.delimited import DelimitedColumns, QuoteError, first_row, parse

COLUMNS = DelimitedColumns(",", 2, 0, (1,))


def values(content, columns=COLUMNS):
    rows = parse(content.encode() if isinstance(content, str) else content, columns)
    return [
        (rows.images[n], *(column[n] for column in rows.captions)) for n in range(len(rows.images))
    ]


def by_csv(text, columns=COLUMNS):
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=columns.separator)
    wanted = (columns.image, *columns.captions)
    rows = [row for row in reader if row][1:]
    return [tuple(row[n] if n < len(row) else "" for n in wanted) for row in rows]


@pytest.mark.parametrize("block", [1, 7, 2**22])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_as_csv_reads_it(monkeypatch, block, quoting, end):
    monkeypatch.setattr(delimited, "_BLOCK", block)
    chance, file = random.Random(3), io.StringIO(newline="")
    pieces = ["a", "b c", ",", '"', "\n", "é", "", " "]
    writer = csv.writer(file, quoting=quoting, lineterminator=end)
    writer.writerow(("x", "filepath", "title", "words"))
    for _ in range(60):
        writer.writerow(["".join(chance.choices(pieces, k=4)) for _ in range(4)])
    columns = DelimitedColumns(",", 4, 1, (3, 2))
    assert values(file.getvalue(), columns) == by_csv(file.getvalue(), columns)


@pytest.mark.parametrize(
    "text",
    [
        "i,c\n\n\na,b\n\nc,d",
        "i,c\na\n,\nb,c,d\n",
        'i,c\na.jpg,a 27" wide screen\nb.jpg,"red, blue"\n',
        'i,c\na.jpg,"one\ntwo, three"\nb.jpg,x\n',
        'i,c\na.jpg,""\n"","""x"""\n',
        "i,c\n",
        '"i\nj",c\na,b\n',
    ],
)
def test_odd_tables_as_csv_reads_them(text):
    assert values(text) == by_csv(text)
    assert parse(text.encode(), COLUMNS).note == ""


def test_old_line_ends_and_names_of_columns():
    assert values("i,c\ra,b\rc,d\r") == [("a", "b"), ("c", "d")]
    assert first_row(b'\n\n"i, j",c\na,b\n', ",") == ["i, j", "c"]


def test_invalid_bytes_are_kept():
    rows = parse(b"i,c\na,caf\xe9\nb,good\n", COLUMNS)
    assert [rows.captions[0][n] for n in range(2)] == ["caf\udce9", "good"]
    assert rows.captions[0].count_invalid() == 1


LONE = {
    "unclosed": ({4: '"Be yourself'}, "line 6: .* is not closed"),
    "twice": ({4: '"27 inch', 7: '"13 inch'}, "line 6: .* is closed in the middle of a field"),
    "closed by the end of another": ({4: '"27 inch', 7: 'a 13"'}, "line 6: .* further rows"),
    "many": (dict.fromkeys(range(9), '"open'), "line 2: "),
}


@pytest.mark.parametrize("columns", [DelimitedColumns("\t", 2, 0, (1,)), COLUMNS])
@pytest.mark.parametrize("case", LONE)
def test_lone_quotes_are_text(columns, case):
    odd, note = LONE[case]
    rows = [(f"{n}.jpg", odd.get(n, f"photo {n}")) for n in range(9)]
    text = "\n".join(columns.separator.join(row) for row in [("i", "c"), *rows])
    assert values(text, columns) == rows
    found = parse(text.encode(), columns)
    with pytest.raises(QuoteError, match=note):
        raise QuoteError(0, found.note)


@pytest.mark.parametrize("case", LONE)
def test_lone_quotes_beside_separators_in_quotes_are_an_error(case):
    odd, problem = LONE[case][0], "line [26]: a quote opens a field and is closed in the middle"
    if case == "closed by the end of another":
        problem = LONE[case][1]
    rows = [f"{n}.jpg,{odd.get(n, f'photo {n}')}" for n in range(9)]
    with pytest.raises(QuoteError, match=problem):
        parse("\n".join(["i,c", *rows, '9.jpg,"red, blue"']).encode(), COLUMNS)
