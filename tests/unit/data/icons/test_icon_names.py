"""Names of icons as words and styles."""

import pytest

from neuclip.data.icons.set_names import SetNames, spell_category, split_words


def names_of(*names, **content):
    return SetNames({"icons": {name: {"body": ""} for name in names}, **content})


@pytest.mark.parametrize(
    ("name", "others", "words", "styles"),
    [
        ("account-arrow-left-outline", ["account-arrow-left"], "account arrow left", "outline"),
        ("bell-outline", ["bell-solid"], "bell", "outline"),
        ("skyline-outline", [], "skyline outline", ""),  # no other form: it may be a word
        ("dice-6", [], "dice 6", ""),
        ("user-2", ["user"], "user", "2"),
        ("star-f", ["star"], "star", "f"),
        ("x-o", [], "x o", ""),
        ("home-2-fill", ["home-2"], "home", "fill 2"),
        ("volume2", [], "volume", "2"),
        ("arrow-24px", [], "arrow", "24px"),
        ("outline", [], "outline", ""),
    ],
)
def test_names_without_listed_suffixes(name, others, words, styles):
    fillers = [f"thing{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    parsed = names_of(name, *others, *fillers).parse(name)
    assert " ".join(parsed.words) == words
    assert " ".join(parsed.styles) == styles


def test_suffixes_and_prefixes_that_a_set_lists():
    names = names_of(
        "outline-bell-20-solid",
        suffixes={"": "Outline", "solid": "Solid", "20-solid": "Mini"},
        prefixes={"outline": "Outline"},
    )
    parsed = names.parse("outline-bell-20-solid")
    assert parsed.words == ("bell",)
    assert parsed.said_styles == "solid outline"


def test_a_frequent_ending_is_a_style_of_the_set():
    names = names_of("cat-bold", "dog-bold", "bird")
    assert names.parse("cat-bold").words == ("cat",)


def test_words_in_another_order_are_one_concept():
    names = names_of("arrow-left-circle", "circle-arrow-left")
    assert len({names.parse(name).concept for name in names}) == 1


def test_hidden_icons_are_left_out():
    assert list(SetNames({"icons": {"a": {"body": "", "hidden": True}, "b": {"body": ""}}})) == [
        "b"
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ComputerDevices", "computer devices"),
        ("Maps/Flags", "maps, flags"),
        ("user_interface", "user interface"),
        ("Other", ""),
    ],
)
def test_categories(name, said):
    assert spell_category(name) == said


def test_numbers_at_the_end_of_words():
    assert split_words("Volume2") == ["volume", "2"]
    assert split_words("h1") == ["h1"]
