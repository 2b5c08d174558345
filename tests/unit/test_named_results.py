"""Results and scripts that are named in the documents, studies and scripts exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("studies/*/*.md")]
SCRIPTS = [
    path
    for folder in ("benchmarks", "examples", "scripts", "studies")
    for path in (ROOT / folder).glob("**/*.py")
]
PATH = re.compile(r"\b(?:benchmarks|examples|scripts|studies)/[\w./-]+\.(?:py|md|jsonl?|svg)\b")
RESULT = re.compile(
    r"\b(?:against_open_clip|chaos|demo_one_seed|loader|loss_memory|normalizer_probe|sample_table"
    r"|sharded_prototypes|step_parts|zero_shot)[\w-]*\.json\b"
)


def missing(path: Path, text: str) -> list[str]:
    folders = [ROOT / "benchmarks" / "results", ROOT / "studies" / "default" / "results"]
    results = {result.name for folder in folders for result in folder.iterdir()}
    names = [name for name in PATH.findall(text) if not (ROOT / name).exists()]
    names += sorted(set(RESULT.findall(text)) - results)
    return [f"{path.relative_to(ROOT)}: {name}" for name in names]


def test_results_and_scripts_named_in_pages_exist():
    assert not [each for page in PAGES for each in missing(page, page.read_text(encoding="utf-8"))]


def test_scripts_named_in_docstrings_exist():
    """A script's docstring has its command."""
    docstrings = {path: path.read_text(encoding="utf-8").split('"""')[1] for path in SCRIPTS}
    named = re.compile(r"python (?:benchmarks|examples|scripts|studies)/[\w/]+\.py")
    assert not [
        f"{path}: {command}"
        for path, text in docstrings.items()
        for command in named.findall(text)
        if not (ROOT / command.removeprefix("python ")).exists()
    ]


def test_modules_named_in_commands_exist():
    """Studies are packages: `python -m studies.default.run`."""
    named = re.compile(r"python -m (studies(?:\.\w+)+)")
    texts = {path: path.read_text(encoding="utf-8") for path in (*PAGES, *SCRIPTS)}
    modules = {(path, name) for path, text in texts.items() for name in named.findall(text)}
    assert len({name for _, name in modules}) > 3
    assert not [
        f"{path}: {name}"
        for path, name in modules
        if not (ROOT / name.replace(".", "/")).with_suffix(".py").exists()
    ]
