"""The Hugging Face hub: one file of a repository, progress, and errors as messages.

`huggingface_hub` does the transfers. It reads `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and
`HF_HUB_OFFLINE`, and sends the token to the hub alone. Imports no torch.
"""

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neuclip.errors import UserError, printable
from neuclip.files import cannot_write, describe, sha256
from neuclip.masking import mask

log = logging.getLogger("neuclip")

PREFIX = "hf-hub:"
_REPORTED_EVERY = 15.0
"""Seconds between two lines about a download."""
_SHA256 = 64
"""Digits of a SHA-256: the hub's tag of a large file. That of a small one is a SHA-1."""


def with_revision(name: str) -> tuple[str, str | None]:
    """Repository and revision of `owner/name@revision`; no revision: the newest commit.

    Raises:
        UserError: nothing follows the `@`.
    """
    repository, at, revision = name.partition("@")
    if at and not revision:
        raise UserError(f"{printable(name)}: a branch, tag or commit of the repository follows @")
    return repository, revision or None


def in_cache(repository: str, names: Sequence[str]) -> Path | None:
    """The first of some files that the cache holds, at the commit fetched last; None without any.

    Args:
        repository: `owner/name`, or `owner/name@revision`.
        names: files of the repository, in the order of preference.

    Raises:
        UserError: that is not the name of a repository.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    plain, revision = with_revision(repository)
    try:
        found = (try_to_load_from_cache(plain, name, revision=revision) for name in names)
        return next((Path(path) for path in found if isinstance(path, str)), None)
    except HFValidationError as error:
        raise UserError(f"{printable(repository)}: {printable(str(error), 200)}") from None


class Repository:
    """A repository of models on the hub, whose files are kept in the cache.

    If the hub does not answer, or must not be asked, the copies in the cache serve from then on.

    Args:
        name: `owner/name`, or `owner/name@revision` for a branch, tag or commit.

    Raises:
        UserError: nothing follows the `@`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._plain, self._revision = with_revision(name)
        self._silent: _HubSilent | None = None

    def fetch(self, names: Sequence[str], *, optional: bool = False) -> Path | None:
        """Downloads the first of some files that the repository has, unless the cache holds it.

        Args:
            names: files of the repository, in the order of preference.
            optional: the files are not needed if the hub does not answer.

        Returns:
            The file in the cache; None if the repository has none of the files.

        Raises:
            UserError: there is no such repository, it is not accessible, the hub does not answer
                and the cache holds none of the files, or a file arrived damaged.
        """
        from huggingface_hub import constants

        kept = in_cache(self._name, names)
        if kept is not None and (constants.HF_HUB_OFFLINE or self._silent is not None):
            return kept
        try:
            if self._silent is not None:
                raise self._silent
            return self._ask(names)
        except _HubSilent as error:
            if kept is None and not optional:
                raise UserError(str(error)) from None
            if self._silent is None and not constants.HF_HUB_OFFLINE:
                log.warning("%s: the hub does not answer; taking the cache's copy", self._name)
            self._silent = error
            return kept

    def _ask(self, names: Sequence[str]) -> Path | None:
        revision = "" if self._revision is None else f" --revision {self._revision}"
        by_hand = (
            f"`hf download {self._plain}{revision} --local-dir DIR` on a machine with a "
            "connection; then give DIR"
        )
        page = f"{_endpoint()}/{self._plain}"
        with errors_as_messages(self._name, page, by_hand):
            found = (_fetched(self._plain, self._revision, name) for name in names)
            return next((path for path in found if path), None)


