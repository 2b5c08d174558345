"""Which wheels a machine without network lacks; nothing is downloaded."""

from argparse import Namespace

from packaging.requirements import Requirement
from test_docs import script


def test_what_the_machine_has_is_left_out_unless_it_is_too_old(tmp_path):
    gather = script("gather_wheels")
    listed = tmp_path / "present.txt"
    listed.write_text("torch==2.11.0\nPyYAML  6.0.1\nhuggingface_hub==1.33.0\njinja2\n")
    there = gather.present(listed)
    assert (there["torch"], there["pyyaml"], there["jinja2"]) == (None, "6.0.1", None)
    wanted = [
        Requirement(line) for line in ("pyyaml>=6", "huggingface_hub>=2.4", "jinja2", "torch")
    ]
    found = gather.lacking(wanted, there, "3.12")
    assert "huggingface-hub" in found  # too old, and with it what it needs
    assert "httpx2" in found
    assert not {"pyyaml", "jinja2", "markupsafe", "torch"} & set(found)


def test_what_is_needed_is_followed_by_python_version_and_system():
    gather = script("gather_wheels")
    wanted = [
        Requirement('tomli; python_version < "3.11"'),
        Requirement("colorama; os_name == 'nt'"),
    ]
    assert gather.lacking(wanted, {}, "3.12") == []


def test_versions_are_those_of_the_constraints():
    gather = script("gather_wheels")
    args = Namespace(present=None, python_version="3.12", without_trainer=False)
    found = gather.chosen(args)
    assert "open-clip-torch==3.3.0" in found
    assert "webdataset==0.2.86" in found
    assert not [name for name in found if name.startswith(("torch", "triton", "nvidia"))]
    args.without_trainer = True
    assert not [name for name in gather.chosen(args) if name.startswith("webdataset")]
