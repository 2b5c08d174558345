"""How far embeddings move: the numbers against loops, and the command on small data."""

import json
from dataclasses import replace

import pytest
import torch
from studies.quality import drift as drift_module
from studies.quality import run as run_module
from studies.quality.datasets import DATA_SETS, GLYPHS
from studies.quality.drift import drift_table, move
from studies.quality.recipes import RECIPES, cell
from studies.quality.rows import DRIFT


def pairs(count: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(found, dim=-1)


def test_a_rotation_of_all_embeddings_is_found():
    then = pairs(9, 4)
    rotation = torch.linalg.qr(pairs(4, 4)[0]).Q
    found = move(then, then @ rotation, 16)
    assert found.own < 0.9
    assert found.rotated == pytest.approx(1)
    assert found.others_then != pytest.approx(found.others, abs=0.01)
    assert move(then, then, 16).own == pytest.approx(1)


def test_the_means_are_those_of_loops():
    then, now = pairs(5, 3), pairs(5, 3).flip(-1)
    found = move(then, now, 4)
    own = [float(then[side, i] @ now[side, i]) for side in (0, 1) for i in range(5)]
    assert found.own == pytest.approx(sum(own) / 10)
    assert found.positive == pytest.approx(sum(float(now[0, i] @ now[1, i]) for i in range(5)) / 5)
    for candidates, value in ((now, found.others), (then, found.others_then)):
        similar = [
            float(now[side, i] @ candidates[1 - side, j])
            for side in (0, 1) for i in range(5) for j in range(5) if i != j
        ]  # fmt: skip
        assert value == pytest.approx(sum(similar) / len(similar))


@pytest.mark.slow
def test_the_command_on_small_data(demo_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DATA_SETS, "glyphs", replace(GLYPHS, passes=4, evaluated_every=4))
    monkeypatch.setattr(drift_module, "EVERY", 1)
    monkeypatch.setattr(drift_module, "AGES", (1, 6))
    name = cell(RECIPES["rgcl_batch"], "glyphs").name
    words = ["drift", "--glyphs", str(demo_dir), "--out", str(tmp_path), "--match"]
    assert run_module.main([*words, "no such cell"]) == 1
    assert "no cell of these data has a name" in capsys.readouterr().err
    assert run_module.main([*words, name, "--passes", "1"]) == 1
    assert f"1 pass of {name}: 5 steps" in capsys.readouterr().err
    for _ in range(2):  # nothing is measured twice
        assert run_module.main([*words, name]) == 0
    assert f"{name} was measured at step 11 before" in capsys.readouterr().out
    (line,) = (tmp_path / DRIFT).read_text(encoding="utf-8").splitlines()
    row = json.loads(line)
    assert row["step"] == 11  # of the twelve, the last is an epoch's
    assert [each["age"] for each in row["moves"]] == [1, 6]
    assert all(0 < each["own"] <= each["rotated"] + 1e-3 <= 1.002 for each in row["moves"])
    assert f"| `{name}` | 11 | 6 | " in drift_table({name: row})
