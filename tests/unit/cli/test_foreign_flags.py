"""Flags of other trainers: accepted with a note, spelled in another way, or refused by name."""

import pytest

from command_lines import notes, parse, refusal
from neuclip.cli.flag_table import REFUSED_VALUES
from neuclip.cli.foreign_flags import ACCEPTED, OUT_OF_SCOPE, out_of_scope, read_words
from neuclip.cli.train import flag_names


def as_typed(name):
    flag = ACCEPTED[name]
    return [f"--{name}", *([(flag.only or ("a",))[0]] if flag.takes_value else [])]


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_accepted_flag_is_taken_out_with_a_note(name):
    typed = as_typed(name)
    for words in (
        typed,
        ["=".join([typed[0].replace("-", "_").replace("__", "--", 1), *typed[1:]])],
    ):
        read = read_words(["--lr", "1", *words, "--wd", "2"], {})
        assert read.rest == ("--lr", "1", "--wd", "2")
        assert len(read.notes) == 1
        assert read.notes[0].startswith(" ".join(typed))


def test_accepted_flags_change_nothing():
    line = " ".join(word for name in ACCEPTED for word in as_typed(name))
    assert parse(f"--method openclip {line} --wd 0.3") == parse("--method openclip --wd 0.3")
    assert len(notes(f"--method openclip {line} --wd 0.3")) == len(ACCEPTED)


@pytest.mark.parametrize("name", [*OUT_OF_SCOPE, "audio-ext", "ref_model", "naflex-patch-sizes"])
def test_a_flag_out_of_scope_is_refused_by_name(name):
    message = refusal(f"--method openclip --{name} 1 --lrr 4")
    assert message.startswith(f"--{name}: out of scope: ")
    assert len(message.splitlines()) == 1


def test_all_features_out_of_scope_are_named_at_once():
    assert len(refusal("--coca-caption-loss-weight 1 --use-naflex --audio-ext x").splitlines()) == 3


def test_no_flag_is_both_known_and_out_of_scope():
    known = [name for name, target in flag_names().items() if target != "note"]
    assert not [name for name in known if out_of_scope(name[2:]) or name[2:] in ACCEPTED]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lambda-eps 1", "--lambda-eps 1: only 0 works here"),
        ("--dist-url", "--dist-url needs a value"),
        ("--precision fp16", "--precision fp16: out of scope: weights in float16 lose small"),
        ("--precision pure_bf16", "bf16 keeps them in float32"),
        ("--lr-scheduler const-cooldown", "const-cooldown needs epochs_cooldown"),
        ("--epochs-cooldown 2", "epochs_cooldown has no effect without lr_scheduler"),
        ("--lr-cooldown-power 2", "lr_cooldown_power has no effect without"),
        (
            "--lr-scheduler const-cooldown --epochs 3 --epochs-cooldown 4",
            "epochs_cooldown 4 is longer than the schedule of 3 epochs",
        ),
        (
            "--lr-scheduler const-cooldown --epochs-cooldown 4 --lr-cooldown-end 1",
            "lr_cooldown_end 1 is above lr",
        ),
        ("--image-layer-decay 1.5", "out of range"),
        ("--device tpu", "must be auto, cpu, cuda, cuda:1 or mps"),
        ("--dataset-type synthetic", "needs --train-num-samples"),
        ("--dataset-type csv --data-format folder", "set the same thing"),
        ("--data-format csv --dataset-type webdataset", "set the same thing: leave one out"),
        (
            "--num-prototypes 5 --npn-num-protos 7 --npn",
            "--num-prototypes 5 and --npn-num-protos 7",
        ),
        ("--rho=1 --npn --npn_lr 2 --prototype-lr=3", "--npn-lr 2 and --prototype-lr 3 set"),
        ("--logs a --logs-dir b", "set the same thing: leave one out"),
    ],
)
def test_refused(line, message):
    assert message in refusal(line)


def test_two_spellings_with_one_value_and_repeated_flags_are_fine():
    assert parse("--npn --num-prototypes 5 --npn_num_protos=5").method.num_prototypes == 5
    assert parse("--lr 1 --lr 2").optim.lr == 2


