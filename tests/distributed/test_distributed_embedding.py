"""Several ranks fill one folder of embeddings, and go on with what killed ranks have left."""

import random

import pytest
from embedding_tasks import embed

from embedding_folders import COLORS, content, write_pictures

pytestmark = pytest.mark.distributed


def test_two_ranks_finish_what_killed_ranks_have_left(pool, tmp_path):
    """A killed rank leaves any of its shards unfinished, and parts of files under hidden names."""
    folder = write_pictures(tmp_path / "pictures", COLORS)
    (folder / "003.png").write_bytes(b"no picture")
    embed(folder, tmp_path / "one")
    complete = content(tmp_path / "one")
    two = tmp_path / "two"
    assert sorted(pool.run(2, embed, folder, two)) == [4, 6]
    assert content(two) == complete
    numbers = random.Random(0)
    for _ in range(3):
        shards = numbers.sample(range(3), 2)
        for shard in shards:
            for path in two.glob(f"*/*{shard:05}*"):
                if path.parent.name == "finished" or numbers.random() < 0.5:
                    path.rename(path.with_name(f".{path.name}.0123456789ab.partial"))
        assert sum(pool.run(2, embed, folder, two)) == sum((3, 4, 3)[shard] for shard in shards)
        assert content(two) == complete
