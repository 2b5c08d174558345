import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from neuclip.config.validation import validate
from neuclip.errors import UserError
from neuclip.evaluation.results import (
    Gallery,
    Picture,
    Query,
    Retrieved,
    write_eval_result,
    write_gallery,
)
from neuclip.report import write_report
from neuclip.report.comparison import all_metrics, best_results, comparison, number, percent
from neuclip.report.entries import entries
from neuclip.report.figures import POINTS_PER_CURVE, Curve, curves
from neuclip.report.runs import load_runs
from neuclip.run_folder import RunFolder

PIXEL = "aGVsbG8="  # any base64


def train(step, **more):
    record = {"kind": "train", "step": step, "epoch": step / 100, "samples_seen": step * 64}
    record |= {"loss": 4 / step, "temperature": 0.05, "logit_scale": 20.0, "seconds": 2.0}
    record |= {"samples_per_second": 900.0 + step, "share_data": 0.1, "share_encode": 0.7}
    record |= {"share_normalizer": 0.05, "log_normalizer_mean": -step / 100, "memory_mb": 800}
    return record | more


def evaluation(step, acc1, split="unseen_face_test", **more):
    metrics = {"acc1": acc1, "acc5": acc1 * 1.2, "chance": 0.001, "main_metric": acc1}
    metrics |= {"num_samples": 1000.0, "num_classes": 1000.0, "mean_recall@1": acc1 / 2} | more
    place = {"step": step, "epoch": step / 100, "samples_seen": step * 64}
    return {"kind": "eval", **place, "split": split, "metrics": metrics}


