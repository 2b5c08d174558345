"""Data sets from small packages, made here in the form of npm's."""

import pytest

from icon_packages import CONCEPTS, icon_set, strokes, write_icon_packages, write_package
from neuclip.data.icons.emoji_sets import EmojiSettings, build_emoji
from neuclip.data.icons.icon_sets import IconSettings, build_icons
from neuclip.data.icons.npm_packages import NpmPackage
from neuclip.data.opening import open_source
from neuclip.errors import UserError


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    write_icon_packages(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_uses():
    """Small packages do not show a word in six concepts."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("icon_sets", "emoji_sets"):
            patch.setattr(f"neuclip.data.icons.{module}._LEAST_USES", 1)
        yield


@pytest.fixture(scope="module")
def built(packages, tmp_path_factory):
    out = tmp_path_factory.mktemp("icons") / "icons"
    return out, build_icons(packages, out, IconSettings(concepts=1), processes=1)


def read_all(folder):
    source = open_source(str(folder))
    try:
        return [source.read(position) for position in range(len(source))]
    finally:
        source.close()


def test_splits(built):
    out, facts = built
    folders = {path.name for path in out.iterdir() if path.is_dir()}
    assert folders == set(facts["splits"]) == {
        "train", "unseen_style_development", "unseen_style_test",
        "unseen_concept_development", "unseen_concept_test",
    }  # fmt: skip
    train = {sample.caption for sample in read_all(out / "train")}
    assert not any("brands" in caption.lower() for caption in train)
    for part in ("development", "test"):
        (concept,) = (out / f"unseen_concept_{part}" / "classnames.txt").read_text().splitlines()
        assert not any(concept in caption for caption in train)
    assert facts["splits"]["train"]["licences"] == {"MIT": facts["splits"]["train"]["pairs"]}
    assert facts["splits"]["unseen_style_test"]["floor_top1"] > 0.3
    assert facts["splits"]["unseen_concept_test"]["floor_top1"] is None
    assert "A. Drawer" in (out / "CREDITS.md").read_text()


def test_the_same_packages_and_seed_give_the_same_bytes(built, packages, tmp_path):
    first = built[1]["sha256"]
    again = build_icons(packages, tmp_path / "a", IconSettings(concepts=1), processes=2)
    assert again["sha256"] == first


def test_the_newest_version_counts(packages, tmp_path):
    for version in ("1.9.0", "1.10.0", "1.2.0-beta"):
        write_package(tmp_path, f"iconify-json-{version}", {})
    assert NpmPackage.find(tmp_path, "@iconify/json").version == "1.10.0"


def test_problems_of_packages(packages, tmp_path):
    out = tmp_path / "out"

    def refused(words):
        with pytest.raises(UserError, match=words):
            build_icons(tmp_path, out, IconSettings(), processes=1)
        assert not out.exists()

    refused("run `npm pack @iconify/json` in that folder")
    path = tmp_path / "iconify-json-1.0.0.tgz"
    path.write_bytes((packages / "iconify-json-1.10.0.tgz").read_bytes()[:500])
    refused("cannot be read .*run `npm pack @iconify/json` again")
    write_package(tmp_path, "iconify-json-1.0.0", {"json/a.json": b"[1"})
    refused("json/a.json is not JSON")
    write_package(tmp_path, "iconify-json-1.0.0", {"json/a.json": {"icons": []}})
    refused("not an icon set of a known form")
    write_package(tmp_path, "iconify-json-1.0.0", {"package.json": {}})
    refused("no icon sets in json/")
    write_package(tmp_path, "iconify-json-1.0.0", {"json/aa.json": icon_set("aa", 1)})
    refused("no picture is left for unseen_style_development")
    out.mkdir()
    (out / "kept").touch()
    with pytest.raises(UserError, match="choose another folder"):
        build_icons(packages, out, IconSettings(), processes=1)


# emoji -------------------------------------------------------------------------------------------

VENDORS = (
    *("noto", "noto-v1", "twemoji", "openmoji", "emojione", "emojione-v1", "emojione-monotone"),
    *("fluent-emoji", "fluent-emoji-flat", "fluent-emoji-high-contrast", "fxemoji"),
    "streamline-emojis",
)


@pytest.fixture(scope="module")
def emoji_packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji-packages")
    sets = {vendor: icon_set(vendor, n) for n, vendor in enumerate(VENDORS)}
    sets["noto"]["icons"]["no-such-emoji"] = {"body": strokes(1, 1)}
    sets["noto"]["chars"] = {"1f600-fe0f": "red-cat"}
    write_package(
        folder, "iconify-json-1.0.0", {f"json/{name}.json": one for name, one in sets.items()}
    )
    data = [
        {"hexcode": f"1F60{n}", "label": concept, "group": 1, "tags": ["animal", "“pet”"]}
        for n, concept in enumerate(CONCEPTS)
    ]
    write_package(
        folder,
        "emojibase-data-1.0.0",
        {
            "en/data.json": [*data, {"hexcode": "1F3FB", "label": "light skin tone"}],
            "en/messages.json": {"groups": [{"order": 1, "message": "animals & nature"}]},
        },
    )
    return folder


def test_emoji(emoji_packages, tmp_path):
    out = tmp_path / "emoji"
    facts = build_emoji(emoji_packages, out, EmojiSettings(emoji=1), processes=1)
    assert facts["without_a_name"] == {"noto": 1}
    assert facts["splits"]["train"]["sets"] == len(VENDORS) - 3
    train = [sample.caption for sample in read_all(out / "train")]
    assert any("animals & nature" in caption or "animal" in caption for caption in train)
    for part in ("development", "test"):
        (label,) = (out / f"unseen_emoji_{part}" / "classnames.txt").read_text().splitlines()
        assert label in CONCEPTS and not any(label in caption for caption in train)
    assert facts["splits"]["unseen_vendor_test"]["concepts"] == len(CONCEPTS) - 2


def test_emoji_need_all_vendors(emoji_packages, packages, tmp_path):
    content = (packages / "iconify-json-1.10.0.tgz").read_bytes()
    (tmp_path / "iconify-json-1.0.0.tgz").write_bytes(content)
    content = (emoji_packages / "emojibase-data-1.0.0.tgz").read_bytes()
    (tmp_path / "emojibase-data-1.0.0.tgz").write_bytes(content)
    with pytest.raises(UserError, match=r"lacks the sets emojione, .*npm pack @iconify/json"):
        build_emoji(tmp_path, tmp_path / "out", EmojiSettings(), processes=1)
