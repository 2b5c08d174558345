import pytest

from neuclip.config.data_sections import ReadingConfig
from neuclip.errors import UserError
from neuclip.evaluation.splits import open_split

SAMPLES = [("000", (1, 2, 3), "a caption", 0)]


def test_reads_names_and_templates(small_split):
    split = open_split(small_split)
    assert split.name == "letters"
    assert len(split.index) == 7
    assert split.classnames[:2] == ["latin a", "greek alpha"]
    assert split.templates == ["{c}", "the letter {c}"]


def test_without_classes_it_is_for_retrieval(tmp_path, write_split):
    split = open_split(write_split(tmp_path / "s", SAMPLES))
    assert (split.classnames, split.templates) == ([], [])


def test_names_may_have_dos_line_ends_and_letters_of_any_script(tmp_path, write_split):
    folder = write_split(tmp_path / "s", SAMPLES, ["x"], ["{c}"])
    (folder / "classnames.txt").write_bytes("\u00e9t\u00e9\r\nb\r\n".encode())
    assert open_split(folder).classnames == ["\u00e9t\u00e9", "b"]


def captions(split):
    return [split.index.read(position).captions for position in range(len(split.index))]


def test_captions_of_a_split_with_classes_come_from_the_caption_key(tmp_path, write_split, log):
    log.set_level("INFO", "neuclip")
    records = [{"short": "red"}, {"long": "a blue picture"}]
    samples = [
        (f"00{place}", (1, 2, 3), f"text {place}", 0, record)
        for place, record in enumerate(records)
    ]
    folder = write_split(tmp_path / "s", samples, ["x"], ["{c}"])
    assert captions(open_split(folder)) == [("text 0",), ("text 1",)]
    # A sample without the key has no caption; its class is evaluated.
    assert captions(open_split(folder, reading=ReadingConfig(caption_key="short"))) == [
        ("red",),
        (),
    ]
    both = ReadingConfig(caption_keys="short=0,long=1")
    assert captions(open_split(folder, reading=both)) == [("red",), ("a blue picture",)]
    assert "captions from" not in log.text
    other = open_split(folder, reading=ReadingConfig(caption_key="llava;blip"))
    assert captions(other) == [("text 0",), ("text 1",)]
    assert "captions from the .txt files: no caption under 'llava' or 'blip'" in log.text
    plain = write_split(tmp_path / "t", SAMPLES, ["x"], ["{c}"])
    assert captions(open_split(plain, reading=both)) == [("a caption",)]


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such file or folder"):
        open_split(tmp_path / "nowhere")


def test_a_folder_without_shards(tmp_path):
    (tmp_path / "classnames.txt").write_text("a\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("{c}\n")
    with pytest.raises(UserError, match=r"contains no \.tar shards, tables or images"):
        open_split(tmp_path)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"templates": ["{c}"]}, r"has zeroshot_classification_templates\.txt but no classnames"),
        ({"classnames": ["a"], "templates": ["{c}", "a photo"]}, r"line 2: 'a photo' has no \{c\}"),
        ({"classnames": ["a", "", "b"], "templates": ["{c}"]}, r"classnames\.txt, line 2 is empty"),
        ({"classnames": [], "templates": ["{c}"]}, r"has zeroshot_.*\.txt but no classnames\.txt"),
    ],
)
def test_contradictions(tmp_path, write_split, files, text):
    with pytest.raises(UserError, match=text):
        open_split(write_split(tmp_path / "s", SAMPLES, **files))


def test_without_templates_a_prompt_is_chosen_and_logged(tmp_path, write_split, log):
    log.set_level("INFO", "neuclip")
    split = open_split(write_split(tmp_path / "s", SAMPLES, ["x"]))
    assert split.templates == ["a photo of a {c}."]
    assert "the prompt is 'a photo of a {c}.'" in log.text


def test_names_that_are_no_utf8(tmp_path, write_split):
    folder = write_split(tmp_path / "s", SAMPLES, ["x"], ["{c}"])
    (folder / "classnames.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match=r"classnames\.txt cannot be read as UTF-8"):
        open_split(folder)
