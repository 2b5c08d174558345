"""The rows of the study: their format, and the code that decides their numbers."""

from collections.abc import Iterable
from pathlib import Path

from studies.shared.code_digest import MODELS, TRAINING, code_digest
from studies.shared.results_file import ResultsFile

FORMAT = 2
ENTRIES = (*TRAINING, "studies.default.ideas", "studies.shared.error")
DATA = (*MODELS, "neuclip/recipes/demo.yaml")


def results_file(
    path: Path,
    data: str | None = None,
    same_code: Iterable[str] = (),
    *,
    any_code: bool = False,
) -> ResultsFile:
    """A file of rows of this study.

    Args:
        path: the file.
        data: digest of the data; None: any.
        same_code: digests of other code that the user knows to compute the same numbers.
        any_code: whether rows of all code are read, for reports.
    """
    advice = {
        1: "it has the method names used until 2026-11-28, rewrite it with "
        f"`python -m studies.default.migrate {path}`"
    }
    code = None if any_code else code_digest(ENTRIES, DATA)
    return ResultsFile(path, (FORMAT, advice), code, lambda _: data, same_code)
