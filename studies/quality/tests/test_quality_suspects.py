"""The suspects: one change each to a recipe, in cells whose earlier forms stay as they are."""

import json
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
from quality_rows import row_of, rows_of
from studies.quality.cell import Cell
from studies.quality.datasets import DATA_SETS, MAIN_SETS
from studies.quality.development_report import (
    curves_table,
    n_eff,
    negatives_table,
    recipes_table,
    suspects_table,
)
from studies.quality.plan import BOUNDS, MAIN, ORDER, QUEUES, RIVALS, Line, cells_of, part, plan
from studies.quality.recipes import RECIPES, cell
from studies.quality.report import tables
from studies.quality.suspects import SUSPECTS
from studies.quality.variants import register_variants

from neuclip.config.resolve import resolve
from neuclip.config.run_config import RunConfig
from neuclip.config.validation import validate
from neuclip.data.icons.emoji_sets import _UNSEEN_VENDORS, _VENDORS
from neuclip.evaluation.class_names import prompts_of

EMOJI = Line("suspects", "emoji", 64, ("neuclip_pool",), (0,))


@pytest.fixture
def _registered():
    register_variants()


def config(found: Cell) -> RunConfig:
    return found.config(Path("train"), [Path("a"), Path("b")], Path("logs"), 11_545)


EARLIER = """{"data_set": "emoji", "model": "icon-tiny", "label": "neuclip_pool",
 "note": "lr0.001-rho6.5", "method": {"name": "neuclip_pool", "gamma": 0.4, "rho": 6.5},
 "lr": 0.001, "batch": 64, "accum": 1, "passes": 8, "evaluated_every": 2, "seed": 0,
 "precision": "fp32"}"""
"""The cell of a row that was written before cells had sections."""

SETTINGS = {
    "name": "emoji_neuclip_pool_lr0.001-rho6.5_b64_s0", "seed": 0, "resume": "auto",
    "device": "cpu",
    "method": {"name": "neuclip_pool", "gamma": 0.4, "rho": 6.5},
    "model": {"name": "icon-tiny", "precision": "fp32"},
    "data": {"train_data": "train", "batch_size": 64, "accum_freq": 1, "workers": 0},
    "optim": {
        "epochs": 8, "lr": 1e-3, "warmup": 200, "wd": 0.1, "lr_tau": 1e-3,
        "lr_tau_scheduler": "const",
    },
    "evaluation": {"val_data": "a::b", "val_frequency": 2},
    "output": {
        "logs": "logs", "save_frequency": 0, "save_every_steps": 500, "keep_step_checkpoints": 1,
        "log_every_n_steps": 36,
    },
}  # fmt: skip
"""What it trained with."""


def test_cells_of_earlier_rows_train_with_the_same_settings():
    earlier = json.loads(EARLIER)
    found = Cell(**earlier)
    assert found == cell(RECIPES["neuclip_pool"], "emoji")
    assert asdict(found) == {**earlier, "sections": {}}
    assert config(found) == validate(SETTINGS, found.name)


def test_only_sections_that_say_so_change_settings_besides_the_methods():
    for line in ORDER:
        for found in cells_of(line, {}):
            assert not found.sections or line.section in {"suspects", "augmented", "equal"}


def test_sections_are_laid_over_the_cells_own_and_survive_a_row():
    found = next(s for s in SUSPECTS if s.label == "mask-concept").cell("emoji")
    assert Cell(**json.loads(json.dumps(asdict(found)))) == found
    data = config(found).data
    assert (data.false_negatives, data.label_key, data.batch_size) == ("mask", "concept", 64)


def test_the_first_suspects_come_after_the_main_recipes_on_all_data():
    cells = plan({})
    first = cells.index(SUSPECTS[0].cell("emoji"))
    main = {cell(RECIPES[method], data).name for method, data in product(MAIN, MAIN_SETS)}
    assert main <= {each.name for each in cells[:first]}
    mine = cells[first : first + len(SUSPECTS)]
    assert mine == [suspect.cell("emoji") for suspect in SUSPECTS]
    later = part("suspects", "emoji", {}).cells
    assert {each.seed for each in later} == {0, 1, 2}
    assert {each.seed for each in part("suspects", "icons", {}).cells} == {0}


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("data", ["emoji", "icons"])
def test_every_suspect_changes_its_recipe_and_has_valid_settings(data):
    for suspect in SUSPECTS:
        recipe = config(cell(RECIPES[suspect.method], data)).model_dump()
        found = suspect.cell(data)
        settings = resolve(config(found), 1).model_dump()
        before = resolve(config(cell(RECIPES[suspect.method], data)), 1).model_dump()
        changed = {
            (section, key)
            for section in ("method", "data", "optim", "supervision", "model", "evaluation")
            for key in settings[section]
            if settings[section][key] != before[section].get(key)
        }
        assert changed, suspect.change
        assert {section for section, _ in changed} <= {"method", *found.sections}
        assert recipe["optim"]["lr"] == settings["optim"]["lr"]


