"""Writes README's table of methods from the catalogue: `python scripts/readme_methods.py`."""

from pathlib import Path

from neuclip.catalogue.registry import METHODS

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- methods: written by scripts/readme_methods.py -->\n", "<!-- /methods -->"


def table() -> str:
    """The catalogue as a Markdown table."""
    rows = [
        f"| `{info.name}` | {info.normalizer} | {info.state} | "
        f"{'yes' if info.needs_sample_ids else 'no'} |"
        for info in METHODS.values()
    ]
    head = (
        "| name | what estimates the normalizer | state | needs sample ids |\n|---|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


def with_table(readme: str) -> str:
    """README's text with the table as it should be."""
    before, rest = readme.split(START)
    _, after = rest.split(END)
    return before + START + table() + END + after


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
