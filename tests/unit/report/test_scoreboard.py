import io
import re
import statistics

import pytest
from PIL import Image

from neuclip.cli.app import main
from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.report import write_report
from neuclip.report.comparison import best_averages, best_results
from neuclip.report.entries import choose_baseline, entries
from neuclip.report.panels import inline_panels, panel_files
from neuclip.report.quoted import quoted_for
from neuclip.report.runs import load_runs
from neuclip.report.scoreboard import average_series, scoreboard


def board_of(folders, baseline=None, quoted=()):
    found = entries(load_runs(folders))
    return scoreboard(found, choose_baseline(found, baseline), quoted)


@pytest.fixture(scope="module")
def three(shared_runs):
    """openclip and neuclip with two seeds each, and siglip without most of the tasks."""
    runs, folders, scores = shared_runs, [], {}
    for method, skill in (("openclip", 0.4), ("neuclip", 0.5)):
        for seed in (1, 2):
            run = runs.make(f"{method}-{seed}", method, seed=seed)
            scores[run.name] = runs.evaluate(run, skill + seed / 100, seed=seed)
            folders.append(run)
    part = runs.make("siglip", "siglip")
    runs.evaluate(part, 0.45, tasks=load_suite().members["imagenet-variants"].tasks)
    return [*folders, part], scores


def test_panels(three):
    folders, scores = three
    board = board_of(folders)
    assert [panel.title for panel in board.panels] == [
        "DataComp average (38)", "ImageNet & variants (7)", "Retrieval (Flickr + MSCOCO)",
    ]  # fmt: skip
    datacomp, variants, retrieval = (panel.bars for panel in board.panels)
    ours = [scores["neuclip-1"], scores["neuclip-2"]]
    assert datacomp[1].values == pytest.approx(ours)
    assert datacomp[1].mean == pytest.approx(statistics.fmean(ours))
    assert datacomp[1].deviation == pytest.approx(statistics.stdev(ours))
    assert (datacomp[2].values, datacomp[2].why) == ([], "7 of 38 tasks")
    assert len(variants[2].values) == 1 and variants[2].deviation is None
    assert (retrieval[2].mean, retrieval[2].why) == (None, "0 of 2 tasks")


def test_a_seed_without_all_tasks_is_left_out_and_marked(three, runs):
    folders, _ = three
    third = runs.make("neuclip-3", "neuclip", seed=3)
    runs.evaluate(third, 0.9, tasks=["imagenet1k"])
    bar = board_of([*folders, third]).panels[0].bars[1]
    assert len(bar.values) == 2 and bar.why == "1 of 3 seeds have 1 of 38 tasks"


def test_rows_and_differences(three):
    folders, scores = three
    board = board_of(folders)
    assert [row.name for row in board.rows] == [t.name for t in load_suite().tasks.values()]
    base, ours, part = board.rows[0].cells
    means = [
        statistics.fmean([scores[f"{m}-{s}"] for s in (1, 2)]) for m in ("openclip", "neuclip")
    ]
    assert base.value == pytest.approx(means[0]) and base.difference is None
    assert ours.value == pytest.approx(means[1])
    told = ours.difference
    assert told.value == pytest.approx(means[1] - means[0])
    assert told.low < told.value < told.high and told.clear and told.over == "samples"
    assert part.difference.over == "samples"
    assert board.rows[-1].cells[2].value is None
    average = {row.name: row for row in board.averages}["DataComp average"]
    assert average.cells[1].difference.over == "samples"
    # An average over 38 tasks, drawn task by task, is surer than one task.
    assert (
        average.cells[1].difference.high - average.cells[1].difference.low
        < (told.high - told.low) / 3
    )
    assert average.cells[2].value is None


