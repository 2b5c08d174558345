"""Files of dataset repositories on the Hugging Face hub: listed, fetched, resumed, verified.

`HF_ENDPOINT` is the hub's address, `HF_TOKEN` (or the file `token` in `HF_HOME`) the access token.
Every file is compared with what the hub says of it: SHA-256 for large files, git's SHA-1 for small
ones. Imports no torch.
"""

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from neuclip.errors import UserError
from neuclip.files import cache_home

Progress = Callable[[str, int, int], None]
"""Called with what is fetched, bytes done, and bytes in all."""

T = TypeVar("T")
_ATTEMPTS = 5
_TIMEOUT_SECONDS = 60
_CHUNK = 2**20


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        path: Its path in the repository.
        size: Its size in bytes.
        digest: `sha256:...` of a large file, `git:...` of a small one.
    """

    path: str
    size: int
    digest: str


class Interrupted(Exception):
    """The connection ended early; what came is kept."""


def home() -> Path:
    """Where the hub's files are cached (`HF_HOME`)."""
    given = os.environ.get("HF_HOME")
    return Path(given).expanduser() if given else cache_home().with_name("huggingface")


class Hub:
    """A hub, as the environment names it.

    Args:
        pause: Seconds to wait before trying again, times the number of tries.
    """

    def __init__(self, pause: float = 1.0) -> None:
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        if not self.endpoint.startswith(("http://", "https://")):
            raise UserError(f"HF_ENDPOINT: {self.endpoint!r} is no http(s) address")
        self._pause = pause
        self._token = os.environ.get("HF_TOKEN") or _stored_token()

    def files(self, repository: str) -> list[RemoteFile]:
        """All files of a dataset repository.

        Raises:
            UserError: no such repository, no access, or no answer.
        """
        found: list[RemoteFile] = []
        page = f"{self.endpoint}/api/datasets/{repository}/tree/main?recursive=true"
        while page:
            entries, page = self._again(page, lambda url=page: self._listing(url, repository))
            for entry in entries:
                if entry["type"] == "file":
                    large: dict[str, str] | None = entry.get("lfs")
                    digest = f"sha256:{large['oid']}" if large else f"git:{entry['oid']}"
                    found.append(RemoteFile(entry["path"], int(entry["size"]), digest))
        return found

    def fetch(
        self, repository: str, file: RemoteFile, target: Path, progress: Progress | None = None
    ) -> None:
        """Fetches a file, going on where an earlier try ended; `target` appears when it is whole.

        Raises:
            UserError: no answer, no access, no space, or not what the hub says it is.
        """
        # Named by the content: the rest of another version is never put behind it.
        mark = file.digest.partition(":")[2][:12]
        partial = target.with_name(f".{target.name}.{mark}.partial")
        path = urllib.parse.quote(file.path)
        url = f"{self.endpoint}/datasets/{repository}/resolve/main/{path}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._again(url, lambda: self._continue(url, repository, file, partial, progress))
            if not matches(partial, file):
                partial.unlink()
                raise UserError(f"{url}: what came is not what the hub lists ({file.digest})")
            partial.replace(target)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror or error}") from None

    def _again(self, url: str, work: Callable[[], T]) -> T:
        """Does something, again if the connection ends early.

        Raises:
            UserError: it ended early each time.
        """
        for attempt in range(1, _ATTEMPTS):
            try:
                return work()
            except Interrupted:
                time.sleep(self._pause * attempt)
        try:
            return work()
        except Interrupted as reason:
            raise UserError(
                f"{url}: {reason} ({_ATTEMPTS} tries); what came is kept: start again to go on"
            ) from None

    def _listing(self, url: str, repository: str) -> tuple[list[dict[str, Any]], str]:
        """A page of files, and the address of the next."""
        with self._open(url, repository) as answer:
            try:
                return json.loads(_read_all(answer)), _next_page(answer.headers.get("Link", ""))
            except ValueError as error:
                raise UserError(f"{url}: the answer is no JSON: {error}") from None

    def _continue(
        self,
        url: str,
        repository: str,
        file: RemoteFile,
        partial: Path,
        progress: Progress | None,
    ) -> None:
        """Fetches what is missing of a file."""
        start = _size(partial)
        if start > file.size:
            partial.unlink()
            start = 0
        if start == file.size and partial.exists():
            return
        with self._open(url, repository, start) as answer:
            if answer.status != http.client.PARTIAL_CONTENT:
                start = 0  # this server sends the whole
            with partial.open("ab" if start else "wb") as out:
                while chunk := _read(answer):
                    out.write(chunk)
                    start += len(chunk)
                    if progress is not None:
                        progress(file.path, start, file.size)
        if start < file.size:
            raise Interrupted("the connection ended early")

    def _open(self, url: str, repository: str, start: int = 0) -> Any:  # noqa: ANN401  urllib's
        request = urllib.request.Request(url, headers={"User-Agent": "neuclip"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        if self._token:
            # Not passed on when the hub sends us to another host for the content.
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            return urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error.code, url, repository) from None
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as error:
            reason = getattr(error, "reason", error)
            raise Interrupted(f"no answer from {self.endpoint}: {reason}") from None


def matches(path: Path, file: RemoteFile) -> bool:
    """Whether a file on disk is the one that the hub lists."""
    if _size(path) != file.size or not path.is_file():
        return False
    kind, _, wanted = file.digest.partition(":")
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
    if kind == "git":
        digest.update(f"blob {file.size}\0".encode())
    with path.open("rb") as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == wanted


def _read(answer: Any) -> bytes:  # noqa: ANN401  urllib's
    try:
        return answer.read(_CHUNK)
    except (http.client.HTTPException, OSError) as error:
        raise Interrupted(str(error) or type(error).__name__) from None


def _read_all(answer: Any) -> bytes:  # noqa: ANN401  urllib's
    parts: list[bytes] = []
    while chunk := _read(answer):
        parts.append(chunk)
    return b"".join(parts)


def _refusal(code: int, url: str, repository: str) -> Exception:
    if code in {401, 403}:
        return UserError(
            f"{url}: no access (HTTP {code}). Accept the terms of {repository} on its page, and "
            "give an access token: HF_TOKEN, or the file `token` in HF_HOME"
        )
    if code == http.client.NOT_FOUND:
        return UserError(f"{url}: not found (HTTP 404)")
    if code >= http.client.INTERNAL_SERVER_ERROR or code == http.client.TOO_MANY_REQUESTS:
        return Interrupted(f"HTTP {code}")
    return UserError(f"{url}: HTTP {code}")


def _next_page(link: str) -> str:
    """The address in a header like `<https://...>; rel="next"`."""
    for part in link.split(","):
        address, _, relation = part.partition(";")
        if 'rel="next"' in relation:
            return address.strip().strip("<>")
    return ""


def _stored_token() -> str | None:
    path = home() / "token"
    return path.read_text(encoding="utf-8").strip() or None if path.is_file() else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
