"""Fails if a built page loads anything from another host: `python scripts/check_site.py site`."""

import sys
from html.parser import HTMLParser
from pathlib import Path

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class Loads(HTMLParser):
    """Collects the addresses of what a page loads by itself; links to click are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.remote: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keeps the address of a script, style sheet, image or frame of another host."""
        address = dict(attrs).get(LOADS.get(tag, ""))
        if address and address.startswith(("http://", "https://", "//")):
            self.remote.append(address)


def remote_loads(page: Path) -> list[str]:
    """Addresses on other hosts that a page loads."""
    parser = Loads()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser.remote


if __name__ == "__main__":
    pages = sorted(Path(sys.argv[1]).rglob("*.html"))
    problems = [f"{page} loads {address}" for page in pages for address in remote_loads(page)]
    sys.exit("\n".join(problems) or (0 if pages else f"no pages in {sys.argv[1]}"))
