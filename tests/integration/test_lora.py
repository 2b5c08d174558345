"""LoRA and distillation through the command line: resumed, read, merged, exported, and refused."""

import shutil
from pathlib import Path

import open_clip
import pytest
import torch

from neuclip.checkpoint import storage
from neuclip.cli.app import main
from neuclip.errors import UserError
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.encoder import Encoder
from neuclip.model.load import load_pretrained, load_run
from neuclip.model.lora import LowRankUpdate, add_updates
from neuclip.model.opened_checkpoint import open_checkpoint
from neuclip.run_folder import read_records
from tiny_models import CPU, pairs, tiny

from .conftest import Demo
from .test_resume import assert_same_checkpoint

MORE = (
    "--method", "neuclip_pool", "--pool-size", "32", "--epochs", "1", "--batch-size", "8",
    "--accum-freq", "2", "--workers", "0", "--log-every-n-steps", "1", "--save-every-steps", "1",
    "--keep-step-checkpoints", "19", "--val-frequency", "0", "--grad-checkpointing",
    "--lora-rank", "4", "--lora-alpha", "8", "--lora-modules-to-save", "ln_final",
    "--train-num-samples", "96", "--distill-start", "0.5", "--warm-start-steps", "3",
    "--model-ema-decay", "0.9",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(demo_dir, tmp_path_factory):
    """A run of six steps with LoRA and a teacher, from weights in a file."""
    folder = tmp_path_factory.mktemp("lora")
    demo = Demo(demo_dir, folder / "logs")
    torch.save(tiny(seed=7).towers.state_dict(), folder / "base.pt")
    weights = ("--pretrained", str(folder / "base.pt"))
    assert main(["train", *demo.flags("whole", *weights, *MORE)]) == 0
    return demo, weights


@pytest.mark.parametrize(("start", "new_place"), [("iter_0", False), ("iter_3", True)])
def test_it_continues_bit_by_bit(trained, start, new_place, request):
    """From the end of the warm start; and from a step, where the starting weights have moved."""
    demo, weights = trained
    checkpoints = demo.logs / "whole/checkpoints"
    if new_place:
        base = Path(weights[1])
        moved = base.rename(base.with_name("moved.pt"))
        request.addfinalizer(lambda: moved.rename(base))
        weights = ("--pretrained", str(moved))
    flags = demo.flags(f"from {start}", *weights, *MORE)
    assert main(["train", *flags, "--resume", str(checkpoints / f"{start}.pt")]) == 0
    last = demo.logs / f"from {start}/checkpoints/epoch_1.pt"
    assert_same_checkpoint(checkpoints / "epoch_1.pt", last)


def test_the_records_show_how_far_it_is_from_the_teacher(trained):
    demo, _ = trained
    records = [r for r in read_records(demo.logs / "whole/metrics.jsonl") if r["kind"] == "train"]
    assert abs(records[0]["distill_divergence"]) < 1e-6
    assert records[-1]["distill_divergence"] > 1e-4
    assert all(r["distill_loss"] > r["distill_divergence"] for r in records)
    log = (demo.logs / "whole/out.log").read_text()
    assert "LoRA of rank 4 trains " in log
    assert "distillation from the starting weights, weight 0.5" in log


def test_a_checkpoint_is_small_and_names_its_starting_weights(trained):
    demo, weights = trained
    content = storage.load(demo.logs / "whole/checkpoints/epoch_1.pt")
    record = content["neuclip"]["low_rank"]
    assert record["file"] == weights[1]
    assert record["sha256"] == open_checkpoint(CheckpointChoice(demo.logs / "../base.pt")).sha256
    for part in ("state_dict", "ema_state_dict"):
        names = content[part]
        assert {n for n in names if ".parametrizations." not in n} == {
            "ln_final.weight", "ln_final.bias", "logit_scale",
        }  # fmt: skip
    assert sum(v.numel() for v in content["state_dict"].values()) < 20_000


def unmerged(demo, part):
    """The towers of the run as training has them, with their updates."""
    run = load_run(CheckpointChoice(demo.logs / "whole", ema=False), "cpu")
    clip = tiny(seed=7)
    add_updates(clip.towers, run.config.adaptation, 0)
    saved = storage.load(demo.logs / "whole/checkpoints/epoch_1.pt")[part]
    clip.towers.load_state_dict(saved, strict=False)
    assert any(isinstance(module, LowRankUpdate) for module in clip.towers.modules())
    return clip


@pytest.mark.parametrize("part", ["state_dict", "ema_state_dict"])
def test_all_readers_see_the_merged_model(trained, part, tmp_path):
    demo, _ = trained
    expected = unmerged(demo, part).towers.eval()
    choice = CheckpointChoice(demo.logs / "whole", ema=part == "ema_state_dict")
    loaded = load_pretrained(choice, "cpu")
    out = tmp_path / "exported"
    ema = [] if choice.ema else ["--no-ema"]
    assert main(["export", str(choice.path), "--out", str(out), *ema]) == 0
    weights = str(out / "open_clip_model.pt")
    exported = open_clip.create_model("tiny-vit", pretrained=weights).eval()
    images, tokens = pairs(5)
    with torch.no_grad():
        for towers in (loaded.clip.towers.eval(), exported):
            for name in ("encode_image", "encode_text"):
                given = images if name == "encode_image" else tokens
                one, other = (getattr(t, name)(given, normalize=True) for t in (expected, towers))
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    before = Encoder(tiny(seed=7), CPU).encode_text(tokens)
    assert not torch.allclose(before, loaded.encoder.encode_text(tokens), atol=1e-3)


def test_it_is_the_start_of_another_run_and_an_end_of_a_blend(trained, tmp_path, capsys):
    demo, weights = trained
    teacher = ("--distill-model", "tiny-vit", "--distill-pretrained", weights[1])
    again = (*MORE, "--train-num-samples", "32", "--distill-start", "none", *teacher)
    flags = demo.flags("again", *again, "--pretrained", str(demo.logs / "whole"))
    assert main(["train", *flags]) == 0
    own = storage.load(demo.logs / "again/checkpoints/epoch_1.pt")["neuclip"]
    assert own["low_rank"]["file"].endswith("whole/checkpoints/epoch_1.pt")
    assert own["teacher"] == open_checkpoint(CheckpointChoice(Path(weights[1]))).sha256
    load_pretrained(CheckpointChoice(demo.logs / "again"), "cpu")
    old, new = weights[1], str(demo.logs / "whole")
    data = str(demo.data / "unseen_face_development")
    line = ["blend", old, new, "--val-data", data, "--alphas", "0,1", "--device", "cpu"]
    files = ["--out", str(tmp_path / "mixed"), "--figure", str(tmp_path / "mixed.png")]
    assert main([*line, *files]) == 0


def test_starting_weights_that_are_gone_or_changed_are_named(trained, tmp_path):
    demo, weights = trained
    folder = tmp_path / "logs/moved"
    shutil.copytree(demo.logs / "whole", folder)
    base, content = tmp_path / "base.pt", torch.load(weights[1])
    path = folder / "checkpoints/epoch_1.pt"
    stored = torch.load(path)
    stored["neuclip"]["low_rank"] |= {"file": str(base), "given": "base.pt"}
    torch.save(stored, path)
    (folder / "checkpoints/SHA256SUMS").unlink()
    choice = CheckpointChoice(path)
    sha256 = stored["neuclip"]["low_rank"]["sha256"][:16]
    with pytest.raises(
        UserError, match=rf"trained on: .*base\.pt.*sha256:{sha256}\. Put that file back"
    ):
        open_checkpoint(choice)
    shutil.copy(weights[1], folder / "starting_weights.pt")
    assert open_checkpoint(choice).updates is not None
    content["visual.proj"][0, 0] += 1
    torch.save(content, folder / "starting_weights.pt")
    with pytest.raises(UserError, match=r"holds other weights \(sha256:"):
        open_checkpoint(choice)


def test_lines_that_cannot_work_end_before_the_run(trained, capsys):
    demo, weights = trained
    for more, words in (
        ((), "there are none: add --pretrained"),
        ((*weights, "--lora-rank", "99"), "--lora-rank 99 is above the rank"),
        ((*weights, "--lock-text"), "leave out --lock-text"),
        ((*weights, "--distill-model", "ViT-B-32"), "give both"),
    ):
        flags = demo.flags("refused", *MORE, *more)
        capsys.readouterr()
        assert main(["train", *flags]) == 2
        assert words in capsys.readouterr().err
        assert not (demo.logs / "refused").exists()
    flags = demo.flags("other rank", *weights, *MORE, "--lora-rank", "3", "--resume")
    assert main(["train", *flags, str(demo.logs / "whole/checkpoints/iter_3.pt")]) == 2
    assert "has lora 'rank 4, alpha 8" in capsys.readouterr().err


def test_a_run_that_goes_on_says_which_starting_weights_it_needs(trained, capsys):
    """They moved and nobody said where to; and the line that forgot LoRA does not need them."""
    demo, weights = trained
    base, checkpoint = Path(weights[1]), str(demo.logs / "whole/checkpoints/iter_3.pt")
    moved = base.rename(base.with_name("moved.pt"))
    try:
        capsys.readouterr()
        assert main(["train", *demo.flags("gone", *weights, *MORE, "--resume", checkpoint)]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "base.pt" in told and "Put that file back" in told
        assert "To continue a run, you can also give their new place as --pretrained" in told
        plain = MORE[: MORE.index("--lora-rank")] + MORE[MORE.index("--train-num-samples") :]
        flags = demo.flags("plain", *plain, "--distill-start", "none", "--resume", checkpoint)
        assert main(["train", *flags]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "has lora 'rank 4, alpha 8" in told and "this run has None" in told
    finally:
        moved.rename(base)
