"""Cases of data: shards, images, JSON, tables, folders, indexes, and names."""

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from fuzzing import valid
from fuzzing.image_headers import image
from fuzzing.mutation import HOSTILE_JSON, NAMES, changed_tree, damaged, flipped
from fuzzing.outcomes import command, read, refused
from fuzzing.tar_headers import archive, fixed_sums
from neuclip.config.data_sections import ReadingConfig
from neuclip.data.opening import open_source

_FORMS = (0, 1, 2)  # of tar: ustar, GNU, pax
Written = tuple[str, ReadingConfig]
Write = Callable[[Path, random.Random], Written]
"""Writes files into a folder; returns the pattern that names them and how to read them."""


def _tar(folder: Path, rng: random.Random) -> Written:
    content = damaged(valid.shard(form=rng.choice(_FORMS)), rng)
    (folder / "0.tar").write_bytes(fixed_sums(content) if rng.random() < 0.7 else content)
    size = rng.choice((None, None, None, 100))
    key = rng.choice((None, "caption"))
    return str(folder / "0.tar"), ReadingConfig(caption_key=key, data_size=size)


def _tar_headers(folder: Path, rng: random.Random) -> Written:
    (folder / "0.tar").write_bytes(archive(rng))
    if rng.random() < 0.4:
        (folder / "1.tar").write_bytes(valid.shard())
    return str(folder), ReadingConfig()


def _index(folder: Path, rng: random.Random) -> Written:
    path = folder / "0.tar"
    path.write_bytes(valid.shard())
    open_source(str(path))
    index = folder / ".neuclip" / "0.tar.index.npz"
    content = index.read_bytes()
    index.write_bytes(rng.choice((damaged, flipped))(content, rng))
    return str(path), ReadingConfig()


def _images(folder: Path, rng: random.Random) -> Written:
    for number, (ending, content) in enumerate(valid.pictures()):
        (folder / f"{number}.{ending}").write_bytes(damaged(content, rng))
        (folder / f"{number}.txt").write_bytes(b"a caption")
    return str(folder), ReadingConfig()


def _image_headers(folder: Path, rng: random.Random) -> Written:
    for number in range(4):
        ending, content = image(rng)
        (folder / f"{number}.{ending}").write_bytes(content)
        (folder / f"{number}.txt").write_bytes(b"a caption")
    return str(folder), ReadingConfig()


def _facts(rng: random.Random) -> bytes:
    tree = {"caption": ["one", "two"], "more": [[1, 2.5], {"a": 0}], "url": "\U0001f600"}
    if rng.random() < 0.2:
        return rng.choice(HOSTILE_JSON)
    if rng.random() < 0.6:
        return json.dumps(changed_tree(tree, rng)).encode("utf-8", "surrogatepass")
    content = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    return damaged(content.encode(rng.choice(("utf-8", "utf-8", "utf-16", "utf-32"))), rng)


def _json(folder: Path, rng: random.Random) -> Written:
    for number in range(4):
        (folder / f"{number}.png").write_bytes(valid.picture("png", 6))
        (folder / f"{number}.json").write_bytes(_facts(rng))
    return str(folder), ReadingConfig(caption_key="caption;url")


def _json_lines(folder: Path, rng: random.Random) -> Written:
    (folder / "a.png").write_bytes(valid.picture("png", 6))
    row = {"image": "a.png", "caption": "one", "tags": [1, [2]]}
    rows = [row if rng.random() < 0.5 else changed_tree(row, rng) for _ in range(5)]
    lines = [json.dumps(each).encode() for each in rows]
    if rng.random() < 0.3:
        lines.insert(2, rng.choice(HOSTILE_JSON))
    content = b"\n".join(lines) if rng.random() < 0.7 else b"[" + b",".join(lines) + b"]"
    name = rng.choice(("t.jsonl", "metadata.jsonl", "t.json"))
    (folder / name).write_bytes(damaged(content, rng) if rng.random() < 0.5 else content)
    return str(folder if name == "metadata.jsonl" else folder / name), ReadingConfig()