def test_rhos_are_points_of_the_grid_and_train_once():
    grid = {each.name for each in cells_of(Line("tuned", "emoji", 64, ("neuclip_pool",), (0,)), {})}
    mine = {each.name for each in cells_of(EMOJI, {})}
    assert {f"emoji_neuclip_pool_lr0.001-rho{rho}_b64_s0" for rho in ("5", "3.5")} <= grid & mine


def test_captions_of_the_concept_alone_follow_the_data():
    named = [suspect for suspect in SUSPECTS if suspect.label.startswith("names")]
    on_glyphs = {"balanced", "two-sided", *QUEUES, "groups16", "names", "names-mask", *BOUNDS}
    on_glyphs |= set(RIVALS)
    mine = [
        suspect
        for suspect in SUSPECTS
        if suspect.label in on_glyphs or suspect.method == "rgcl_queue"
    ]
    cells = [suspect.cell("glyphs") for suspect in mine]
    assert {each.name for each in part("suspects", "glyphs", {}).cells} == {c.name for c in cells}
    for suspect, (data, key) in product(named, (("glyphs", "name"), ("emoji", "concept"))):
        found = config(suspect.cell(data))
        assert (found.data.caption_key, found.evaluation.val_templates) == (key, "{c}")
        assert (found.data.false_negatives == "mask") == ("mask" in suspect.label)
        assert (found.data.aug_cfg is not None) == ("crops" in suspect.label)


def test_the_longer_emoji_of_equal_size_are_the_suspects_with_bare_names():
    line = Line("equal", "emoji", 64, ("neuclip_pool", "rgcl_batch"), (0,), longer=3)
    suspects = [each for each in SUSPECTS if each.label == "names"]
    assert cells_of(line, {}) == [each.cell("emoji", longer=3) for each in suspects]


def test_prompts_name_every_set_that_training_has():
    emoji = next(s for s in SUSPECTS if s.label == "set-names").cell("emoji", longer=3)
    prompts = config(emoji).evaluation.val_templates
    trained = set(_VENDORS) - {name for names in _UNSEEN_VENDORS.values() for name in names}
    assert prompts_of(prompts) == [f"{name}:{{c}}" for name in sorted(trained)]


def test_sizes_and_lengths_follow_the_data():
    by_label = {suspect.label: suspect for suspect in SUSPECTS}
    shares = [by_label["glyph-shares"].cell(data).method for data in ("emoji", "icons")]
    assert [each["pool_size"] for each in shares] == [2355, 28467]
    assert [each["gradient_size"] for each in shares] == [589, 7117]
    half = [by_label["gamma-half"].cell(data).method for data in ("emoji", "icons")]
    assert [each["gamma_decay_epochs"] for each in half] == [4, 1]
    assert by_label["gamma-half"].cell("emoji", longer=3).method["gamma_decay_epochs"] == 12


def test_half_of_the_rate_at_1024_pairs_for_all_three_methods():
    for data in ("emoji", "icons"):
        cells = [each for each in part("memory", data, {}).cells if each.accum == 16]
        found = {(each.label, each.seed, config(each).optim.lr) for each in cells}
        for method, rate in (("openclip", 8e-3), ("fastclip_v3", 4e-3), ("neuclip_pool", 4e-3)):
            rates = sorted({lr for label, _, lr in found if label == method})
            assert rates == pytest.approx([rate / 2, rate])
        assert len(cells) == len(found) == 3 * 5 * 2


# --- the table ----------------------------------------------------------------------------------


def test_the_table_has_differences_to_the_recipe_and_the_end_of_the_normalizer():
    recipe = [cell(RECIPES["neuclip_pool"], "emoji", seed=seed) for seed in (0, 1)]
    gamma = next(suspect for suspect in SUSPECTS if suspect.label == "gamma0.2")
    rows = rows_of(recipe, 0.25)
    assert suspects_table(rows) == ""
    end = {
        "mse": 1.5, "mae": 1.0, "bias": -0.5, "minibatch_mse": 9.0, "temperature": 0.0329,
        "divergence": 6.5,
    }  # fmt: skip
    rows = {name: {**row, "errors": [{**end, "divergence": 5.0}]} for name, row in rows.items()}
    mine = gamma.cell("emoji", 0)
    rows[mine.name] = row_of(mine, 0.3, errors=[end])
    table = suspects_table(rows)
    assert (
        "| emoji | `neuclip_pool` | none: the recipe | 2 | 25.0 ± 0.0 | - | 25.0 ± 0.0 | - "
        "| 0.0329 ± 0.0000 | 78 ± 0 | 0.167 ± 0.000 |" in table
    )
    assert (
        "| emoji | `neuclip_pool` | gamma 0.2 | 1 | 30.0 | +5.0 | 30.0 | +5.0 "
        "| 0.0329 | 17 | 0.167 |" in table
    )
    assert "### Suspects: " in tables(rows, {})
    count = len(part("suspects", "emoji", {}).cells)
    assert count > 3 * len(SUSPECTS)  # three seeds, and the longer runs
    assert f"- suspects, emoji: 1 of {count} runs trained; for choosing" in tables(rows, {})
    failed = {**rows, mine.name: {**rows[mine.name], "failed": "not finite"}}
    assert "| gamma 0.2 | 0 (1 failed) | - | - | - | - | - | - | - |" in suspects_table(failed)


