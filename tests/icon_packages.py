"""Small packages of icons in the form of npm's, with drawings that are made here."""

import io
import json
import tarfile

# Strokes that differ for every concept; a set draws them in its own width.
CONCEPTS = [
    f"{colour} {thing}" for thing in ("cat", "dog", "owl") for colour in ("red", "big", "shy")
]
STYLES = ("memory", "pixelarticons")  # of the unseen styles


def write_package(folder, stem, files):
    with tarfile.open(folder / f"{stem}.tgz", "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
            member.size = len(encoded)
            tar.addfile(member, io.BytesIO(encoded))


def strokes(number, variant):
    """A drawing of a concept, in the manner of a set."""
    bits = [(number * 7 + 3) >> shift & 1 for shift in range(6)]
    cells = [
        f'<rect x="{2 + 4 * (at % 3)}" y="{3 + 5 * (at // 3)}" width="{3 + variant % 3 / 2}" '
        f'height="{1 + variant / 2}" fill="currentColor"/>'
        for at, bit in enumerate(bits)
        if bit
    ]
    return "".join(cells) + f'<circle cx="8" cy="8" r="{1 + variant * 0.7}" fill="currentColor"/>'


def icon_set(prefix, variant, category="UI 24px"):
    names = [concept.replace(" ", "-") for concept in CONCEPTS]
    return {
        "prefix": prefix,
        "info": {
            "name": prefix.title(),
            "author": {"name": "A. Drawer"},
            "license": {"title": "MIT", "spdx": "MIT"},
            "category": category,
        },
        "icons": {name: {"body": strokes(n, variant)} for n, name in enumerate(names)},
        "aliases": {"feline": {"parent": names[0]}, "turned": {"parent": names[1], "rotate": 1}},
        "categories": {"Animals": names},
    }


def write_icon_packages(folder):
    """Seven sets, two of them of unseen styles, and two that no data set may use."""
    sets = [icon_set(prefix, n) for n, prefix in enumerate(("aa", "bb", "cc", "dd", "ee", *STYLES))]
    sets += [icon_set("brands", 9, "Logos"), icon_set("cc-nc", 9)]
    sets[-1]["info"]["license"]["spdx"] = "CC-BY-NC-4.0"
    write_package(
        folder,
        "iconify-json-1.10.0",
        {"package.json": {}} | {f"json/{one['prefix']}.json": one for one in sets},
    )
    write_package(folder, "lucide-static-0.1.0", {"tags.json": {"red-cat": ["kitten", "pet"]}})