def test_without_outcomes_averages_are_drawn_over_tasks(runs):
    folders = [runs.make("a", "openclip"), runs.make("b")]
    for number, run in enumerate(folders):
        for place, key in enumerate(load_suite().members["imagenet-variants"].tasks):
            runs.evaluate(
                run, 0.4 + 0.1 * number + 0.01 * number * place, tasks=[key], outcomes=False
            )
    board = board_of(folders)
    assert board.rows[0].cells[1].difference.low is None
    averages = {row.name: row for row in board.averages}
    told = averages["ImageNet & variants"].cells[1].difference
    assert told.over == "tasks" and told.low < told.value < told.high
    assert averages["DataComp average"].why == "7 of 38 tasks"


def test_other_data_are_not_paired(runs):
    folders = [runs.make("a", "openclip"), runs.make("b")]
    runs.evaluate(folders[0], 0.4, tasks=["cars"])
    runs.evaluate(folders[1], 0.5, tasks=["cars"], data="other")
    assert board_of(folders).rows[0].cells[1].difference.low is None


def test_splits_if_no_run_was_evaluated_on_the_benchmark(runs):
    folders = [runs.make("a", "openclip"), runs.make("b"), runs.make("c", seed=1)]
    for run, acc1 in zip(folders, (0.2, 0.3, 0.4), strict=True):
        runs.evaluate_split(run, acc1)
    runs.evaluate_split(folders[0], 0.1, "other")
    board = board_of(folders)
    assert not board.of_benchmark and board.averages == []
    face, other = board.panels
    assert face.title == "unseen_face_test: zero-shot top-1" and face.chance == 0.01
    assert [bar.values for bar in face.bars] == [[0.2], [0.3, 0.4]]
    assert (other.bars[1].values, other.bars[1].why) == ([], "2 of 2 not evaluated")
    assert board.rows[0].cells[1].difference.value == pytest.approx(0.15)


def test_published_numbers_stand_beside(three):
    folders, _ = three
    board = board_of(folders, quoted=quoted_for("CC3M"))
    quoted = [bar for bar in board.panels[1].bars if bar.color < 0]
    assert "FastCLIP-v1, CC3M (quoted)" in [bar.label for bar in quoted]
    assert "NeuCLIP, CC3M (second-hand)" in [bar.label for bar in board.panels[0].bars]
    assert len(quoted) == 4


def test_published_numbers_beside_runs_without_benchmark_results(runs):
    folders = [runs.make("a", "openclip"), runs.make("b")]
    for run, acc1 in zip(folders, (0.2, 0.3), strict=True):
        runs.evaluate_split(run, acc1)
    board = board_of(folders, quoted=quoted_for("CC3M"))
    assert [bar.why for bar in board.panels[0].bars[:2]] == ["0 of 38 tasks"] * 2
    assert [row.name for row in board.rows] == ["unseen_face_test"] and board.averages == []


def test_curves_of_the_averages(three, runs):
    folders, _ = three
    early = runs.evaluate(folders[0], 0.3, epoch=4)
    board = board_of(folders)
    points = average_series(board, board.entries[0].runs[0], "datacomp")
    assert points[0] == pytest.approx((4000, early))
    assert [x for x, _ in points] == [4000, 8000]
    assert average_series(board, board.entries[2].runs[0], "datacomp") == []


def test_the_headline_is_the_benchmarks_average_of_the_best_entry(three):
    folders, scores = three
    first, variants, _ = best_averages(board_of(folders))
    mean = statistics.fmean([scores["neuclip-1"], scores["neuclip-2"]])
    assert (first.split, first.best, first.seeds) == ("DataComp average (38)", "neuclip", 2)
    assert first.value == f"{100 * mean:.1f} %"
    assert (first.rivals, variants.rivals) == (2, 3)  # siglip lacks tasks of the average over 38


def test_the_headline_of_splits_is_a_mean_over_seeds_and_counts_ties(runs):
    folders = [runs.make("a", "openclip"), runs.make("b"), runs.make("c", seed=1)]
    for run, acc1 in zip(folders, (0.3, 0.1, 0.5), strict=True):
        runs.evaluate_split(run, acc1)
    loaded = load_runs(folders)
    assert best_averages(board_of(folders)) == []
    (best,) = best_results(loaded, entries(loaded))
    assert (best.best, best.value, best.seeds) == ("a and 1 other", "30.0 %", 1)