def _table_text(folder: Path, rng: random.Random) -> Written:
    (folder / "a.png").write_bytes(valid.picture("png", 6))
    tab = rng.random() < 0.3
    lines = 'filepath,title\na.png,"one, ""two"""\na.png,é\n' + "a.png,three\n" * 6
    content = lines.replace(",", "\t").encode() if tab else lines.encode()
    if rng.random() < 0.3:
        content = content.decode().encode(rng.choice(("utf-16", "latin-1", "utf-8-sig", "cp1252")))
    if rng.random() < 0.2:
        content += rng.choice((b'"' + b"x" * 10**6, b"\0" * 999, b"," * 10**5, b"\r" * 999))
    content = damaged(content, rng)
    name = f"t.{'tsv' if tab else 'csv'}"
    packed = rng.random() < 0.3
    if packed and rng.random() < 0.2:
        content += b"a.png,x\n" * 10**6
    (folder / name).write_bytes(damaged(gzip.compress(content, 1), rng) if packed else content)
    return str(folder / name), ReadingConfig(csv_separator=rng.choice((None, None, ",", "\t")))


def _parquet(folder: Path, rng: random.Random) -> Written:
    content = valid.parquet(rng.choice(("none", "snappy", "zstd", "gzip")))
    change = rng.randrange(3)
    if change == 0:
        content = damaged(content, rng)
    elif change == 1:
        content = flipped(content, rng)
    else:  # the footer: schema and metadata
        content = flipped(content, rng, len(content) - 8 - int.from_bytes(content[-8:-4], "little"))
    (folder / "t.parquet").write_bytes(content)
    return str(folder / "t.parquet"), ReadingConfig()


def _arrow(folder: Path, rng: random.Random) -> Written:
    content = valid.arrow(rng.choice((None, None, "zstd", "lz4")), stream=rng.random() < 0.8)
    state = b'{"_data_files": [{"filename": "d.arrow"}]}'
    if rng.random() < 0.2:
        tree = {"_data_files": [{"filename": "d.arrow"}], "_split": "train"}
        state = rng.choice(
            (damaged(state, rng), json.dumps(changed_tree(tree, rng)).encode(), *HOSTILE_JSON)
        )
    else:
        content = rng.choice((damaged, flipped))(content, rng)
    (folder / "d.arrow").write_bytes(content)
    (folder / "state.json").write_bytes(state)
    (folder / "dataset_info.json").write_bytes(b"{}")
    return str(folder), ReadingConfig()


def _places(folder: Path, rng: random.Random) -> Written:
    """A table, or a folder, that names devices, pipes, folders, links, and files elsewhere."""
    inside = folder / "data"
    inside.mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "outside.png").write_bytes(valid.picture("png", 6))
    (inside / "a.png").write_bytes(valid.picture("png", 6))
    (inside / "loop").symlink_to("loop")
    (inside / "up").symlink_to("..")
    with (inside / "huge").open("wb") as huge:
        huge.truncate(2**36)
    targets = (
        "a.png", "../pipe", "/dev/zero", "/dev/stdin", "/dev/tty", "/proc/self/mem", "loop", ".",
        "/proc/kmsg", "../outside.png", str(folder / "outside.png"), "/etc/passwd", "huge", "up",
        "/sys/power/state", "/dev/null", "a.png/x", "x" * 300, "a\0.png", "", *rng.sample(NAMES, 4),
    )  # fmt: skip
    chosen = ["a.png", *rng.choices(targets, k=8)]
    if rng.random() < 0.6:
        rows = [json.dumps({"image": name, "caption": "x"}) for name in chosen]
        (inside / "t.jsonl").write_text("\n".join(rows))
        return str(inside / "t.jsonl"), ReadingConfig()
    for number, name in enumerate(chosen):
        for ending in rng.choice((("jpg",), ("txt",), ("jpg", "txt"), ("json",))):
            target = name if name and "\0" not in name and len(os.fsencode(name)) < 255 else "x"
            (inside / f"{number}.{ending}").symlink_to(target)
    (inside / "a.txt").write_text("a caption")
    return str(inside), ReadingConfig()


