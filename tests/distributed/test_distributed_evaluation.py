"""Several ranks evaluate exactly as one: every metric, every feature, to the last bit."""

import json
import random
from dataclasses import fields

import pytest
import torch
from evaluation_tasks import (
    evaluate_own,
    evaluate_suite,
    probe,
    refused,
    run,
    sharing,
    trained_loss,
)

from datacomp_sets import write_classification, write_imagenet, write_suite
from neuclip.evaluation.results import read_eval_results

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("name", "sizes"), [("neuclip_pool", (2, 3)), ("siglip", (2,))])
def test_a_split_is_evaluated_as_by_one_process(pool, demo_dir, name, sizes):
    folder, state = demo_dir / "unseen_character_test", trained_loss(name).state_dict()
    metrics, encoded, _, gallery = evaluate_own(folder, name, state)
    assert ("normalizer_mse" in metrics) == (name != "siglip")
    assert len(encoded) % 24  # an incomplete batch
    for size in sizes:
        ranks = pool.run(size, evaluate_own, folder, name, state)
        for rank, (own, features, after, shown) in enumerate(ranks):
            assert own == metrics
            assert shown == (gallery if rank == 0 else None)
            assert after.keys() == state.keys()
            for field in fields(encoded):
                one, other = getattr(encoded, field.name), getattr(features, field.name)
                assert torch.equal(one, other) if torch.is_tensor(one) else one == other


def test_the_suite_is_evaluated_as_by_one_process(pool, tmp_path):
    answers = write_suite(tmp_path / "sets")
    one = evaluate_suite(tmp_path / "sets", tmp_path / "one.jsonl")
    for key, answer in answers.items():
        assert {k: one[key][k] for k in answer} == pytest.approx(answer, abs=1e-7), key
    results = tmp_path / "three.jsonl"
    assert pool.run(3, evaluate_suite, tmp_path / "sets", results) == [one] * 3
    assert {line.key: line.metrics for line in read_eval_results(results)} == one


def test_probes_are_those_of_one_process(pool, tmp_path):
    """The training samples are more than a batch, so that two ranks share them."""
    numbers = random.Random(0)
    for name, count in (("set", 30), ("other", 60)):
        rows = [
            (
                tuple(120 * (part == row % 3) + numbers.randrange(90) for part in range(3)),
                row % 3,
                None,
            )
            for row in range(count)
        ]
        write_classification(tmp_path / name, rows, 3)
    (tmp_path / "other" / "test").rename(tmp_path / "set" / "train")
    one = probe(tmp_path / "set")
    assert one["num_probe_samples"] == 60 and one["linear_probe_acc1"] > 0.5
    assert pool.run(2, probe, tmp_path / "set") == [one] * 2


def test_what_one_process_meets_ends_all_with_one_message(pool, tmp_path):
    write_suite(tmp_path, keys=["mnist"])
    shard = tmp_path / "wds_mnist_test" / "test" / "1.tar"
    content = bytearray(shard.read_bytes())
    start = content.index(b"\x89PNG")
    content[start : start + 8] = b"no image"
    shard.write_bytes(content)
    for size in (1, 2, 3):
        ranks = pool.run(size, refused, tmp_path)
        assert all(rank == ranks[0] for rank in ranks)
        damaged, missing, failed = ranks[0]
        assert damaged.startswith("mnist: an evaluation set must be complete: ")
        assert "1.tar" in damaged
        assert missing.startswith("the set of cifar10 is missing in")
        assert failed.startswith(f"rank {size - 1} cannot do [")


def test_helpers(pool):
    shares = [[0, 0, 0, 1, 1], [0, 0, 1, 1, 2]]
    for size, owners in zip((2, 3), shares, strict=True):
        for rank in pool.run(size, sharing):
            assert [found["rank"] for found in rank["objects"]] == list(range(size))
            assert [len(found["tensor"]) for found in rank["objects"]] == list(range(size))
            assert rank["shared"] == list(enumerate(owners))
            assert rank["none"] == []
            assert rank["main"] == "made by 0"
            assert rank["alone"] == (1, 0, True)
            assert rank["after"] == size


def test_training_with_two_processes_records_what_one_finds_in_its_checkpoint(
    pool, demo_dir, tmp_path
):
    """Splits with the normalizer's error, ImageNet, and tasks; also with a single rank."""
    write_suite(tmp_path / "sets", keys=["mnist", "winogavil"])
    write_imagenet(tmp_path / "imagenet")
    data = [
        "--val-data", str(demo_dir / "unseen_character_test"), "--imagenet-val",
        str(tmp_path / "imagenet"), "--eval-tasks", "mnist,winogavil", "--eval-data-dir",
        str(tmp_path / "sets"), "--eval-samples", "150", "--val-batch-size", "24",
        "--zeroshot-frequency", "1", "--model", "glyph-tiny", "--workers", "0", "--device", "cpu",
    ]  # fmt: skip
    train = [
        "--method", "neuclip_pool", "--pool-size", "7", "--train-data", str(demo_dir / "train"),
        "--train-num-samples", "40", "--batch-size", "10", "--epochs", "1", "--warmup", "1",
        "--logs-dir", str(tmp_path / "logs"), "--name", "two",
    ]  # fmt: skip
    pool.run(2, run, ["train", *data, *train])
    two = records(tmp_path / "logs" / "two")
    assert list(two) == ["unseen_character_test", "imagenet-val@150", "mnist", "misc/winogavil"]
    assert two["unseen_character_test"]["normalizer_mse"] > 0
    assert two["imagenet-val@150"]["partial_of"] == 1000
    resume = ["--epochs", "0", "--resume", str(tmp_path / "logs/two/checkpoints/epoch_1.pt")]
    again = [*data, *resume, "--logs-dir", str(tmp_path / "logs"), "--name", "one"]
    run(["train", *again])
    assert records(tmp_path / "logs" / "one") == two
    results = "eval_results/epoch_1_eval_results.jsonl"
    written = [(tmp_path / "logs" / name / results).read_text() for name in ("one", "two")]
    assert written[0] == written[1]
    (tmp_path / "logs/two" / results).unlink()
    # A checkpoint of two ranks, evaluated by three.
    pool.run(3, run, ["eval", str(tmp_path / "logs/two"), "--batch-size", "24", "--workers", "0"])
    (line,) = read_eval_results(tmp_path / "logs/two" / results)
    assert (line.key, line.metrics) == ("unseen_character_test", two["unseen_character_test"])
    assert (tmp_path / "logs/one/config.yaml").read_text().startswith("name: one\n")


def records(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["split"]: line["metrics"] for line in lines if line["kind"] == "eval"}