class TestFigure:
    def test_files_are_whole_and_equal_for_equal_input(self, three):
        board = board_of(three[0], quoted=quoted_for("CC3M"))
        one, again = panel_files(board.panels), panel_files(board.panels)
        assert one == again
        image = Image.open(io.BytesIO(one.png))
        assert image.width > 1500 and len(image.convert("RGB").getcolors(2**20)) > 20
        assert "#0a0001" not in one.svg and "#1f5fd0" in one.svg

    def test_what_it_says(self, three):
        drawings = inline_panels(board_of(three[0], quoted=quoted_for("CC3M")).panels)
        assert len(drawings) == 3
        svg = "".join(drawings)
        assert "7 of 38 tasks" in svg and "not published" in svg and "±" in svg
        assert "var(--series-1)" in svg
        assert (
            svg.count("fill: url(#panels-") >= 9
        )  # hatched: five in the first panel, four in others

    @pytest.mark.parametrize(("best", "last"), [(0.97, "100"), (0.6, "60"), (0.031, "4")])
    def test_no_tick_is_above_100_per_cent(self, runs, best, last):
        folders = [runs.make("a", "openclip"), runs.make("b"), runs.make("c", seed=1)]
        for run, acc1 in zip(folders, (best / 2, best, best), strict=True):
            runs.evaluate_split(run, acc1)
        (svg,) = inline_panels(board_of(folders).panels)
        assert re.findall(r">(\d+)</text>", svg)[-1] == last

    def test_a_page_has_the_figure_beside_it(self, three, tmp_path, capsys):
        folders, _ = three
        out = tmp_path / "new" / "page.html"
        flags = ["--out", str(out), "--published", "--published-data", "cc12m"]
        assert main(["report", *map(str, folders), *flags]) == 0
        assert capsys.readouterr().out.splitlines() == [str(out)]
        assert sorted(p.name for p in out.parent.iterdir()) == ["page.html", "page.png", "page.svg"]
        page = out.read_text()
        assert page.count("second-hand") > 20 and "Hatched bars are quoted" in page
        assert re.search(r"neuclip.*?2 seeds", page, re.DOTALL)
        text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
        assert re.search(r"\+\d+\.\d\d \[\+\d+\.\d\d, \+\d+\.\d\d\]", text)

    def test_figures_replace_only_figures_of_a_report(self, runs, tmp_path, capsys):
        folders = [runs.make("a", "openclip"), runs.make("b")]
        for run, acc1 in zip(folders, (0.2, 0.3), strict=True):
            runs.evaluate_split(run, acc1)
        out = tmp_path / "page.html"
        for _ in range(2):
            write_report(folders, out)
        for name, content in [("page.png", b"mine"), ("page.svg", b"<svg/>"), ("page.svg", b"")]:
            before = (tmp_path / name).read_bytes()
            (tmp_path / name).write_bytes(content)
            out.unlink(missing_ok=True)
            assert main(["report", *map(str, folders), "--out", str(out)]) == 2
            assert f"{name} exists and was not written by" in capsys.readouterr().err
            assert (tmp_path / name).read_bytes() == content and not out.exists()
            (tmp_path / name).write_bytes(before)

    def test_one_run_with_splits_of_its_own_has_nothing_to_compare(self, runs, tmp_path):
        run = runs.make("a")
        runs.evaluate_split(run, 0.3)
        page = write_report([run], tmp_path / "page.html").read_text()
        assert "<h2>Comparison" not in page
        assert not (tmp_path / "page.png").exists()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--baseline", "nobody"], "--baseline 'nobody' is not among the compared runs"),
        (["--published-data", "CC3M"], "add --published"),
        (["--published", "--published-data", "CC3"], "no published numbers for training set 'CC3'"),
        (["--out", "x.png"], "give an HTML file"),
    ],
)
def test_bad_input(runs, flags, text, capsys):
    run = runs.make("a")
    assert main(["report", str(run), *flags]) == 2
    assert text in capsys.readouterr().err
