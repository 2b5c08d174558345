"""The report in a browser, at desktop and phone width."""

import browser
from neuclip.report import ReportOptions, write_report

pytestmark = [browser.NEEDED, browser.GROUP]


def test_the_page_fits_its_window(window, runs, tmp_path):
    methods = ("openclip", "neuclip", "siglip", "fastclip_v3")
    folders = [runs.make(f"a-run-of-{method}", method) for method in methods]
    for run, skill in zip(folders, (0.4, 0.5, 0.45, 0.3), strict=True):
        runs.evaluate_split(run, skill)
        runs.evaluate(run, skill)
    page = write_report(folders, tmp_path / "page.html", ReportOptions(published="DFN-14M"))
    browser.problems(window)  # of earlier pages
    window.get(page.as_uri())
    for width in (1280, 390):
        browser.resize(window, width)
        assert window.execute_script("return document.documentElement.scrollWidth") == width
        shares = "[...document.querySelectorAll('.panels svg')].map(e => e.clientWidth)"
        widths = window.execute_script(f"return {shares}")
        assert len(widths) == 3 and all(250 < found <= 500 for found in widths)
    assert browser.problems(window) == []
    assert "Comparison" in browser.texts(window, "h2")