def test_negatives_have_a_table_of_their_own():
    assert negatives_table({}) == ""
    by_change = {each.change: each for each in SUSPECTS}
    recipe = cell(RECIPES["rgcl_batch"], "emoji")
    rows = rows_of([recipe], 0.5)
    assert negatives_table(rows) == ""  # no run in groups
    for size, acc1 in ((16, 0.3), (32, 0.4)):
        rows |= rows_of([by_change[f"negatives in groups of {size}"].cell("emoji")], acc1)
    larger = Line("negatives", "emoji", 256, ("rgcl_batch",), (0,))
    rows |= rows_of(cells_of(larger, {})[1:], 0.6)  # without its whole batch
    softer = by_change["negatives in groups of 16, rho 1"]  # changes the temperature, too
    rows |= rows_of([softer.cell("emoji")], 0.9)
    assert [line.split(" | ")[1:8] for line in negatives_table(rows).splitlines()[2:]] == [
        ["64", "63", "1", "50.0", "-", "50.0", "-"],
        ["64", "31", "1", "40.0", "-10.0", "40.0", "-10.0"],
        ["64", "15", "1", "30.0", "-20.0", "30.0", "-20.0"],
        ["256", "255", "0", "-", "-", "-", "-"],
        ["256", "63", "1", "60.0", "-", "60.0", "-"],
        ["256", "63, normalizers of 255", "1", "60.0", "-", "60.0", "-"],
    ]
    assert "### Negatives of an anchor at the same steps" in tables(rows, {})


def test_longer_suspects_are_compared_with_the_longer_recipe():
    (recipe,) = cells_of(Line("longer", "emoji", 64, ("neuclip_pool",), (0,), longer=3), {})
    line = Line("suspects", "emoji", 64, ("neuclip_pool",), (0,), longer=3)
    gamma = next(found for found in cells_of(line, {}) if "gamma0.2" in found.note)
    assert gamma.name == "emoji_neuclip_pool_lr0.001-rho6.5-gamma0.2-x3_b64_s0"
    short = cell(RECIPES["neuclip_pool"], "emoji")
    rows = rows_of([short], 0.5) | rows_of([recipe], 0.25) | rows_of([gamma], 0.3)
    table = suspects_table(rows)
    assert "| emoji, 24 passes | `neuclip_pool` | none: the recipe | 1 | 25.0 | - |" in table
    assert "| emoji, 24 passes | `neuclip_pool` | gamma 0.2 | 1 | 30.0 | +5.0 |" in table
    assert "50.0" not in table  # of the short run no suspect has run


def test_the_recipes_have_a_table_of_their_own():
    assert recipes_table({}) == ""
    rows = rows_of([cell(RECIPES["openclip"], "emoji", seed=seed) for seed in (0, 1)], 0.2)
    larger = cell(RECIPES["openclip"], "emoji", batch=256)
    rows[larger.name] = row_of(larger, 0.9)
    (longer,) = cells_of(Line("longer", "emoji", 64, ("openclip",), (0,), longer=3), {})
    losses = [{"loss": 4.0}] * 38 + [{"loss": 0.25}, {"loss": 0.75}]  # a twentieth: two of 40
    rows[longer.name] = row_of(longer, 0.4, training=losses)
    assert recipes_table(rows).splitlines()[2:] == [
        "| emoji | `openclip` | 2 | 20.0 ± 0.0 | 20.0 ± 0.0 | 0.0300 ± 0.0000 | - "
        "| 0.167 ± 0.000 | - |",
        "| emoji, 24 passes | `openclip` | 1 | 40.0 | 40.0 | 0.0300 | - | 0.167 | 0.50 |",
    ]


def test_the_curves_are_means_over_seeds_at_each_evaluation():
    assert curves_table({}) == ""
    splits = DATA_SETS["icons"].split_names("development")
    rows = {}
    for seed, (one, two) in enumerate([(0.1, 0.2), (0.3, 0.4)]):
        found = cell(RECIPES["openclip"], "icons", seed=seed)
        scores = product(((1.0, one), (2.0, two)), splits)
        evaluations = [{"epoch": e, "split": split, "acc1": acc1} for (e, acc1), split in scores]
        rows[found.name] = row_of(found, evaluations=evaluations)
    queue = cell(RECIPES["infonce_queue"], "icons")  # not one of the main methods
    assert curves_table(rows | rows_of([queue])).splitlines()[2:] == [
        "| icons | `openclip` | 2 | 1, 2 | 20.0, 30.0 | 20.0, 30.0 |"
    ]


def test_rows_without_a_divergence_have_no_effective_number():
    (row,) = rows_of([cell(RECIPES["neuclip_pool"], "emoji")]).values()
    assert n_eff(row) is None
