"""Font faces as a source of pictures: which faces there are, what they hold, how a glyph is drawn.

A face is known by its own metadata (name table, OS/2, post), never by its file name. A glyph is
drawn on the face's baseline and centred from left to right: the height above the baseline is what
tells a comma from an apostrophe, or a hyphen from a low line.
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
"""Of the fonts that matplotlib ships: the rest are display cuts, fragments and TeX encodings."""

_SUFFIXES = (".ttf", ".otf", ".ttc")
_EM = 0.8  # font size as a share of the picture: accented capitals and descenders just fit
_BASELINE = 0.78  # of the picture's height
_MARGIN = 1  # white pixels kept around the ink
_BOLD_WEIGHT = 600  # OS/2 usWeightClass from which a face is called bold


@dataclass(frozen=True)
class Face:
    """One face of a font family.

    Attributes:
        name: family and cut, for example `DejaVu Serif Bold`.
        family: the name without the cut, for example `DejaVu Serif`.
        style: the cut in words, for example `bold serif` or `oblique monospaced sans`.
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
    """A drawn character: `png` is an 8-bit grey picture, black on white."""

    face: Face
    codepoint: int
    png: bytes

    @property
    def name(self) -> str:
        """The character's Unicode name in lower case."""
        return self.face.names[self.codepoint]


def find_faces(folders: Sequence[Path] = ()) -> tuple[Face, ...]:
    """Faces that come with matplotlib, then those of `folders` (searched with their subfolders).

    A face met a second time, by name or by content, is left out: a copy of a held-out face in
    somebody's font folder must not leak into training.

    Raises:
        UserError: a folder does not exist or holds no usable face.
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
    """Draw every named character of `face` that has ink, in code point order.

    Args:
        face: what to draw.
        size: width and height of the pictures in pixels.
        only: draw these code points alone.
    """
    pen = _Pen(face, size)
    for codepoint in sorted(face.names if only is None else face.names.keys() & only):
        picture = pen.draw(chr(codepoint))
        if picture is not None:
            buffer = io.BytesIO()
            picture.save(buffer, "png")
            yield Glyph(face, codepoint, buffer.getvalue())


def names_by_shared_picture(glyphs: Sequence[Glyph]) -> list[list[str]]:
    """Groups of names such that no picture is shown under names of two groups.

    They are the connected components of the names, two of them being linked by a shared picture.
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
    """Draws single characters of one face at one picture size."""

    def __init__(self, face: Face, size: int) -> None:
        self._path, self._size = str(face.path), size
        self._fonts: dict[float, ImageFont.FreeTypeFont] = {}
        # Room on every side: ink may start far left of its origin (combining marks) or end far
        # right of it (ligatures).
        self._origin = (2 * size, 2 * size)
        self._canvas = Image.new("L", (5 * size, 4 * size))
        self._brush = ImageDraw.Draw(self._canvas)

    def draw(self, character: str) -> Image.Image | None:
        """The picture, or None when the character leaves no ink."""
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
            em = min(em * room / extent, em - 0.5)  # hinting may round a smaller font up
        x = self._origin[0] + round((self._fonts[em].getlength(character) - size) / 2)
        x = max(min(x, left - _MARGIN), right + _MARGIN - size)
        y = self._origin[1] - round(_BASELINE * size)
        y = max(min(y, top - _MARGIN), bottom + _MARGIN - size)
        ink = self._canvas.crop((x, y, x + size, y + size))
        return ink.point(range(255, -1, -1))

    def _ink(self, character: str, em: float) -> tuple[int, int, int, int] | None:
        if em not in self._fonts:
            # BASIC layout: raqm refuses some separators, and shaping would redraw lone characters.
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
    """The face in a font file; None if it is no font, maps no name or is of another family."""
    try:
        content = path.read_bytes()
        # The first face of a collection: the one that Pillow opens, too.
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
    """Weight, slant, spacing and kind of a face in words: `bold oblique monospaced sans`."""
    # fontTools fills these tables at run time, so their fields have no types of their own.
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
    serif = os2.panose.bSerifStyle  # 2..10 have serifs, 11..15 have none, 0 and 1 do not say
    sans = serif >= 11 if serif >= 2 else "sans" in family.lower()
    words.append("sans" if sans else "serif")
    return " ".join(words)
