"""Font faces as a source of images: finding faces, reading their metadata, drawing glyphs.

A face is identified by its metadata (name table, OS/2, post), never by its file name. A glyph is
drawn on the baseline of the face and centred horizontally: its height above the baseline
distinguishes a comma from an apostrophe, or a hyphen from a low line.
"""

import hashlib
import io
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import matplotlib
from fontTools.ttLib import TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont

from neuclip.errors import UserError

EMBEDDED_FAMILIES = ("DejaVu Sans", "DejaVu Sans Mono", "DejaVu Serif", "STIXGeneral")
"""Fonts of matplotlib; its other fonts are display styles, fragments and TeX encodings."""

_SUFFIXES = (".ttf", ".otf", ".ttc")
_EM = 0.8  # font size as a fraction of the image: accented capitals and descenders just fit
_BASELINE = 0.78  # as a fraction of the image's height
_MARGIN = 1  # white pixels around the ink
_BOLD_WEIGHT = 600  # smallest OS/2 usWeightClass of a bold face


@dataclass(frozen=True)
class Face:
    """One face of a font family.

    Attributes:
        name: family and subfamily, for example `DejaVu Serif Bold`.
        family: family name, for example `DejaVu Serif`.
        style: the style in words, for example `bold serif` or `oblique monospaced sans`.
        path: the font file.
        digest: SHA-256 of the font file.
        names: lower-case Unicode name by code point, for every named character the face maps.
    """

    name: str
    family: str
    style: str
    path: Path
    digest: str
    names: dict[int, str]


@dataclass(frozen=True)
class Glyph:
    """A drawn character.

    Attributes:
        face: the face it is drawn in.
        codepoint: its Unicode code point.
        png: an 8-bit grey PNG, black on white.
    """

    face: Face
    codepoint: int
    png: bytes

    @property
    def name(self) -> str:
        """The character's Unicode name in lower case."""
        return self.face.names[self.codepoint]


def find_faces(folders: Sequence[Path] = ()) -> tuple[Face, ...]:
    """The faces that come with matplotlib, then those in `folders`, searched recursively.

    Duplicates by name or content are left out: a copy of the held-out face in a user's folder must
    not leak into training.

    Raises:
        UserError: a folder does not exist or contains no usable face.
    """
    embedded = Path(matplotlib.get_data_path()) / "fonts"
    faces = _read_folder(embedded, EMBEDDED_FAMILIES)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--fonts: no such folder: {folder}")
        found = _read_folder(folder)
        if not found:
            raise UserError(
                f"--fonts: no usable face in {folder}: expected {', '.join(_SUFFIXES)} files with "
                "a Unicode character map"
            )
        faces += found
    unique: dict[str, Face] = {}
    digests: set[str] = set()
    for face in faces:
        if face.name not in unique and face.digest not in digests:
            unique[face.name] = face
            digests.add(face.digest)
    return tuple(unique.values())


def draw_face(face: Face, size: int, only: AbstractSet[int] | None = None) -> Iterator[Glyph]:
    """Draws every named character of a face that leaves ink, in code point order.

    Args:
        face: the face.
        size: width and height of the images in pixels.
        only: draw only these code points.
    """
    pen = _Pen(face, size)
    for codepoint in sorted(face.names if only is None else face.names.keys() & only):
        image = pen.draw(chr(codepoint))
        if image is not None:
            buffer = io.BytesIO()
            image.save(buffer, "png")
            yield Glyph(face, codepoint, buffer.getvalue())