def test_refused_values_are_not_offered(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    assert not [v for values in REFUSED_VALUES.values() for v in values if f",{v}" in shown]


@pytest.mark.parametrize(
    ("line", "section", "expected"),
    [
        ("--precision amp", "model", {"precision": "amp_fp16"}),
        ("--opt timm/Lion", "optim", {"opt": "lion"}),
        (
            "--optimizer lamb --momentum 0.8 --opt-kwargs nesterov=True 'betas=(0.9, 0.95)'",
            "optim",
            {
                "opt": "lamb",
                "momentum": 0.8,
                "opt_kwargs": {"nesterov": True, "betas": (0.9, 0.95)},
            },
        ),
        (
            "--visual-layer-decay 0.7 --text-layer-decay 0.8",
            "optim",
            {"image_layer_decay": 0.7, "text_layer_decay": 0.8},
        ),
        (
            "--lr-scheduler const-cooldown --epochs-cooldown 2 --lr-cooldown-power 2",
            "optim",
            {"epochs_cooldown": 2, "lr_cooldown_power": 2.0},
        ),
        ("--precision amp_bfloat16", "model", {"precision": "amp_bf16"}),
        ("--precision bf16", "model", {"precision": "bf16"}),
        ("--report-to wandb,tensorboard", "output", {"report_to": "all"}),
        ("--report-to 'tensorboard, wandb'", "output", {"report_to": "all"}),
        ("--report-to all,wandb", "output", {"report_to": "all"}),
        ("--report-to tensorboard", "output", {"report_to": "tensorboard"}),
        ("--report-to=", "output", {"report_to": "none"}),
        (
            "--wandb-project-name p --wandb-notes 'a b'",
            "output",
            {"wandb_project_name": "p", "wandb_notes": "a b"},
        ),
        ("--delete-previous-checkpoint --save-frequency 2", "output", {"save_frequency": 0}),
        ("--skip-scheduler", "optim", {"lr_scheduler": "const", "warmup": 0}),
        ("--max-image-pixels 0", "data", {"max_image_pixels": 0}),
        ("--train-num-samples 4e8", "data", {"train_num_samples": 400_000_000}),
        ("--train-num-samples=1.5e3", "data", {"train_num_samples": 1500}),
        ("--dataset-type auto", "data", {"data_format": "auto"}),
        ("--dataset-type csv --data-format csv", "data", {"data_format": "csv"}),
        (
            "--dataset-type synthetic --train-num-samples 320",
            "data",
            {"train_data": "synthetic:320", "data_format": "auto"},
        ),
    ],
)
def test_spellings_of_settings(line, section, expected):
    settings = getattr(parse(line), section).model_dump()
    assert {key: settings[key] for key in expected} == expected


def test_spellings_that_stand_for_other_flags_say_so():
    line = "--skip-scheduler --delete-previous-checkpoint --precision amp"
    assert all(any(note.startswith(flag) for note in notes(line)) for flag in line.split()[:3])


# --aug-cfg


def test_augmentation_is_read_as_open_clip_reads_it():
    line = "--aug-cfg scale='(0.4, 1.0)' color_jitter='(0.32, 0.32, 0.32, 0.08)' "
    config = parse(f"{line} color_jitter_prob=0.8 gray_scale_prob=0.2 --epochs 6").data.aug_cfg
    assert config is not None
    assert config.given() == {
        "scale": (0.4, 1.0),
        "color_jitter": (0.32, 0.32, 0.32, 0.08),
        "color_jitter_prob": 0.8,
        "gray_scale_prob": 0.2,
        "use_timm": False,
    }
    assert parse("--aug-cfg none").data.aug_cfg is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("scal=1", "--aug-cfg scal: no such key; did you mean 'scale'?"),
        ("scale='(0.4, 2)'", "must be a range within (0, 1]"),
        ("scale='(0.9, 0.4)'", "must be a range within (0, 1]"),
        ("scale=0.4", "--aug-cfg scale: Input should be a valid tuple (got 0.4)"),
        ("gray_scale_prob=2", "--aug-cfg gray_scale_prob: 2 is out of range"),
        ("color_jitter_prob=0.8", "goes together with color_jitter_prob"),
        ("color_jitter='(1, 1, 1, 0.1)'", "goes together with color_jitter_prob"),
        ("re_prob=0.1", "only use_timm=True reads them"),
        ("use_timm=True gray_scale_prob=0.2", "use_timm=True does not read them"),
        ("0.4", "--aug-cfg takes words like key=value"),
        ("scale='(0.4, 1)' scale='(0.4, 1)'", "each key once"),
    ],
)
def test_augmentation_names_what_is_wrong(words, message):
    assert message in refusal(f"--aug-cfg {words}")


def test_augmentation_in_a_file(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {aug_cfg: {scale: [0.4, 1.0]}}\n")
    config = parse(f"--config {tmp_path / 'a.yaml'}")
    assert config.data.aug_cfg is not None
    assert config.data.aug_cfg.scale == (0.4, 1.0)
    (tmp_path / "b.yaml").write_text(config.to_yaml())
    assert parse(f"--config {tmp_path / 'b.yaml'}") == config
    (tmp_path / "a.yaml").write_text("data: {aug_cfg: {scal: 1}}\n")
    assert "a.yaml: data.aug_cfg scal: no such key" in refusal(f"--config {tmp_path / 'a.yaml'}")
