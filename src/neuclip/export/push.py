"""`neuclip push`: uploads an export to the Hugging Face hub, in one commit.

`huggingface_hub` does the transfers. It reads `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and
`HF_HUB_OFFLINE`.
"""

import logging
import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from neuclip.errors import UserError, printable
from neuclip.export.exported_files import CARD, ExportedFiles
from neuclip.files import describe
from neuclip.masking import mask

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi
    from huggingface_hub.errors import HfHubHTTPError

log = logging.getLogger("neuclip")

MAIN = "main"
_CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
_FOLDER_IN_CODE = re.compile(r'"(?:local-dir:)?([^"/\n]+)/[^"\n]+"')
_TOKEN_FROM = "HF_TOKEN, or `hf auth login`"
_LOADABLE = {"open_clip_config.json", "open_clip_model.safetensors"}
"""What a repository on the hub is loaded from."""
_SHOWN = 5


@dataclass(frozen=True)
class Destination:
    """Where an export goes.

    Attributes:
        repository: `OWNER/NAME`.
        branch: the branch; made from `main` if it is missing.
        private: make a new repository private, and refuse a public one.
    """

    repository: str
    branch: str = MAIN
    private: bool = False

    @property
    def page(self) -> str:
        """The address of the repository."""
        from huggingface_hub import constants

        return f"{mask(constants.ENDPOINT)}/{self.repository}"

    def loading(self, files: ExportedFiles) -> str:
        """Code that loads the model; where files alone are of use, the command that gets them."""
        branch = None if self.branch == MAIN else self.branch
        if files.files.keys() >= _LOADABLE:
            return f'neuclip.load("hf-hub:{self.repository}{f"@{branch}" if branch else ""}")'
        revision = f" --revision {branch}" if branch else ""
        return f"hf download {self.repository}{revision} --local-dir DIR"


@dataclass(frozen=True)
class Pushed:
    """The outcome of a push.

    Attributes:
        commit: address of the commit; of the newest one if nothing had changed.
        changed: whether there is a new commit.
        stay: other files of the repository, which stay as they were.
    """

    commit: str
    changed: bool
    stay: list[str]


def check_destination(to: Destination) -> None:
    """Checks the names of repository and branch, without the network.

    Raises:
        UserError: one of them is malformed.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = to.repository
    if "@" in name:
        raise UserError(f"{printable(name)}: give the branch with --revision, not with @")
    if name.count("/") != 1:
        raise UserError(f"{printable(name)}: OWNER/NAME is expected, such as you/my-clip")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{printable(name)}: {printable(str(error), 200)}") from None
    if not re.fullmatch(r"[\w.][\w./-]*", to.branch) or ".." in to.branch:
        raise UserError(f"--revision {printable(to.branch)!r} cannot be the name of a branch")


def check_online() -> None:
    """Checks that an upload can start: the network is allowed, and there is an access token.

    Raises:
        UserError: `HF_HUB_OFFLINE` is set, or there is no token.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "cannot push: HF_HUB_OFFLINE is set; unset it to use the network, or see what would be "
            "sent with --dry-run"
        )
    if get_token() is None:
        raise UserError(
            f"cannot push without an access token; give one that may write ({_TOKEN_FROM}), which "
            f"{_token_page()} makes"
        )


def push(files: ExportedFiles, to: Destination, message: str) -> Pushed:
    """Uploads the files of an export in one commit; the repository is made if it is missing.

    The commit comes after all uploads, so that a failure leaves the branch as it was. Files that
    the hub has already are not sent again.

    Args:
        files: the export.
        to: where it goes.
        message: of the commit.

    Raises:
        UserError: the hub cannot be asked, or refuses; or the repository is public although
            `private` is set.
    """
    from huggingface_hub import HfApi

    with _progress_in_terminals(), _errors_as_messages(to):
        hub = HfApi(token=True)
        hub.create_repo(to.repository, private=to.private or None, exist_ok=True)
        found = hub.model_info(to.repository)
        if to.private and found.private is False:
            raise UserError(
                f"{to.page} exists and is public: make it private in its settings, or push "
                "without --private"
            )
        if to.branch != MAIN:
            hub.create_branch(to.repository, branch=to.branch, exist_ok=True)
        before = hub.model_info(to.repository, revision=to.branch).sha
        done = _commit(hub, files, to, message)
    stay = _other_files(hub, files, to, done.oid)
    return Pushed(mask(done.commit_url), done.oid != before, stay)


