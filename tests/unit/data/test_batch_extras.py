"""Groups, pair weights, hard negatives and weighted captions in the batches of training."""

import json
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.batch import Extras
from neuclip.data.groups import components, image_id, read_groups, text_id
from neuclip.data.loader import LoaderSettings, TrainLoader
from neuclip.data.opening import open_source

ALL = Extras(groups=True, pair_weights=True, hard_negatives=True)
READING = ReadingConfig(
    caption_keys="long=3,short=1", label_key="class", hard_negative_key="not", pair_weight_key="w"
)
SAMPLES = 24


@pytest.fixture(scope="module")
def table(tmp_path_factory, picture):
    """Images 0 and 1 are equal; two samples a label; odd samples have no hard negative."""
    folder = tmp_path_factory.mktemp("table")
    lines = []
    for number in range(SAMPLES):
        (folder / f"{number}.png").write_bytes(picture(max(number, 1)))
        row = {
            "image": f"{number}.png",
            "long": f"long {number}",
            "short": "short" if number < 3 else None,
            "class": number // 2 or None,
            "not": None if number % 2 else [f"not {number}", f"never {number}"],
            "w": number / 4,
        }
        lines.append(json.dumps(row) + "\n")
    (folder / "t.jsonl").write_text("".join(lines))
    return folder / "t.jsonl"


def tokenize(texts):
    rows = [[ord(character) for character in text[:12]] for text in texts]
    return torch.tensor([row + [0] * (12 - len(row)) for row in rows])


def loader(table, batch_size=8, extras=ALL, **more):
    def transform(image):
        return pil_to_tensor(image) / 255

    source = open_source(str(table), READING)
    settings = LoaderSettings(batch_size, extras=extras, **more)
    return TrainLoader(source, transform, tokenize, settings)


def content(batch):
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {key: v.tolist() if isinstance(v, Tensor) else v for key, v in values.items()}


def test_a_batch_has_what_was_asked_for(table, picture):
    for batch in loader(table):
        for row, position in enumerate(batch.sample_ids.tolist()):
            assert batch.groups[row].tolist() == [
                text_id(batch.captions[row]),
                image_id(picture(max(position, 1))),
                text_id(str(position // 2)) if position > 1 else 0,
            ]
            assert batch.pair_weights[row] == position / 4
            assert batch.has_negative[row] == (position % 2 == 0)
            tokens = batch.negative_tokens[row : row + 1]
            negatives = [f"not {position}", f"never {position}"] if position % 2 == 0 else [""]
            assert any(torch.equal(tokens, tokenize([text])) for text in negatives)
    (batch, *_) = loader(table, extras=Extras())
    assert (batch.groups, batch.pair_weights, batch.negative_tokens, batch.has_negative) == (
        (None,) * 4
    )


def test_draws_do_not_depend_on_processes_or_on_where_reading_begins(table):
    expected = [content(batch) for batch in loader(table, seed=3)]
    assert [content(batch) for batch in loader(table, seed=3, workers=2)] == expected
    resumed = loader(table, seed=3)
    resumed.set_position(0, 2)
    assert [content(batch) for batch in resumed] == expected[2:]
    plain = [content(batch) for batch in loader(table, seed=3, extras=Extras())]
    for one, other in zip(plain, expected, strict=True):
        for key in ("images", "captions", "tokens", "keys"):
            assert one[key] == other[key]


def test_captions_are_drawn_by_weight_and_negatives_evenly(table):
    captions, negatives = Counter(), Counter()
    drawn = loader(table, num_samples=SAMPLES * 200)
    for batch in drawn:
        for row, position in enumerate(batch.sample_ids.tolist()):
            if position == 2:
                captions[batch.captions[row].split()[0]] += 1
                negatives[batch.negative_tokens[row].tolist()[2]] += 1
            elif position > 2:
                assert batch.captions[row].startswith("long")  # its share is all of it
    assert sum(captions.values()) == 200
    assert abs(captions["short"] - 50) < 4 * np.sqrt(200 * 3 / 16)
    assert abs(min(negatives.values()) - 100) < 4 * np.sqrt(200 / 4)


def test_no_batch_of_two_ranks_holds_duplicates(table):
    source = open_source(str(table), READING)
    own = components(read_groups(source, READING))
    assert Counter(Counter(own.tolist()).values()) == {4: 1, 2: 10}  # 0 to 2 share a caption
    more = {"world_size": 2, "components": own, "workers": 0}
    ranks = [list(loader(table, 3, rank=rank, **more)) for rank in range(2)]
    for parts in zip(*ranks, strict=True):
        ids = torch.cat([part.sample_ids for part in parts])
        assert len(ids) == len({int(own[position]) for position in ids}) == 6
    alone = loader(table, 6, components=own)
    assert [b.keys for b in alone] == [
        [*a.keys, *b.keys] for a, b in zip(*ranks, strict=True)
    ]  # whatever the number of ranks
    assert "no batch holds two samples of a group" in alone.description
    assert alone.order_digest != loader(table, 6).order_digest
    assert alone.order_digest == loader(table, 3, **more).order_digest
