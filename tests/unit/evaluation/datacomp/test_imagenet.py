import shutil

import pytest

from datacomp_sets import write_imagenet
from neuclip.errors import UserError
from neuclip.evaluation.datacomp.imagenet import IMAGENET_V2, IMAGENET_VAL, open_imagenet
from neuclip.model.clip import imagenet_prompts

PROMPTS = [f"name {n}" for n in range(1000)], ["a {c}"]


def test_wordnet_ids_are_classes_in_sorted_order(tmp_path):
    found = open_imagenet(write_imagenet(tmp_path / "val"), IMAGENET_VAL, *PROMPTS)
    assert len(found.index) == 1000
    assert found.index.content(3).key == "n10000021/a"
    assert found.index.content(3).class_index == 3
    assert (found.task.key, found.classnames, found.templates) == ("imagenet-val", *PROMPTS)


def test_numbers_are_classes_in_numeric_order(tmp_path):
    found = open_imagenet(write_imagenet(tmp_path / "v2", numbered=True), IMAGENET_V2, *PROMPTS)
    contents = [found.index.content(n) for n in (2, 10, 999)]
    assert [c.key for c in contents] == ["2/a", "10/a", "999/a"]
    assert [c.class_index for c in contents] == [2, 10, 999]


def test_what_is_not_imagenet_is_refused(tmp_path):
    with pytest.raises(UserError, match="no folder of ImageNet images at"):
        open_imagenet(tmp_path / "none", IMAGENET_VAL, *PROMPTS)
    with pytest.raises(UserError, match=r"expected 1000 folders.*found 0"):
        open_imagenet(tmp_path, IMAGENET_VAL, *PROMPTS)
    folder = write_imagenet(tmp_path / "v2", numbered=True)
    (folder / "1000").mkdir()
    shutil.rmtree(folder / "7")
    with pytest.raises(UserError, match=r"found 1000\. The position"):
        open_imagenet(folder, IMAGENET_V2, *PROMPTS)
    (folder / "val").mkdir()
    with pytest.raises(
        UserError, match=r"named by WordNet id.*found '0'\. Classes of your own: --val-data"
    ):
        open_imagenet(folder, IMAGENET_V2, *PROMPTS)


def test_prompts_are_open_clips():
    names, templates = imagenet_prompts()
    assert (len(names), len(templates)) == (1000, 80)
    assert names[0] == "tench"
    assert templates[0] == "a bad photo of a {c}."
    assert all("{c}" in template for template in templates)
