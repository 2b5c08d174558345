"""The report in a browser, at desktop and phone width."""

import browser
from neuclip.report import ReportOptions, write_report

pytestmark = browser.NEEDED


def test_the_page_fits_its_window(runs, tmp_path):
    folders = [runs.make("a-run", "openclip"), runs.make("another-run")]
    for run, skill in zip(folders, (0.4, 0.5), strict=True):
        runs.evaluate_split(run, skill)
        runs.evaluate(run, skill)
    page = write_report(folders, tmp_path / "page.html", ReportOptions(published="DFN-14M"))
    with browser.window() as window:
        window.get(page.as_uri())
        for width in (1280, 390):
            browser.resize(window, width)
            assert window.execute_script("return document.documentElement.scrollWidth") == width
        assert browser.problems(window) == []
        assert "Comparison" in browser.texts(window, "h2")