def names_by_shared_image(glyphs: Sequence[Glyph]) -> list[list[str]]:
    """Groups of names such that every image has names of one group only.

    They are the connected components of the names, linked by shared images.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    first_name: dict[bytes, str] = {}
    for glyph in glyphs:
        parent[root(glyph.name)] = root(first_name.setdefault(glyph.png, glyph.name))
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(parent):
        groups[root(name)].append(name)
    return list(groups.values())


class _Pen:
    """Draws single characters of one face at one image size."""

    def __init__(self, face: Face, size: int) -> None:
        self._path, self._size = str(face.path), size
        self._fonts: dict[float, ImageFont.FreeTypeFont] = {}
        # Room on all sides: ink may start far left of its origin (combining marks) or end far
        # right of it (ligatures).
        self._origin = (2 * size, 2 * size)
        self._canvas = Image.new("L", (5 * size, 4 * size))
        self._brush = ImageDraw.Draw(self._canvas)

    def draw(self, character: str) -> Image.Image | None:
        """The image, or None if the character leaves no ink."""
        size, room = self._size, self._size - 2 * _MARGIN
        em = _EM * size
        while True:
            box = self._ink(character, em)
            if box is None:
                return None
            left, top, right, bottom = box
            extent = max(right - left, bottom - top)
            if extent <= room:
                break
            em = min(em * room / extent, em - 0.5)  # hinting may round a smaller size up
        x = self._origin[0] + round((self._fonts[em].getlength(character) - size) / 2)
        x = max(min(x, left - _MARGIN), right + _MARGIN - size)
        y = self._origin[1] - round(_BASELINE * size)
        y = max(min(y, top - _MARGIN), bottom + _MARGIN - size)
        ink = self._canvas.crop((x, y, x + size, y + size))
        return ink.point(range(255, -1, -1))

    def _ink(self, character: str, em: float) -> tuple[int, int, int, int] | None:
        if em not in self._fonts:
            # BASIC layout: raqm rejects some separators, and shaping changes isolated characters.
            basic = ImageFont.Layout.BASIC
            self._fonts[em] = ImageFont.truetype(self._path, em, layout_engine=basic)
        self._brush.rectangle((0, 0, *self._canvas.size), fill=0)
        self._brush.text(self._origin, character, fill=255, font=self._fonts[em], anchor="ls")
        return self._canvas.getbbox()


def _read_folder(folder: Path, families: Sequence[str] = ()) -> list[Face]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    faces = (_read_face(path, families) for path in paths)
    return [face for face in faces if face is not None]


def _read_face(path: Path, families: Sequence[str]) -> Face | None:
    """The face in a font file; None for unreadable files, nameless faces and other families."""
    try:
        content = path.read_bytes()
        # The first face of a collection, which Pillow opens too.
        with TTFont(io.BytesIO(content), lazy=True, fontNumber=0) as font:
            family = str(font["name"].getBestFamilyName())
            if families and family not in families:
                return None
            cut = str(font["name"].getBestSubFamilyName())
            style = _style_words(font, family, cut)
            names = _named(font.getBestCmap() or {})
        ImageFont.truetype(str(path), 16)
    except (OSError, TTLibError, KeyError, AttributeError, ValueError):
        return None
    if not names:
        return None
    name = f"{family} {cut}" if cut not in ("Book", "Regular") else family
    return Face(name, family, style, path, hashlib.sha256(content).hexdigest(), names)


def _named(character_map: dict[int, str]) -> dict[int, str]:
    names = {
        codepoint: unicodedata.name(chr(codepoint), "").lower()
        for codepoint, glyph in sorted(character_map.items())
        if glyph != ".notdef"
    }
    return {codepoint: name for codepoint, name in names.items() if name}


class _Panose(Protocol):
    bSerifStyle: int


class _OS2(Protocol):
    usWeightClass: int
    fsSelection: int
    panose: _Panose


class _Post(Protocol):
    italicAngle: float
    isFixedPitch: int


def _style_words(font: TTFont, family: str, cut: str) -> str:
    """Weight, slant, spacing and serifs of a face in words: `bold oblique monospaced sans`."""
    # fontTools creates the fields of these tables at run time, without types.
    os2, post = cast(_OS2, font["OS/2"]), cast(_Post, font["post"])
    words: list[str] = []
    if os2.usWeightClass >= _BOLD_WEIGHT:
        words.append("bold")
    if os2.fsSelection & 1 or post.italicAngle:
        words.append("oblique" if "oblique" in cut.lower() else "italic")
    if not words:
        words.append("regular")
    if post.isFixedPitch:
        words.append("monospaced")
    serif = os2.panose.bSerifStyle  # 2..10: serifs, 11..15: no serifs, 0 and 1: unknown
    sans = serif >= 11 if serif >= 2 else "sans" in family.lower()
    words.append("sans" if sans else "serif")
    return " ".join(words)