def _names(folder: Path, rng: random.Random) -> Written:
    """Files, folders, classes and shards with hostile names."""
    inside = folder / "data"
    inside.mkdir()
    picture, classes = valid.picture("png", 6), rng.random() < 0.3
    for name in rng.sample(NAMES, 8):
        stem = os.fsencode(name)[:200].replace(b"\0", b"").replace(b"/", b"_")
        place = os.path.join(os.fsencode(inside), stem.lstrip(b".") or b"_")  # noqa: PTH118  bytes
        if classes:
            os.makedirs(place, exist_ok=True)  # noqa: PTH103
            place = os.path.join(place, b"a")  # noqa: PTH118
        with open(place + b".png", "wb") as file:  # noqa: PTH123
            file.write(picture)
        with open(place + b".txt", "wb") as file:  # noqa: PTH123
            file.write(rng.choice(NAMES).encode("utf-8", "surrogatepass"))
    return str(inside), ReadingConfig()


_WRITERS: dict[str, Write] = {
    "tar": _tar,
    "tar-headers": _tar_headers,
    "index": _index,
    "image": _images,
    "image-headers": _image_headers,
    "json": _json,
    "jsonl": _json_lines,
    "csv": _table_text,
    "parquet": _parquet,
    "arrow": _arrow,
    "places": _places,
    "names": _names,
}
_FOR_COMMANDS = ("tar", "tar-headers", "json", "jsonl", "csv", "places", "names", "arrow")


def _reader(write: Write) -> Callable[[Path, random.Random], str]:
    return lambda folder, rng: read(
        *write(folder, rng), captions=rng.choice(("required", "if_any", "optional"))
    )


def _flags(reading: ReadingConfig) -> list[str]:
    return [] if reading.caption_key is None else ["--caption-key", reading.caption_key]


def _inspect(folder: Path, rng: random.Random) -> str:
    name, reading = _WRITERS[rng.choice(_FOR_COMMANDS)](folder, rng)
    page = folder / "page.html"
    flags = ["--max-image-pixels", "16000000", "--max-samples", "40", *_flags(reading)]
    outcome = command(folder, ["data", "inspect", name, "--out", str(page), *flags])
    if page.exists():
        assert b"<script>alert" not in page.read_bytes()
    return outcome


def _pack(folder: Path, rng: random.Random) -> str:
    name, reading = _WRITERS[rng.choice(_FOR_COMMANDS)](folder, rng)
    out = folder / "packed"
    outcome = command(
        folder, ["data", "pack", name, "--out", str(out), "--workers", "1", *_flags(reading)]
    )
    if outcome != "refusal":
        assert read(str(out), ReadingConfig(), "if_any") != "refusal"
    return outcome


def _manifest(folder: Path, rng: random.Random) -> str:
    from neuclip.data.order import Layout, Order
    from neuclip.data.remote import remote_shards
    from neuclip.data.remote.cache import RemoteShard, ShardCache
    from neuclip.data.remote.manifest import parse_manifest

    row = {"name": "00000.tar", "size": 10**7, "sha256": "0" * 64, "samples": 1000}
    tree = {"version": 1, "shards": [row, {**row, "name": "00001.tar"}]}
    text = json.dumps(changed_tree(tree, rng)).encode("utf-8", "surrogatepass")
    text = rng.choice((text, text, text, damaged(json.dumps(tree).encode(), rng), *HOSTILE_JSON))
    try:
        entries = parse_manifest(text)
    except ValueError:
        return "refusal"
    layout = Layout.of("x", [each.samples for each in entries.values()])
    if not layout.samples:
        return "answer"
    window, cache = rng.choice((0, 1, 16)), ShardCache(folder, 2**38)
    shards = [RemoteShard("http://x/y", samples=each.samples) for each in entries.values()]

    def ordered() -> None:
        remote_shards._check_room(shards, cache, window)
        if layout.samples < 2**20:
            Order(layout, 1, window=window).positions(0, 0, 8)

    return refused(ordered)


KINDS = {
    **{name: _reader(write) for name, write in _WRITERS.items()},
    "inspect": _inspect,
    "pack": _pack,
    "manifest": _manifest,
}
