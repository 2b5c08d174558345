"""The catalogue of methods."""

import dataclasses
import re
from typing import Literal

import pytest
from pydantic import ValidationError

from neuclip.catalogue import registry
from neuclip.catalogue.create import build_loss
from neuclip.catalogue.fields import setting
from neuclip.catalogue.method_info import MethodInfo, RunFacts
from neuclip.catalogue.method_settings import MethodSettings, gamma_floor
from neuclip.catalogue.neuclip import recorded_method
from neuclip.catalogue.registry import METHODS, method_info, method_settings
from neuclip.cli.flag_table import bounds, table
from neuclip.errors import UserError, nearest


def test_names_are_unique_and_select_their_row():
    assert list(METHODS) == [info.name for info in METHODS.values()]
    assert {"openclip", "rgcl_batch", "neuclip"} <= set(METHODS)
    for name, info in METHODS.items():
        assert method_info(name) is info
        assert method_settings(name, {}).model_dump()["name"] == name


@pytest.mark.parametrize("info", METHODS.values(), ids=lambda info: info.name)
def test_rows_are_complete(info):
    assert info.summary and info.normalizer and info.state
    assert info.formula.strip() and info.formula.isascii()
    assert any(mark in info.paper for mark in ("arXiv", "LibAUC", "ICML", "ICLR", "ICCV"))


@pytest.mark.parametrize("info", METHODS.values(), ids=lambda info: info.name)
def test_settings_are_described_and_their_ranges_hold(info):
    for key, field in info.settings.model_fields.items():
        if key == "name":
            continue
        assert field.description, key
        if bounds(field):
            with pytest.raises(UserError, match=key):
                method_settings(info.name, {key: -1 if ">" in bounds(field) else 1e9})
    with pytest.raises(ValidationError, match="frozen"):
        info.settings().temperature = 1.0


def test_settings_are_checked():
    assert method_settings("neuclip", {"gamma": 0.5}).model_dump()["gamma"] == 0.5
    with pytest.raises(UserError, match="has no setting 'gama'; did you mean 'gamma'"):
        method_settings("neuclip", {"gama": 0.5})
    with pytest.raises(UserError, match="has no setting 'num_prototypes'"):
        method_settings("openclip", {"num_prototypes": 4})
    with pytest.raises(UserError, match=r"gamma: .* less than or equal to 1"):
        method_settings("neuclip", {"gamma": 2})
    with pytest.raises(UserError, match=r"unknown method 'clip'; .*known: .*openclip"):
        method_settings("clip", {})


def test_nearest_lists_what_exists():
    assert nearest("neuclop", ["openclip", "neuclip"]) == (
        "did you mean 'neuclip'? known: neuclip, openclip"
    )
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
    assert nearest("NEU CLIP", ["openclip", "neuclip"]).startswith("did you mean 'neuclip'?")


def test_of_many_words_only_the_nearest_are_listed():
    many = ["ViT-B-32", "ViT-B-16", *map(str, range(10**6, 10**6 + 130))]
    message = nearest("vit-b/32", many, "neuclip models")
    assert message == ("did you mean 'ViT-B-32' or 'ViT-B-16'? neuclip models lists all 132")
    assert nearest("zzz", many) == "132 are known"


def test_gamma_floor_is_the_published_rule():
    assert gamma_floor(24.0) == pytest.approx(0.42, abs=0.01)
    assert gamma_floor(1.0) == 1.0
    assert gamma_floor(37.0) < gamma_floor(24.0)


def test_records_of_the_pool_under_its_old_name_are_told_apart():
    assert recorded_method({"name": "neuclip", "refresh": "fifo"}) == "neuclip_pool"
    assert recorded_method({"name": "neuclip", "refresh": "restart"}) == "neuclip"
    assert recorded_method({"name": "openclip"}) == "openclip"


def test_a_flag_has_one_meaning(monkeypatch):
    class LrSettings(MethodSettings):
        name: Literal["mine"] = "mine"
        lr: float = setting(1.0, "taken by the optimiser")

    info = dataclasses.replace(METHODS["openclip"], settings=LrSettings)
    monkeypatch.setitem(registry._table, "mine", info)
    with pytest.raises(UserError, match="the flag --lr of method mine is already the flag of opti"):
        table()


class Mine(MethodSettings):
    name: Literal["mine"] = "mine"


class Nameless(MethodSettings):
    pass


class AnyName(MethodSettings):
    name: str = "mine"


class Required(Mine):
    margin: float


class OutOfRange(Mine):
    margin: float = setting(-1.0, "a margin", ge=0)


def row(**changed: object) -> MethodInfo:
    """A row of the user's, with parts that the type checker would refuse."""
    info = dataclasses.replace(METHODS["openclip"])
    for key, value in {"settings": Mine, **changed}.items():
        object.__setattr__(info, key, value)
    return info


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (
            row(settings=Nameless),
            "Nameless of .* must select the method by a field such as",
        ),
        (row(settings=AnyName), "AnyName of .* must select the method by a field such as"),
        (row(settings=Required), "'mine' of .*test_registry.py, defaults: margin: Field required"),
        (row(settings=OutOfRange), "'mine' of .*py, defaults: margin: .*or equal to 0 .got -1.0"),
        (row(settings=Mine()), "settings=Mine.* must be a class derived from MethodSettings"),
        (row(settings=dict), "settings=<class 'dict'> must be a class derived from MethodSettings"),
        (row(build=None), "method 'mine' of .*test_registry.py: build must be a function"),
        (row(resolve=3), "method 'mine' of .*test_registry.py: resolve must be a function"),
        (Mine, "register takes a MethodInfo, not <class"),
    ],
)
def test_an_unusable_row_is_named_in_one_line(info, message):
    problem = registry._problem_of_row(info)
    assert re.search(message, problem), problem
    assert "\n" not in problem
    if isinstance(info, MethodInfo):
        with pytest.raises(UserError, match=re.escape(problem)):
            registry.register(info)
    assert "mine" not in METHODS


def test_a_usable_row_has_no_problem():
    assert registry._problem_of_row(row()) is None


@pytest.mark.parametrize("part", ["build", "resolve"])
def test_what_a_method_returns_is_checked(part, monkeypatch):
    made = row(**{part: lambda *_: None})
    monkeypatch.setattr("neuclip.catalogue.create.method_info", lambda name: made)
    with pytest.raises(UserError, match=rf"'mine' of .*registry.py: {part} returned None instead"):
        build_loss(Mine(), RunFacts(4))