def make_run(folder, method="neuclip", records=None, **settings):
    folder.mkdir(parents=True)
    tree = {"name": folder.name, "method": {"name": method}, **settings}
    (folder / "config.yaml").write_text(validate(tree, "test").to_yaml())
    if records is None:
        records = [train(step) for step in range(10, 210, 10)]
        records += [evaluation(100, 0.2), evaluation(200, 0.4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def add_gallery(folder, caption="latin capital letter a", hit=True):
    picture = Picture("k", caption, PIXEL)
    query = Query(caption, picture, [Retrieved(picture, 0.75, hit)] * 5)
    gallery = Gallery("unseen_face_test", 0, [query])
    write_gallery(RunFolder(folder).gallery(gallery.split), gallery)


class Reader(HTMLParser):
    """Collects tags and checks that they nest."""

    VOID = ("meta", "img", "br")

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.problems = [], [], []
        self.feed(page)
        self.problems += [f"left open: {tag}" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"closed out of turn: {tag}")

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


@pytest.fixture
def two_runs(tmp_path):
    first = make_run(tmp_path / "logs" / "neuclip")
    records = [train(step, loss=math.inf) for step in range(10, 210, 10)]
    second = make_run(
        tmp_path / "logs" / "base",
        "rgcl_batch",
        [*records, evaluation(200, 0.5), evaluation(200, 0.1, "other")],
        seed=7,
    )
    add_gallery(first)
    add_gallery(second, hit=False)
    return [first, second]


def test_the_page_is_whole_and_needs_no_network(two_runs, tmp_path):
    out = write_report(two_runs, tmp_path / "new" / "report.html")
    page = out.read_text()
    reader = Reader(page)
    assert reader.problems == []
    sources = [attrs[key] for _, attrs in reader.tags for key in ("src", "href") if key in attrs]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    addresses = set(re.findall(r"https?://[\w./]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not reader.all("script") and not reader.all("link")
    references = [v for _, attrs in reader.tags for k, v in attrs.items() if k == "xlink:href"]
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert {reference.removeprefix("#") for reference in references} <= set(ids)
    assert len(ids) == len(set(ids))


def test_the_page_can_be_read_by_everybody(two_runs, tmp_path):
    page = write_report(two_runs, tmp_path / "report.html").read_text()
    reader = Reader(page)
    assert all(attrs.get("alt") for attrs in reader.all("img"))
    assert all(attrs.get("scope") for attrs in reader.all("th"))
    plots = [attrs for attrs in reader.all("div") if attrs.get("role") == "img"]
    assert len(plots) == len(reader.all("svg")) > 4
    assert all(attrs["aria-label"] for attrs in plots)
    assert (
        "Zero-shot top-1: unseen_face_test over samples seen. neuclip: from 20.0% to 40.0%" in page
    )
    assert "var(--series-1)" in page and "#0a0001" not in page and "#0b0001" not in page
    assert "compare the shapes of the curves" in page


def test_equal_inputs_give_equal_bytes(two_runs, tmp_path):
    pages = [write_report(two_runs, tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_best_results_and_table(two_runs):
    runs = load_runs(two_runs)
    best = {result.split: result for result in best_results(runs, entries(runs))}
    face = best["unseen_face_test"]
    assert (face.best, face.value) == ("base", "50.0 %")
    assert (face.rivals, best["other"].rivals) == (2, 1)
    assert (face.chance, face.times_chance) == ("0.1 %", "500")
    assert face.scale == "1,000 images, 1,000 classes"
    groups = {group.title: group for group in comparison(runs)}
    assert list(groups) == ["unseen_face_test", "other", "Training"]
    top1 = {row.label: row for row in groups["unseen_face_test"].rows}["Zero-shot top-1"]
    assert [(cell.text, cell.best) for cell in top1.cells] == [("40.0 %", False), ("50.0 %", True)]
    alone = {row.label: row for row in groups["other"].rows}["Zero-shot top-1"]
    assert [(cell.text, cell.best) for cell in alone.cells] == [("", False), ("10.0 %", False)]
    cost = {row.label: [cell.text for cell in row.cells] for row in groups["Training"].rows}
    assert cost["Samples seen"] == ["12,800", "12,800"]
    assert cost["Share of time in the normalizer"] == ["5.0 %", "5.0 %"]
    assert len(all_metrics(runs)) == 2


def test_equal_values_have_no_best(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    assert not any(
        cell.best
        for group in comparison(load_runs(runs))
        for row in group.rows
        for cell in row.cells
    )


def test_settings_that_differ_and_the_whole_configuration(two_runs, tmp_path):
    page = write_report(two_runs, tmp_path / "report.html").read_text()
    assert "<code>seed</code></th><td>0</td><td>7</td>" in page
    assert "<code>optim.lr</code>" not in page
    assert page.count("Full configuration of") == 2
    assert "lr_scheduler: cosine" in page


def test_hits_are_marked_and_the_best_run_comes_first(two_runs, tmp_path):
    page = write_report(two_runs, tmp_path / "report.html").read_text()
    assert page.count('<li class="hit">') == 5
    assert "base: 0 of 1 captions" in page and "neuclip: 1 of 1 captions" in page
    assert page.index("base: 0 of 1") < page.index("neuclip: 1 of 1")


def test_captions_cannot_break_the_page(tmp_path):
    run = make_run(tmp_path / "run")
    add_gallery(run, caption='<script>alert("x")</script> & $x$')
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert Reader(page).problems == []


def test_a_label_that_looks_like_a_formula(tmp_path):
    run = make_run(tmp_path / "a$b_$_of_a_very_long_name_indeed")
    other = make_run(tmp_path / "b", "rgcl_batch")
    page = write_report([run, other], tmp_path / "report.html").read_text()
    assert "a$b_$_of_a_very_long_name_indeed" in re.findall(r">([^<]*)</text>", page)
    long = make_run(tmp_path / f"c$_{'very_' * 10}long_name", "openclip")
    page = write_report([other, long], tmp_path / "report.html").read_text()
    assert "c$_very_very_very_v..very_very_long_name" in page  # both ends are kept


def test_a_run_killed_while_writing(tmp_path):
    run = make_run(tmp_path / "run")
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-40])
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "the last line of metrics.jsonl is cut off" in page
    assert "20.0 %" in page  # the evaluation before


def test_lines_written_twice_count_once_and_bad_ones_are_named(tmp_path):
    records = [train(10), train(20), train(30), train(20, loss=9.0), train(40)]
    run = make_run(tmp_path / "run", records=[*records, evaluation(40, 0.1), evaluation(40, 0.3)])
    metrics = run / "metrics.jsonl"
    metrics.write_text("{broken\n" + metrics.read_text())
    (read,) = load_runs([run])
    assert [(r["step"], r["loss"]) for r in read.train] == [(10, 0.4), (20, 9.0), (40, 0.1)]
    assert read.final("unseen_face_test")["acc1"] == 0.3
    assert any("unreadable lines, which are left out: 1" in gap for gap in read.gaps)


def test_a_run_that_has_only_begun(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "No results yet: the run has not been evaluated." in page
    for words in ("metrics.jsonl is missing", "no evaluation yet", "no gallery"):
        assert words in page
    assert Reader(page).problems == []


def test_results_files_complete_the_evaluations(tmp_path):
    run = make_run(tmp_path / "run")
    more = {"normalizer_mae": 0.8, "minibatch_normalizer_mae": 3.5}
    write_eval_result(RunFolder(run).results(2), "unseen_face_test", {"acc1": 0.41, **more})
    write_eval_result(RunFolder(run).results(1), "unseen_face_test", {"acc1": 0.99})
    (read,) = load_runs([run])
    final = read.final("unseen_face_test")
    assert (final["acc1"], final["acc5"], final["normalizer_mae"]) == (0.41, 0.48, 0.8)
    assert read.eval_series("unseen_face_test", "acc1") == [(6400, 0.99), (12800, 0.41)]
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "run: 0.800 predicted, 3.50 by the mini-batch" in page


def test_the_normalizers_error_along_the_run(tmp_path):
    more = {"normalizer_mae": 0.8, "minibatch_normalizer_mae": 3.5}
    records = [train(10), evaluation(100, 0.1, **more), evaluation(200, 0.2, **more)]
    page = write_report([make_run(tmp_path / "run", records=records)], tmp_path / "r.html")
    assert "run, mini-batch estimate: from 3.50 to 3.50" in page.read_text()


def test_damage_of_the_data(tmp_path):
    run = make_run(tmp_path / "run")
    example = {"shard": "/far/away/7.tar", "key": "00012", "kind": "image", "detail": "<no> image"}
    report = {"total": 2, "by_kind": {"image": 2}, "by_shard": {}, "examples": [example]}
    (run / "data_report.json").write_text(json.dumps(report))
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "2 corrupt samples or shards skipped: 2 image." in page
    assert "<code>7.tar</code>" in page and "/far/away" not in page
    (run / "data_report.json").write_text("{")
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "data_report.json is unreadable" in page


def test_broken_results_and_galleries_are_named(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "eval_results").mkdir()
    (run / "eval_results" / "epoch_1_eval_results.jsonl").write_text("{")
    (run / "eval_results" / "gallery_x.json").write_text("{}")
    gaps = load_runs([run])[0].gaps
    assert any(gap.startswith("epoch_1_eval_results.jsonl, line 1 is not a result") for gap in gaps)
    assert any(gap.startswith("gallery_x.json is not a gallery") for gap in gaps)


def test_not_a_run_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"not a run folder: it has no config\.yaml"):
        load_runs([tmp_path])
    with pytest.raises(UserError, match="at least one run folder"):
        load_runs([])


def test_runs_of_one_name_are_told_apart_and_one_run_given_twice_counts_once(tmp_path):
    runs = [make_run(tmp_path / place / "run") for place in ("a", "b")]
    assert [run.label for run in load_runs([*runs, runs[0]])] == ["a/run", "b/run"]


def test_no_way_to_write(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_report([run], tmp_path / "file" / "report.html")
    with pytest.raises(UserError, match="cannot write"):
        write_report([run], run)
    assert not list(tmp_path.glob("*.partial"))


def test_long_curves_are_thinned_without_a_change_of_level():
    points = [(float(x), float(x % 2)) for x in range(10 * POINTS_PER_CURVE)]
    short = curves("a", [Curve("run", 0, points)])
    assert len(short) < 60_000
    assert curves("a", [Curve("run", 0, points)]) == short


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.553, "55.3 %"), (1.0, "100.0 %"), (0.0, "0.0 %"), (0.0003, "0.03 %"), (0.00951, "0.95 %")],
)
def test_percentages(value, text):
    assert percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(476160.0, "476,160"), (905.3, "905"), (0.0412, "0.0412"), (4.4, "4.40"), (-2.0, "-2"),
     (float("nan"), "nan")],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


def test_matplotlib_waits_for_a_drawing_and_torch_is_never_needed():
    code = "import sys, neuclip.report; assert not {'torch', 'matplotlib'} & {*sys.modules}; "
    code += "import neuclip.report.page; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("line", "gap"),
    [
        ('{"kind": "train", "step": 220, "samples_seen": 1, "loss": 1%s}' % ("0" * 400), None),
        ('{"kind": "train", "step": 220, "samples_seen": 1e308, "loss": 1}', "samples_seen"),
        ('{"kind": "train", "step": 1%s, "loss": 1}' % ("0" * 400), None),
        (json.dumps(evaluation(220, 1e308)), "main_metric"),
        ('{"kind": "train", "step": 220, "loss": 1%s}' % ("0" * 5000), None),
        ('{"step": 1, "a": ' + "[" * 100_000, "unreadable lines|cut off"),
        ('{"step": {}}', "unreadable lines|cut off"),
        ("\x00", "unreadable lines|cut off"),
    ],
)
def test_absurd_lines_are_gaps(tmp_path, line, gap):
    run = make_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    page = write_report([run, make_run(tmp_path / "b")], tmp_path / "page.html").read_text()
    (loaded,) = load_runs([run])
    # Integers beyond any float are read as infinity, which a diverged run records too.
    assert gap is None or any(re.search(gap, each) for each in loaded.gaps)
    assert len(loaded.train) >= 20
    assert "Traceback" not in page


@pytest.mark.parametrize(
    "name", [b"\xff\xfe", b"a\x1b[2J", "\u202eexe".encode(), b"n" * 255, b"a&<b>"]
)
def test_odd_folder_names(tmp_path, name):
    folder = tmp_path / os.fsdecode(name)
    make_run(tmp_path / "a").rename(folder)
    out = write_report([folder, make_run(tmp_path / "b")], tmp_path / "page.html")
    text = out.read_text()
    assert "\x1b" not in text and "<b>" not in text.partition("</style>")[2].partition("<h2")[0]
    assert all(run.label.isprintable() for run in load_runs([folder]))


def test_absurd_results_and_unreadable_records_are_gaps(tmp_path):
    run = make_run(tmp_path / "a")
    write_eval_result(RunFolder(run).results(2), "unseen_face_test", {"acc1": 1e308, "acc5": 0.4})
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to("/proc/self/mem")
    (loaded,) = load_runs([run])
    assert loaded.final("unseen_face_test") == {"acc5": 0.4}
    assert any("numbers beyond 1e+100, which are left out: acc1" in gap for gap in loaded.gaps)
    assert any("metrics.jsonl cannot be read" in gap for gap in loaded.gaps)
