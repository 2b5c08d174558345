"""Takes the picture of the search page that the README shows, and lists whose drawings are on it.

    python scripts/search_picture.py RUN QUERY --icons OUT/icons --out docs/assets/search.png

RUN is a model of icons and OUT the folder of examples/icon_search. The page is that of `neuclip
search` in a headless Chromium (packages chromium and chromium-driver). Prints a line for each set
on the picture, as in CREDITS.md, and ends with an error if one may not be shown with credit alone.
"""

import argparse
import re
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from selenium.webdriver import Keys  # noqa: E402

import browser  # noqa: E402  a helper of the tests
from neuclip.config.data_sections import ReadingConfig  # noqa: E402
from neuclip.data.opening import open_source  # noqa: E402

SPLITS = ("unseen_style_development", "unseen_style_test")
PERMISSIVE = {"MIT", "Apache-2.0", "CC0-1.0", "CC-BY-4.0", "CC-BY-3.0", "ISC", "OFL-1.1"}
_VISIBLE = """return [...document.querySelectorAll('#grid img')]
    .filter(e => e.getBoundingClientRect().top < innerHeight).map(e => e.src)"""
_LOADED = """[...document.querySelectorAll('#grid img')]
    .filter(e => e.getBoundingClientRect().top < innerHeight).every(e => e.naturalWidth)"""

# A browser without a screen takes itself for one without a mouse, and shows every button.
_AT_REST = """document.activeElement.blur();
document.querySelectorAll('.add').forEach(e => { e.style.opacity = 0 })"""


@contextmanager
def served(run: str, images: str, embeddings: str | None) -> Generator[str]:
    """The address of the page, in a process of its own."""
    line = [sys.executable, "-m", "neuclip", "search", run, "--images", images, "--port", "0"]
    line += ["--device", "cpu", "--workers", "0"]
    line += [] if embeddings is None else ["--embeddings", embeddings]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            for said in server.stdout:
                if found := re.match(r"(http://127\.0\.0\.1:\d+/[\w-]+/) ", said):
                    yield found[1]
                    return
            sys.exit("neuclip search ended without an address")
        finally:
            server.send_signal(signal.SIGINT)


def take(address: str, query: str, out: Path, size: tuple[int, int]) -> list[int]:
    """Saves the picture, and returns the positions of the images on it, best first."""
    with browser.started() as page:
        browser.resize(page, *size)
        page.get(address)
        browser.find(page, "#text").send_keys(query + Keys.ENTER)
        browser.wait(page, "document.querySelector('#grid').dataset.turn === '1'")
        browser.wait(page, _LOADED)
        page.execute_script(_AT_REST)
        page.save_screenshot(str(out))
        sources = page.execute_script(_VISIBLE)
    return [int(parse_qs(urlsplit(source).query)["position"][0]) for source in sources]


def main() -> None:
    """Takes the picture and prints the credits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run")
    parser.add_argument("query")
    parser.add_argument("--icons", type=Path, required=True)
    parser.add_argument("--embeddings")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, nargs=2, default=(1100, 812))
    given = parser.parse_args()
    parts = [str(given.icons / split) for split in SPLITS]
    with served(given.run, "::".join(parts), given.embeddings) as address:
        positions = take(address, given.query, given.out, tuple(given.size))
    reading = ReadingConfig(label_key="set")  # the index then knows the records
    sources = [open_source(part, reading) for part in parts]
    records = [source.record(at) for source in sources for at in range(len(source))]
    shown = [records[position] for position in positions]
    for record in shown:
        print(f"{record['name']}  ({record['licence']})")
    credits = (given.icons / "CREDITS.md").read_text(encoding="utf-8").splitlines()
    print()
    for name in dict.fromkeys(str(record["set"]) for record in shown):
        print(next(line for line in credits if f" ({name})," in line))
    if others := {str(record["licence"]) for record in shown} - PERMISSIVE:
        sys.exit(f"not to be shown with credit alone: {', '.join(sorted(others))}")


if __name__ == "__main__":
    main()