def _fetched(repository: str, revision: str | None, name: str) -> Path | None:
    """The file in the cache, downloaded if necessary; None if the repository has no such file."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        # Unlike the download itself, this does not repeat its request for minutes.
        get_hf_file_metadata(hf_hub_url(repository, name, revision=revision))
    except RemoteEntryNotFoundError:
        return None
    state = hf_hub_download(repository, name, revision=revision, dry_run=True)
    if not state.will_download:
        return Path(hf_hub_download(repository, name, revision=revision))
    log.info(
        "downloading %s of %s (%s) from %s, kept in %s",
        name, repository, _size(state.file_size), _endpoint(), constants.HF_HUB_CACHE,
    )  # fmt: skip
    bar = progress_bar(_Lines(), name)
    path = Path(hf_hub_download(repository, name, revision=revision, tqdm_class=bar))
    blob = path.resolve()
    if len(blob.name) == _SHA256 and sha256(blob) != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise UserError(
            f"{repository}: {name} arrived damaged (its SHA-256 is not {blob.name}) and was "
            "removed: run the command again"
        )
    return path


class _Lines:
    """Reports a download in the log, one line every some seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _REPORTED_EVERY

    def __call__(self, name: str, done: int, total: int) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _REPORTED_EVERY
        log.info("%s: %s of %s", name, _size(done), _size(total))


def _size(count: int | None) -> str:
    if count is None:
        return "of unknown size"
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def _endpoint() -> str:
    from huggingface_hub import constants

    return mask(constants.ENDPOINT)


def progress_bar(report: Callable[[str, int, int], None], name: str) -> type[Any]:
    """A progress bar for the hub's library that draws nothing and calls `report`."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
        def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            super().__init__(*args, **{**kwargs, "disable": False})

        def display(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
            report(name, int(self.n), int(self.total or 0))

        def close(self) -> None:
            if not self.disable:
                self.display()
            self.disable = True

    return Bar


class _HubSilent(UserError):
    """The hub does not answer, or must not be asked: a copy in the cache may serve."""


@contextmanager
def errors_as_messages(
    repository: str, page: str, remedy: str = "", folder: Path | None = None
) -> Generator[None]:
    """Turns the errors of `huggingface_hub` into messages that name the remedy.

    Args:
        repository: `owner/name`.
        page: address of its page.
        remedy: another way to get the files, if the hub cannot be asked.
        folder: where files are written, for messages; none: the hub's cache.

    Raises:
        UserError: the block failed.
    """
    from huggingface_hub import constants, errors

    endpoint, otherwise = _endpoint(), f". Or: {remedy}" if remedy else ""
    try:
        yield
    except UserError:
        raise
    except errors.OfflineModeIsEnabled:
        raise _HubSilent(
            f"cannot download {repository}: HF_HUB_OFFLINE is set; unset it to use the network"
            f"{otherwise}"
        ) from None
    except errors.GatedRepoError:
        raise UserError(
            f"no access to {page}: accept its terms on that page, and give an access token "
            "(HF_TOKEN, or the file `token` in HF_HOME)"
        ) from None
    except errors.RepositoryNotFoundError:
        kind = "dataset repository" if "/datasets/" in page else "repository"
        raise UserError(
            f"{page}: no such {kind}, or it is private and the access token "
            "(HF_TOKEN, or the file `token` in HF_HOME) does not open it"
        ) from None
    except errors.RevisionNotFoundError:
        plain, revision = with_revision(repository)
        raise UserError(f"{page}: no branch, tag or commit {revision} of {plain}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        kind = _HubSilent if status >= 500 else UserError
        raise kind(
            f"{mask(str(error.response.url))}: HTTP {status}; run the command again: complete "
            f"files are kept{otherwise}"
        ) from None
    except (
        errors.HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # the HTTP client's base
        errors.LocalEntryNotFoundError,
        errors.FileMetadataError,
    ) as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise _HubSilent(
            f"cannot download {repository} from {endpoint}: {describe(cause)}. "
            "Check the connection and HF_ENDPOINT, and run the command again: complete files are "
            f"kept{otherwise}"
        ) from None
    except ValueError as error:
        raise UserError(f"{printable(repository)}: {describe(error)}") from None
    except OSError as error:
        raise cannot_write(folder or Path(constants.HF_HUB_CACHE), error) from None
