"""The documentation against the code: generated pages, links, file names, commands."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from neuclip.cli.train import parse_train

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SRC = ROOT / "src" / "neuclip"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "examples" / "icon_search" / "README.md",
    *PAGES,
]

# Files that a run, an export or a user's data have, written as paths in the pages.
ELSEWHERE = re.compile(
    r"^(checkpoints|eval_results|logs|datasets|smoke|first|demo|out)/|[<*{ ]|\.\.\."
)


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page_id(path):
    return path.relative_to(ROOT).as_posix()


def text_of(path):
    return path.read_text(encoding="utf-8")


def split_code(text):
    """The prose of a page, and its fenced blocks of code with their language."""
    prose, blocks, fence = [], [], None
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fence = None if fence else (line.strip("` "), [])
            blocks += [fence] if fence else []
        elif fence:
            fence[1].append(line)
        else:
            prose.append(line)
    return "\n".join(prose), [(language, "\n".join(code)) for language, code in blocks]


def prose(text):
    return split_code(text)[0]


def anchors(page):
    """The anchors of a page's headings, as Python-Markdown and GitHub both write them."""
    headings = re.findall(r"^#+ (.+)$", prose(text_of(page)), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"\s", "-", heading) for heading in plain}


def commands(text):
    """The command lines in a page's code blocks, with continued lines joined."""
    for language, code in split_code(text)[1]:
        for line in code.replace("\\\n", " ").splitlines() if not language else ():
            if words := shlex.split(line, comments=True):
                yield words


def test_generated_pages_are_current():
    stale = [
        page_id(page)
        for page, text in script("reference_pages").pages().items()
        if text_of(page) != text
    ]
    assert not stale, f"run `python scripts/reference_pages.py`: {stale}"


def test_the_architecture_lists_every_module():
    named = set(re.findall(r"^\| `([\w/]+\.py)`", text_of(DOCS / "architecture.md"), re.MULTILINE))
    folders = set(re.findall(r"^### neuclip/(\S*?)/?$", text_of(DOCS / "architecture.md"), re.M))
    files = {path.relative_to(SRC) for path in SRC.rglob("*.py")}
    assert named == {path.as_posix() for path in files if path.name != "__init__.py"}
    assert folders == {path.parent.as_posix().removeprefix(".") for path in files}


def test_every_page_is_in_the_navigation():
    def leaves(entry):
        if isinstance(entry, str):
            yield entry
        else:
            for child in entry.values() if isinstance(entry, dict) else entry:
                yield from leaves(child)

    navigation = tomllib.loads(text_of(ROOT / "zensical.toml"))["project"]["nav"]
    assert sorted(leaves(navigation)) == [page.relative_to(DOCS).as_posix() for page in PAGES]


@pytest.mark.parametrize("page", TEXTS, ids=page_id)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose(text_of(page))):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", TEXTS, ids=page_id)
def test_named_files_exist(page):
    """Paths in code spans, from the root of the repository or of the package."""
    for name in re.findall(r"`([\w.*{}<> -]+/[\w./*{}<> -]+\.\w+)`", prose(text_of(page))):
        if not ELSEWHERE.search(name):
            assert (ROOT / name).exists() or (SRC / name).exists(), name


@pytest.mark.parametrize("page", TEXTS, ids=page_id)
def test_training_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the commands with files of the repository are typed
    for words in commands(text_of(page)):
        if words[:2] in (["neuclip", "train"], ["neuclip", "finetune"]):
            parse_train(words[2:], words[1])
        elif "neuclip.training.main" in words:
            parse_train(words[words.index("neuclip.training.main") + 1 :])


@pytest.mark.parametrize("page", TEXTS, ids=page_id)
def test_other_commands_have_their_flags(page):
    help_text = text_of(DOCS / "reference" / "flags.md")
    for words in commands(text_of(page)):
        if words[0] != "neuclip" or words[1] in {"train", "finetune"}:
            continue
        name = " ".join(words[1:3]) if words[1] == "data" else words[1]
        section = help_text.split(f"\n## neuclip {name}\n")[1].split("\n## ")[0]
        for flag in (word.replace("_", "-") for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", section), f"neuclip {name} {flag}"


def test_readme_is_short():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 130


def test_messages_to_look_up_exist():
    """The pieces of messages in tables headed `message`, between their values."""
    code = "\n".join(text_of(path) for path in SRC.rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    tables = re.findall(r"^\| message \|.*\n((?:\|.*\n)+)", text_of(DOCS / "data.md"), re.MULTILINE)
    messages = re.findall(r"^\| `(.+?)` \|", "".join(tables), re.MULTILINE)
    assert len(messages) > 5
    for message in messages:
        for piece in re.split(r"\.\.\.|: |\b[NM]\b|HTTP.*|\d+", message):
            assert piece.strip(" :()") in code, message
