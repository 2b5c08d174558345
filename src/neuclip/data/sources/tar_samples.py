"""From the members of a tar file to samples.

The key of a member is its path up to the first dot of the file name, as in webdataset, if what
follows is a known ending. Other names with several dots wait until the end of the shard:

1. `photo v2.1.jpg` and `photo v2.1.txt` are a sample: the key ends at the last dot, where that
   makes an image with a caption, a class or a `.json` (or an image, if the shard has nothing else).
2. `7.seg.png` beside a sample `7` has an unknown ending.
3. `7.input.jpg` and `7.outputs.txt` are a sample `7` if all keys that are left have the same two
   endings.
4. The rest has unknown endings.

Members of a sample need not be adjacent, unlike in webdataset, which would split the sample.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from neuclip.data.endings import CLASS, IMAGE, JSON, METADATA, TEXT, ending_of, known_endings
from neuclip.data.samples import DamageKind, Tally
from neuclip.data.sources.tar_headers import REGULAR, Member
from neuclip.errors import printable
from neuclip.untrusted import MAX_ARRAY_FILE, MAX_IMAGE_FILE, MAX_TEXT_FILE

_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    b"S": "a sparse file",
}
_DESCRIPTIONS = frozenset((TEXT, JSON, CLASS))
_LARGEST = {
    IMAGE: MAX_IMAGE_FILE,
    TEXT: MAX_TEXT_FILE,
    JSON: MAX_TEXT_FILE,
    CLASS: MAX_TEXT_FILE,
    METADATA: MAX_ARRAY_FILE,
}
"""Largest member of each part of a sample, in bytes."""
_LONGEST_PATH = 4096  # as on Linux

Finding = tuple[DamageKind, str, str]
"""Kind, key or path, and explanation of a member or sample that was skipped."""


def key_of(path: str, long_endings: frozenset[str], known: Mapping[str, int]) -> str:
    """The key of the sample that a member belongs to.

    Args:
        path: path of a member of a sample.
        known: the endings that are read.
        long_endings: endings of the shard with a dot inside that split off a key.
    """
    folder, slash, name = path.rpartition("/")
    stem, _, ending = name.partition(".")
    if ending.lower() not in known and ending not in long_endings:
        stem = name.rpartition(".")[0]
    return folder + slash + stem


@dataclass(frozen=True)
class _Dotted:
    """A member whose name has several dots.

    Attributes:
        member: the member.
        short: key up to the first dot.
        long: key up to the last dot.
        ending: what follows the first dot.
        column: the part of a sample, by what follows the last dot.
    """

    member: Member
    short: str
    long: str
    ending: str
    column: int


@dataclass
class TarSamples:
    """Collects members into samples.

    Attributes:
        blocks: offsets of each sample's members, by part, in blocks of 512 bytes; 0 if absent.
        sizes: their sizes in bytes.
        keys: the keys of the samples.
        long_keys: keys that do not fit into the plain header in front of the member, by sample.
        findings: members and samples that were skipped because something is wrong with them.
        tally: all members, and those that belong to no sample.
        joined: samples whose members are not adjacent.
        long_endings: endings with a dot inside, such as `input.jpg`, that split off a key.
        out_of_order: whether samples were added after samples behind them.
        known: the endings that are read, with the part of a sample that they stand for.
    """

    known: Mapping[str, int] = field(default_factory=known_endings)
    blocks: list[list[int]] = field(default_factory=list[list[int]])
    sizes: list[list[int]] = field(default_factory=list[list[int]])
    keys: list[str] = field(default_factory=list[str])
    long_keys: dict[int, str] = field(default_factory=dict[int, str])
    findings: list[Finding] = field(default_factory=list[Finding])
    tally: Tally = field(default_factory=lambda: Tally("members"))
    joined: set[int] = field(default_factory=set[int])
    long_endings: set[str] = field(default_factory=set[str])
    out_of_order: bool = False
    _rows: dict[str, int] = field(default_factory=dict[str, int])
    _key: str | None = None  # of the last member
    _names: dict[int, str] = field(default_factory=dict[int, str])  # of its sample, by column
    _again: dict[int, Member] | None = None  # members of a sample that was left and is met again
    _dotted: list[_Dotted] = field(default_factory=list[_Dotted])

    def add(self, member: Member) -> None:
        """Adds the next member."""
        path = member.path
        if member.kind not in REGULAR:
            what = _TYPES.get(member.kind, f"a member of type {member.kind!r}")
            self.findings.append(("member_type", path, f"{what}: ignored"))
            return
        if path.startswith("/") or (".." in path and ".." in path.split("/")):
            self.findings.append(("member_name", path, "the path leads out of the folder"))
            return
        if len(path) > _LONGEST_PATH:
            detail = f"the path has {len(path):,} characters, more than {_LONGEST_PATH:,}"
            self.findings.append(("member_name", printable(path), detail))
            return
        folder, slash, name = path.rpartition("/")
        stem, _, ending = name.partition(".")
        column = self.known.get(ending.lower())
        if not stem or (folder and _hidden(folder)):
            self.tally.add("hidden", path)
        elif column is not None:
            self._place(member, folder + slash + stem, column)
        else:
            self._wait(member, folder + slash + stem, ending)

    def _wait(self, member: Member, short: str, ending: str) -> None:
        """Keeps a member with several dots in its name for `finish`."""
        before, _, last = ending.rpartition(".")
        column = self.known.get(last.lower()) if before else None
        if column is None:
            self.tally.add("ending", f".{ending}" if ending else "no ending")
        else:
            long = member.path.removesuffix(f".{last}")
            self._dotted.append(_Dotted(member, short, long, ending, column))

    def _place(self, member: Member, key: str, column: int) -> None:
        if member.size > MAX_TEXT_FILE and member.size > _LARGEST[column]:
            detail = f"{member.size:,} bytes are more than {_LARGEST[column]:,}"
            self.findings.append(("member_size", member.path, detail))
            return
        if key != self._key:
            if self._again is not None:
                self._end_again()
            self._key, self._names = key, {}
            if key in self._rows:
                self._again = {}
            else:
                self._rows[key] = len(self.keys)
                self.keys.append(key)
                self.blocks.append([0] * 5)
                self.sizes.append([0] * 5)
        if column in self._names:
            if self._names[column] != member.path:
                self.tally.add("repeated", ending_of(member.path))
                return
            self._end_again()
            self._again, self._names = {}, {}
        self._names[column] = member.path
        if self._again is not None:
            self._again[column] = member
        else:
            self._fill(-1, column, member)

    def _fill(self, row: int, column: int, member: Member) -> None:
        self.blocks[row][column] = member.block
        self.sizes[row][column] = member.size
        if member.long_path:
            self.long_keys[row % len(self.keys)] = self.keys[row]

    def _end_again(self) -> None:
        """Joins the members of a sample that was met again to it, unless it has such members."""
        if self._again is None or self._key is None:
            return
        again, row = self._again, self._rows[self._key]
        self._again = None
        if not any(self.blocks[row][column] for column in again):
            self.joined.add(row)
            for column, member in again.items():
                self._fill(row, column, member)
        elif again.keys() & {IMAGE, TEXT}:
            detail = "an earlier sample has the same key: the first is kept"
            self.findings.append(("duplicate_key", self._key, detail))
        else:
            for member in again.values():
                self.tally.add("repeated", ending_of(member.path))

    def drop_incomplete_end(self) -> None:
        """Drops the last sample if the shard ends before its image or its caption."""
        self._end_again()
        if self.keys:
            last = self.blocks[-1]
            if not last[IMAGE] or not any(last[column] for column in _DESCRIPTIONS):
                self.long_keys.pop(len(self.keys) - 1, None)
                del self._rows[self.keys[-1]], self.keys[-1], self.blocks[-1], self.sizes[-1]

    def finish(self, total: int) -> None:
        """Adds the members that wait for the end of the shard.

        Args:
            total: number of members.
        """
        self.tally.total = total
        self._end_again()
        if not self._dotted:
            return
        described = any(each.column in _DESCRIPTIONS for each in self._dotted) or any(
            any(row[column] for column in _DESCRIPTIONS) for row in self.blocks
        )
        left = self._place_groups(_grouped(self._dotted, lambda each: each.long), _complete)
        extra = [each for each in left if each.short in self._rows]
        left = [each for each in left if each.short not in self._rows]
        by_key = _grouped(left, lambda each: each.short)
        endings = {tuple(sorted(each.ending for each in group)) for group in by_key.values()}
        if not described:
            left = self._place_groups(_grouped(left, lambda each: each.long), _has_image)
        elif len(by_key) > 1 and len(endings) == 1 and all(map(_one_of_each, by_key.values())):
            self.long_endings.update(*endings)
            left = self._place_groups(by_key, _one_of_each)
        for each in extra + left:
            self.tally.add("ending", f".{each.ending}")

    def _place_groups(
        self, groups: "_Groups", is_sample: Callable[[list[_Dotted]], bool]
    ) -> list[_Dotted]:
        """Places the groups that make a sample; returns the members of the others."""
        left: list[_Dotted] = []
        for key, group in groups.items():
            if is_sample(group):
                self.out_of_order = True
                for each in group:
                    self._place(each.member, key, each.column)
                self._end_again()
            else:
                left += group
        return left


_Groups = dict[str, list[_Dotted]]


def _grouped(dotted: Iterable[_Dotted], key: Callable[[_Dotted], str]) -> _Groups:
    groups: _Groups = {}
    for each in dotted:
        groups.setdefault(key(each), []).append(each)
    return groups


def _has_image(group: list[_Dotted]) -> bool:
    return any(each.column == IMAGE for each in group)


def _complete(group: list[_Dotted]) -> bool:
    return _has_image(group) and any(each.column in _DESCRIPTIONS for each in group)


def _one_of_each(group: list[_Dotted]) -> bool:
    return _complete(group) and len({each.column for each in group}) == len(group)


def _hidden(folder: str) -> bool:
    """Whether a path leads through a hidden folder, or that of macOS's resource forks."""
    if folder == "." or not (folder[0] == "." or "/." in folder or "__MACOSX" in folder):
        return False
    parts = folder.split("/")
    return any(part == "__MACOSX" or (part[:1] == "." and part != ".") for part in parts)
