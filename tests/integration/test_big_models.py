"""What large models need, by the command line: average, locks, memory that runs out."""

import pytest
import torch

from neuclip.checkpoint import storage
from neuclip.cli.app import main
from neuclip.evaluation.results import read_eval_results
from neuclip.training.evaluating import Evaluator
from neuclip.training.trainer import Trainer

from .test_resume import assert_same_checkpoint, comparable

METHOD = ("--method", "rgcl_batch", "--workers", "0")


def test_an_averaged_run_resumes_bit_by_bit_and_is_evaluated_by_its_average(demo, monkeypatch):
    flags = (*METHOD, "--model-ema-decay", "0.9", "--save-every-steps", "7")
    evaluated_average = []
    evaluate = Evaluator.evaluate

    def watch(evaluator, sets, step, between_sets):
        run = evaluator._run
        weights = storage.load(run.folder.latest)
        average, live = weights["ema_state_dict"], run.clip.towers.visual.conv1.weight
        evaluated_average.append(torch.equal(live, average["visual.conv1.weight"]))
        return evaluate(evaluator, sets, step, between_sets)

    monkeypatch.setattr(Evaluator, "evaluate", watch)
    assert main(["train", *demo.flags("whole", *flags)]) == 0
    assert evaluated_average == [True, True]
    assert main(["train", *demo.flags("halved", *flags, "--stop-epochs", "1")]) == 0
    assert main(["train", *demo.flags("halved", *flags, "--resume", "latest")]) == 0
    one, two = (demo.logs / name / "checkpoints/epoch_2.pt" for name in ("whole", "halved"))
    assert_same_checkpoint(one, two)
    assert comparable(demo.logs / "whole") == comparable(demo.logs / "halved")
    content = storage.load(one)
    averages, weights = content["ema_state_dict"], content["state_dict"]
    assert averages.keys() == weights.keys()
    assert not torch.equal(averages["visual.conv1.weight"], weights["visual.conv1.weight"])
    results = demo.logs / "whole/eval_results/epoch_2_eval_results.jsonl"
    in_training = read_eval_results(results)
    judging = ["eval", str(demo.logs / "whole"), "--workers", "0", "--device", "cpu"]
    assert main(judging) == 0
    assert read_eval_results(results) == in_training
    assert main([*judging, "--no-ema"]) == 0
    assert read_eval_results(results) == in_training
    plain = read_eval_results(results.with_name("epoch_2_weights_eval_results.jsonl"))
    assert [line.key for line in plain] == [line.key for line in in_training]
    assert plain[0].metrics != in_training[0].metrics


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo hides it, pytest shows it
def test_a_locked_tower_stays_what_its_file_says(demo, capsys):
    flags = (*METHOD, "--epochs", "1", "--val-frequency", "0")
    assert main(["train", *demo.flags("first", *flags, model="glyph-tiny")]) == 0
    first = demo.logs / "first"
    locked = ("--lock-image", "--lock-image-freeze-bn-stats", "--grad-checkpointing")
    more = ("--pretrained", str(first), *locked, "--torchcompile", "--torchcompile-backend=eager")
    assert main(["train", *demo.flags("second", *flags, *more, model="glyph-tiny")]) == 0
    said = capsys.readouterr().err
    assert "initial weights: " in said
    assert "--grad-checkpointing: the image tower (ModifiedResNet) does not" in said
    assert "random weights" not in said
    one, two = (
        storage.load(demo.logs / name / "checkpoints/epoch_1.pt") for name in ("first", "second")
    )
    before, after = one["state_dict"], two["state_dict"]
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("visual."), name
    assert len(two["optimizer"]["state"]) < len(one["optimizer"]["state"])


def test_memory_that_runs_out_says_what_lowers_it(demo, capsys, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(Trainer, "train_step", exhausted)
    assert main(["train", *demo.flags("big", *METHOD)]) == 2
    said = capsys.readouterr().err
    assert "out of memory in a training step: CUDA out of memory" in said
    assert "--batch-size below 16" in said
    assert "--grad-checkpointing" in said
    assert "Traceback" not in said
