import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test writes into the user's cache folder."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


def _picture(number: int, extension: str = "png", side: int = 4) -> bytes:
    """An image file of one colour, which encodes its number."""
    buffer = io.BytesIO()
    kind = {"jpg": "jpeg", "tif": "tiff"}.get(extension, extension)
    Image.new("RGB", (side, side), (number % 256, number // 256, 7)).save(buffer, kind)
    return buffer.getvalue()


def _write_tar(path: Path, members, format=tarfile.USTAR_FORMAT) -> Path:
    """A tar of (name, content) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def _pairs(numbers):
    """Members of good samples: picture and caption tell the number."""
    for number in numbers:
        yield f"{number:06d}.png", _picture(number)
        yield f"{number:06d}.txt", f"number {number}".encode()


@pytest.fixture(scope="session")
def picture():
    return _picture


@pytest.fixture(scope="session")
def write_tar():
    return _write_tar


@pytest.fixture(scope="session")
def pairs():
    return _pairs