@contextmanager
def _progress_in_terminals() -> Generator[None]:
    """Shows the hub's progress bars only in a terminal; other users of the library keep theirs."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _commit(hub: "HfApi", files: ExportedFiles, to: Destination, message: str) -> "CommitInfo":
    from huggingface_hub import CommitOperationAdd

    return hub.create_commit(
        to.repository,
        [
            CommitOperationAdd(
                name, files.card.encode() if name == CARD else str(files.folder / name)
            )
            for name in files.files
        ],
        commit_message=message,
        revision=to.branch,
    )


def _other_files(hub: "HfApi", files: ExportedFiles, to: Destination, commit: str) -> list[str]:
    """The files of a commit that are not of the export.

    Raises:
        UserError: the commit lacks files of the export, or has them in another size.
    """
    from huggingface_hub import errors

    try:
        listed = hub.model_info(to.repository, revision=commit, files_metadata=True).siblings
    except (
        errors.HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # the HTTP client's base
        ValueError,
    ) as error:
        why = printable(_without_token(describe(error)), 200)
        log.warning("pushed, but the files of the commit could not be compared: %s", why)
        return []
    there = {file.rfilename: file.size for file in listed or []}
    wrong = [name for name, size in files.files.items() if there.get(name) != size]
    if wrong:
        raise UserError(
            f"{to.page}: the commit {commit} lacks {', '.join(wrong)}, or has other content; "
            "a .gitignore of the repository may exclude it: change that, and push again"
        )
    return sorted(there.keys() - files.files.keys() - {".gitattributes", ".gitignore"})


def for_hub(files: ExportedFiles, repository: str) -> ExportedFiles:
    """The export with a card whose code loads the towers from the hub, not from the folder."""
    card = _card_for_hub(files.card, repository)
    return replace(files, card=card, files={**files.files, CARD: len(card.encode())})


def _card_for_hub(card: str, repository: str) -> str:
    found = _CODE.search(card)
    if found is None:
        return card
    code = found[1]
    if 'create_model_and_transforms("local-dir:' in code:
        code = re.sub(r'"local-dir:[^"\n]*"', f'"hf-hub:{repository}"', code)
        code = re.sub(r'from_pretrained\("[^"\n]*"\)', f'from_pretrained("{repository}")', code)
    elif folder := _FOLDER_IN_CODE.search(code):
        code = f'# the files: hf download {repository} --local-dir "{folder[1]}"\n{code}'
    return card[: found.start(1)] + code + card[found.end(1) :]


def shown_names(names: list[str]) -> str:
    """Some names in one line, the first of many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(printable(name) for name in names[:_SHOWN]) + more


@contextmanager
def _errors_as_messages(to: Destination) -> Generator[None]:
    """Turns the errors of an upload into messages that name the remedy.

    Raises:
        UserError: the block failed.
    """
    from huggingface_hub import constants, errors

    try:
        yield
    except UserError:
        raise
    except errors.HfHubHTTPError as error:
        raise _refused(error, to) from None
    except errors.OfflineModeIsEnabled:
        raise UserError("cannot push: HF_HUB_OFFLINE is set; unset it to use the network") from None
    except (
        errors.HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # the HTTP client's base
        ConnectionError,  # of hf_xet
        RuntimeError,  # of both; the cause of one file's failure is inside
    ) as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if isinstance(cause, errors.HfHubHTTPError):
            raise _refused(cause, to) from None
        why = _without_token(describe(cause)).rstrip(".")
        xet = "; a hub without Xet needs HF_HUB_DISABLE_XET=1" if "/xet-" in why else ""
        raise UserError(
            f"cannot push to {to.page}: {why}. Check the connection and HF_ENDPOINT "
            f"({mask(constants.ENDPOINT)}){xet}. {_UNKNOWN}"
        ) from None
    except ValueError as error:  # a card that the hub does not accept, or an answer without sense
        lines = " ".join(_without_token(str(error)).split())
        raise UserError(
            f"{to.page}: {printable(lines, 300).rstrip('.')}. {_NOTHING_DONE}"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot push {error.filename or ''}".rstrip() + f": {describe(error)}. {_NOTHING_DONE}"
        ) from None


_NOTHING_DONE = "Nothing was committed, and files that arrived are not sent again."
_UNKNOWN = (
    "The branch is as it was, or has the whole commit; push again: files that arrived are not sent "
    "again."
)


def _refused(error: "HfHubHTTPError", to: Destination) -> UserError:
    """The message for an answer of the hub, by its status."""
    status = error.response.status_code
    said = error.server_message or error.response.headers.get("X-Error-Message") or ""
    words = printable(_without_token(" ".join(said.split())), 200)
    answer = f"{to.page}: HTTP {status}" + (f" ({words})" if words else "")
    owner = to.repository.partition("/")[0]
    remedies = {
        400: "the hub does not take these names, or this card",
        401: f"the access token is not valid: give another ({_TOKEN_FROM}; {_token_page()})",
        403: f"the access token may not write there: it needs write access to {owner} "
        f"({_token_page()}), or another OWNER is meant",
        404: "the repository, or the branch, is gone: check OWNER/NAME and --revision",
        409: "another change came in between: push again",
        412: "another change came in between: push again",
        413: "a file is larger than the hub takes",
        429: "too many requests: push again later",
    }
    if status >= 500:
        return UserError(f"{answer}: the hub is out of order. {_UNKNOWN}")
    return UserError(f"{answer}: {remedies.get(status, 'the hub refused it')}. {_NOTHING_DONE}")


def _without_token(text: str) -> str:
    """Text of others without secrets, also without a token that does not look like one."""
    from huggingface_hub import get_token

    token = get_token()
    return mask(text.replace(token, "***") if token else text)


def _token_page() -> str:
    from huggingface_hub import constants

    return f"{mask(constants.ENDPOINT)}/settings/tokens"
