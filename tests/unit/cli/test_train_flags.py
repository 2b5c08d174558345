"""The command line of `neuclip train`: precedence, notes, errors, the frozen table."""

import json
import shlex
from typing import get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from command_lines import DATA, command, parse, refusal
from neuclip.catalogue.registry import METHODS
from neuclip.cli.eval import Eval, recorded_reading, unrepeated
from neuclip.cli.flag_table import table
from neuclip.cli.train import flag_names, parse_train
from neuclip.config.run_config import RunConfig
from neuclip.errors import UserError


@pytest.mark.parametrize("recipe", ["demo-neuclip", "demo-neuclip_pool"])
def test_demos_use_the_prediction(recipe):
    assert parse(f"--recipe {recipe}").method.gamma < 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--inner-steps 0 --npn-lr 1", "--prototype-lr has no effect with --inner-steps 0"),
        ("--inner-steps 0 --log-weights", "--log-weights has no effect with --inner-steps 0"),
        ("--npn --mixing none --gamma 0.4", "--gamma has no effect with --mixing none"),
        ("--npn --refresh rolling --restart-fill batch", "--restart-fill has no effect with --ref"),
    ],
)
def test_a_setting_without_effect_is_refused(flags, message):
    assert message in refusal(f"--method neuclip {flags}")
    parse("--method neuclip --refresh restart --inner-steps 1 --npn-restart-iter 9 --npn-lr 1")


def test_a_gradient_size_without_gradient_is_refused():
    message = refusal("--method neuclip_pool --gradient detached --gradient-size 9")
    assert "--gradient-size has no effect with --gradient detached" in message
    parse("--method neuclip_pool --gradient union --gradient-size 9")


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("", "method neuclip_pool, the default"),
        ("", "(open_clip's own objective: --method openclip)"),
        ("--local-loss", "--local-loss: no effect: the gradient over the global batch is always"),
        ("--npn", "method neuclip, selected by --npn"),
        ("--fastclip --multiply_tau", "temperature_gradient fastclip"),
        ("--method scent --gamma 4", "--gamma is rate_offset of scent: 4"),
        ("--method scent --gamma-schedule cosine", "--gamma-schedule cosine has no effect"),
        ("--method scent --gamma-decay-epochs 5", "--gamma-decay-epochs 5.0 has no effect"),
        ("--precision amp", "--precision amp is called amp_fp16 here"),
        ("--precision amp_bfloat16", "--precision amp_bfloat16 is called amp_bf16 here"),
    ],
)
def test_what_is_inferred_or_without_effect_is_said_once(line, note):
    notes = parse_train(shlex.split(line)).notes
    assert sum(note in each for each in notes) == 1, notes


def test_plain_line_says_nothing():
    assert parse_train(["--method", "neuclip", "--lr", "1e-3"]).notes == ()


def test_underscores_equals_signs_and_aliases():
    one = parse("--method neuclip --npn_num_protos 8 --fastclip_eps=1e-3 --batch_size=32")
    two = parse("--method neuclip --num-prototypes=8 --epsilon 1e-3 --batch-size 32")
    assert one == two
    assert one.method.num_prototypes == 8


@pytest.mark.parametrize("word", ["none", "None"])
def test_none_resets_what_a_recipe_sets(word):
    assert parse("--recipe neuclip-dfn14m").data.data_size is not None
    assert parse(f"--recipe neuclip-dfn14m --data-size {word}").data.data_size is None


@pytest.mark.parametrize("flag", [flag for flag in table() if flag.optional], ids=lambda f: f.name)
def test_none_is_read_as_the_help_writes_it(flag):
    owners = [
        name for name, field in flag.fields.items() if type(None) in get_args(field.annotation)
    ]
    method = owners[0] or "neuclip_pool"
    line = f"--method {method} --{flag.name} none"
    tree = parse_train(shlex.split(line)).config.model_dump()
    section = tree[flag.path[0]] if flag.path[0] else tree
    assert section[flag.path[1]] != "none"


def test_none_stays_a_choice_where_it_is_one():
    assert parse("--report-to none").output.report_to == "none"


def test_switch_can_be_turned_off_again():
    assert parse("--recipe openclip-cc3m").output.profile
    assert not parse("--recipe openclip-cc3m --no-profile").output.profile


def test_published_names_of_evaluation_flags():
    config = parse("--imagenet-val ./val --imagenet-v2 ./v2 --zeroshot-frequency 0 --val-data ./x")
    evaluation = config.evaluation
    assert (evaluation.imagenet_val, evaluation.imagenet_v2) == ("./val", "./v2")
    assert (evaluation.zeroshot_frequency, evaluation.val_frequency) == (0, 1)
    assert evaluation.val_data == "./x"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--eval-tasks mnist", "eval_tasks .* and eval_data_dir .* go together"),
        ("--eval-data-dir ./sets", "eval_tasks .* and eval_data_dir .* go together"),
        ("--eval-samples 500 --val-data ./x", "eval_samples limits .*: none is given"),
        ("--eval-samples 99 --imagenet-val ./x", "--eval-samples: 99 is out of range.*>= 100"),
    ],
)
def test_evaluation_flags_that_would_have_no_effect(line, text):
    with pytest.raises(UserError, match=text):
        parse(line)


def test_recipe_below_files_below_flags(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "optim: {lr: 1.0e-3, wd: 0.3, warmup: 7}\nmethod: {gamma: 0.5}\n"
    )
    (tmp_path / "b.yaml").write_text("optim: {wd: 0.4}\ndata:\n")
    config = parse(
        f"--config {tmp_path / 'a.yaml'} --lr 2e-3 --recipe neuclip-dfn14m "
        f"--config={tmp_path / 'b.yaml'}"
    )
    assert (config.optim.lr, config.optim.wd, config.optim.warmup) == (2e-3, 0.4, 7)
    assert (config.method.gamma, config.method.rho, config.data.batch_size) == (0.5, 11.0, 512)


def test_later_file_wins(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\n")
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    assert parse(f"--config {a} --config {b}").name == "b"
    assert parse(f"--config {b} --config {a}").name == "a"
    assert parse(f"--config {b} --name c --config {a}").name == "c"


def test_settings_do_not_leak_into_another_method(tmp_path):
    (tmp_path / "a.yaml").write_text("method: {name: neuclip, rho: 9, num_prototypes: 8}\n")
    (tmp_path / "b.yaml").write_text("method: {name: rgcl_batch}\n")
    a, b = (f"--config {tmp_path / name}.yaml" for name in "ab")
    assert parse(a).method.rho == 9
    assert parse(f"{a} --method rgcl_batch").method.rho == 6.5
    assert parse(f"{a} {b}").method.rho == 6.5
    assert parse(f"{a} --method neuclip").method.num_prototypes == 8


values = st.fixed_dictionaries(
    {},
    optional={
        "--lr": st.floats(1e-6, 1),
        "--wd": st.floats(0, 1),
        "--rho": st.floats(0, 100),
        "--epsilon": st.floats(0, 1),
        "--gamma": st.floats(0, 1),
        "--temperature": st.floats(0.01, 1),  # not below its lower bound
        "--pool-size": st.integers(1, 10**6),
        "--seed": st.integers(0, 2**31),
        "--epochs": st.integers(0, 100),
        "--lr_tau": st.floats(1e-9, 1),
        "--train-data": st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
        "--name": st.sampled_from(["a", "null", "1", "1e3", "yes", "~", "a: b", "# no"]),
        "--device": st.sampled_from(["auto", "cpu"]),
        "--gradient": st.sampled_from(["detached", "full", "union"]),
    },
)


@settings(max_examples=15, deadline=None)
@given(values)
def test_yaml_round_trip(tmp_path_factory, flags):
    config = parse_train([f"{flag}={value}" for flag, value in flags.items()]).config
    file = tmp_path_factory.mktemp("round") / "config.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    command = parse_train(["--config", str(file)])
    assert command.config == config
    assert command.config.to_yaml() == config.to_yaml()
    assert command.notes == ()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--method nueclip", "unknown method 'nueclip'; did you mean 'neuclip'?"),
        ("--recipe neuclip", "unknown recipe 'neuclip'; did you mean 'demo-neuclip',"),
        (
            "--method openclip --num-prototypes 4",
            "--num-prototypes is a setting of neuclip; method openclip has",
        ),
        ("--recipe openclip-cc3m --rho 4", "method openclip has --temperature"),
        ("--method openclip --gamma 0.3", "neuclip_pool; method openclip has --temperature"),
        ("--lr -1", "--lr: -1 is out of range; it must be > 0"),
        ("--lr inf", "--lr: Input should be a finite number"),
        ("--beta1 1.5", "--beta1: 1.5 is out of range; it must be >= 0 and < 1"),
        ("--gamma 1.5", "--gamma: 1.5 is out of range; it must be >= 0 and <= 1"),
        ("--npn --npn_num_protos 0", "--num-prototypes: 0 is out of range; it must be >= 1"),
        ("--pool-size 0", "--pool-size: 0 is out of range; it must be >= 1"),
        ("--restart-steps 9", "is a setting of neuclip; method neuclip_pool has --temperature"),
        ("--method siglip --logit-bias nan", "--logit-bias: Input should be a finite number"),
        ("--method amorlip --rho inf", "--rho: Input should be a finite number"),
        ("--method scent --gamma inf", "--rate-offset: Input should be a finite number"),
        ("--batch-size 1", "--batch-size: 1 is out of range; it must be >= 2"),
        ("--temperature 0 --method openclip", "--temperature: 0 is out of range; it must be > 0"),
        (
            "--temperature 0.005",
            "--temperature-min: must be at most the temperature at the start, 0.005 (got 0.01)",
        ),
        ("--lr_min 1", "lr_min 1 is above lr"),
        ("--lr_tau_scheduler step_thresh", "needs lr_tau"),
        ("--epochs 2 --stop_epochs 3", "stop_epochs 3 is beyond the schedule of 2 epochs"),
        ("--name a/b", "cannot be a folder's name"),
        ("--lock-image-unlocked-groups 2", "needs the lock: add --lock-image"),
        ("--lock-text-freeze-layer-norm", "needs the lock: add --lock-text"),
        ("--fsdp --precision bf16", "--precision amp_bf16 computes with bfloat16 parameters"),
        ("--force-patch-dropout 1", "--force-patch-dropout: 1 is out of range"),
        ("--model-ema-decay 1", "--model-ema-decay: 1 is out of range; it must be > 0 and < 1"),
        ("--config missing.yaml", "configuration missing.yaml: No such file"),
    ],
)
def test_refused(line, message):
    assert message in refusal(line)


def test_all_wrong_values_are_told_at_once():
    assert len(refusal("--lr -1 --wd -1 --batch-size 0").splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", "a.yaml: optim.lrr: no such key; did you mean 'lr'?"),
        ("optimm: {lr: 1}", "a.yaml: optimm: no such key; did you mean 'optim'?"),
        ("method: {gama: 1}", "a.yaml: method.gama: no such key; did you mean 'gamma'?"),
        ("method: {name: openclip, rho: 1}", "a.yaml: method.rho: no such key"),
        (
            "method: {name: nuclip}",
            "a.yaml: method: unknown method 'nuclip'; did you mean 'neuclip'?",
        ),
        ("method: openclip", "a.yaml: method: a section is expected"),
        ("evaluation: 4", "a.yaml: evaluation: a section is expected"),
        ("optim: {lr: -1}", "a.yaml: optim.lr: -1 is out of range; it must be > 0"),
        ("method: {gamma: 2}", "a.yaml: method.gamma: 2 is out of range; it must be >= 0 and <= 1"),
        ("optim: {lr: much}", "a.yaml: optim.lr: Input should be a valid number"),
        ("optim: {epochs: 1.5}", "(got 1.5)"),
        ("- a", "a.yaml: expected sections, found list"),
        ("a: [", "a.yaml is not YAML"),
    ],
)
def test_refused_file(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    assert message in refusal(f"--config {tmp_path / 'a.yaml'}")


def test_error_names_the_file_that_is_wrong(tmp_path):
    (tmp_path / "good.yaml").write_text("optim: {lr: 1}\n")
    (tmp_path / "bad.yaml").write_text("optim: {wd: -1}\n")
    message = refusal(f"--config {tmp_path / 'good.yaml'} --config {tmp_path / 'bad.yaml'} --lr 1")
    assert "bad.yaml" in message
    assert "good.yaml" not in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--batch-sizes 4", "--batch-size INT"),
        ("--batch 4", "--batch-size INT"),  # no guessing of abbreviations
        ("--batch-size x", "--batch-size"),
        ("--precision fp17", "fp32"),
        ("--temperature_scheme local", "individual_learnable"),
        ("--lr", "--lr"),
        ("word", "word"),
    ],
)
def test_refused_by_the_parser(line, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(line)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_defaults_ranges_and_owners(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as caught:
        parse_train(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in table():
        assert f"--{flag.name}" in text
    assert "(a step has accum_freq) (default: 64; >= 2)" in text
    assert "--num-prototypes INT, --npn-num-protos INT" in text
    assert "none: those of 128 global batches" in text
    assert "(default: 500 steps; >= 1; only neuclip)" in text


def test_flag_names_are_unique():
    names = [name for flag in table() for name in (f"--{flag.name}", *flag.aliases)]
    assert len(set(names)) == len(names)


def test_every_setting_has_a_flag():
    tree = yaml.safe_load(parse("").to_yaml())
    sections = {key for key, value in tree.items() if isinstance(value, dict)}
    keys = {(section, key) for section in sections - {"method"} for key in tree[section]}
    keys |= {("", key) for key in tree.keys() - sections}
    for info in METHODS.values():
        keys |= {("method", key) for key in info.settings.model_fields if key != "name"}
    assert keys == {flag.path for flag in table()}


def test_open_clips_flags_for_tables():
    data = parse(
        "--train-data t.csv --dataset-type csv --csv-separator , --csv-img-key a "
        "--csv-caption-key b --train-data-upsampling-factors 1"
    ).data
    assert (data.data_format, data.csv_separator, data.csv_img_key) == ("csv", ",", "a")
    assert (data.csv_caption_key, data.train_data_upsampling_factors) == ("b", "1")
    assert parse("--json-text-key long;short").data.caption_key == "long;short"
    assert parse("--dataset-type webdataset").data.data_format == "webdataset"


def test_flags_are_frozen():
    """A flag is a promise to people's scripts: a change of one is a change of data/flags.json."""
    assert flag_names() == json.loads((DATA / "flags.json").read_text())


OLD_POOL = """\
method:
  name: neuclip
  gamma: 0.4
  num_prototypes: 8192
  inner_steps: 0
  restart_steps: 500
  refresh: fifo
  gradient: full
  gradient_prototypes: 2048
"""


def test_the_pool_under_its_old_name_is_refused_with_the_new_one(tmp_path):
    (tmp_path / "a.yaml").write_text(OLD_POOL)
    message = refusal(f"--config {tmp_path / 'a.yaml'}")
    assert "a.yaml: method: neuclip is the published method now" in message
    assert "write 'name: neuclip_pool, pool_size: 8192, gradient_size: 2048'" in message
    new = "method: {name: neuclip_pool, gamma: 0.4, pool_size: 8192, gradient_size: 2048}"
    (tmp_path / "a.yaml").write_text(new)
    assert parse(f"--config {tmp_path / 'a.yaml'}").method.pool_size == 8192


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{name: scent, gamma: 10, gamma_schedule: constant}",
            "a.yaml: method: gamma is called rate_offset now; leave out gamma_schedule",
        ),
        ("{name: neuclip_pool, num_prototypes: 64}", "num_prototypes is called pool_size now"),
        (
            "{name: neuclip_pool, gradient_prototypes: 9}",
            "gradient_prototypes is called grad",
        ),
        ("{name: neuklip}", "unknown method 'neuklip'; did you mean 'neuclip'?"),
        ("{name: neuklip}", "methods of your own: set NEUCLIP_METHODS"),
    ],
)
def test_earlier_names_in_a_file_are_refused_with_todays(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(f"method: {text}\n")
    assert message in refusal(f"--config {tmp_path / 'a.yaml'}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--recipe demo-neuclip-published", "is called 'demo-neuclip' now"),
        ("--num-prototypes 64", "--num-prototypes is --pool-size in method neuclip_pool"),
        ("--method scent --gamma 10 --rate-offset 9", "set the same thing: leave one out"),
    ],
)
def test_earlier_names_and_doubled_flags_are_refused(line, message):
    assert message in refusal(line)


def test_a_line_that_only_evaluates_names_no_method():
    line = "--resume a.pt --epochs 0 --imagenet-val ./val"
    assert not any("method" in note for note in parse_train(shlex.split(line)).notes)


def test_the_network_under_its_old_settings_is_the_same_method(tmp_path):
    old = OLD_POOL.replace("refresh: fifo", "refresh: restart").replace(
        "inner_steps: 0", "inner_steps: 10"
    )
    (tmp_path / "a.yaml").write_text(
        old.replace("gradient_prototypes: 2048", "gradient_prototypes: null")
    )
    assert parse(f"--config {tmp_path / 'a.yaml'}").method.num_prototypes == 8192


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{name: neuclip}", True),
        ("{name: neuclip, gamma: 0.4, num_prototypes: 64}", True),
        ("{name: neuclip, inner_steps: 10}", False),
        ("{name: neuclip_pool}", False),
        ("{gamma: 0.4}", False),
    ],
)
def test_a_file_that_may_mean_the_pool_is_named(tmp_path, text, said):
    (tmp_path / "a.yaml").write_text(f"method: {text}\n")
    notes = command(f"--config {tmp_path / 'a.yaml'}").notes
    assert any("a.yaml: method neuclip is the published NeuCLIP" in note for note in notes) == said


@pytest.mark.parametrize(
    ("sources", "said"),
    [("a.csv", "here, of which there are none; open_clip's"), ("https://h/{0..3}.tar", "here; o")],
)
def test_the_cache_folder_is_not_open_clips(sources, said):
    (note,) = [n for n in command(f"--train-data {sources} --cache-dir x").notes if "cache" in n]
    assert said in note


def test_smoke_says_what_it_replaces():
    command = parse_train(["--smoke", "--epochs", "7", "--lr", "0.002"])
    assert any(note.startswith("--smoke puts glyph-tiny") for note in command.notes)
    assert command.config.model.name == "glyph-tiny"
    assert (command.config.optim.epochs, command.config.optim.lr) == (2, 0.002)


def test_open_clips_flags_for_large_models():
    line = (
        "--lock-image --lock-image-unlocked-groups 2 --lock-image-freeze-bn-stats --lock-text "
        "--lock-text-unlocked-layers 3 --lock-text-freeze-layer-norm --grad-checkpointing "
        "--force-patch-dropout 0.5 --torchcompile --pretrained weights.pt"
    )
    model = parse(line).model
    assert (model.lock_image, model.lock_image_unlocked_groups) == (True, 2)
    assert (model.lock_text, model.lock_text_unlocked_layers) == (True, 3)
    assert model.lock_image_freeze_bn_stats
    assert model.lock_text_freeze_layer_norm
    assert (model.grad_checkpointing, model.torchcompile) == (True, True)
    assert (model.force_patch_dropout, model.pretrained) == (0.5, "weights.pt")
    smoke = parse(f"{line} --smoke").model
    assert (smoke.lock_image, smoke.lock_image_unlocked_groups, smoke.pretrained) == (True, 0, None)


def test_a_file_alone_does_not_allow_commands(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data: {allow_pipe: true, train_data: 'pipe:cat x.tar'}\n")
    assert "give --allow-pipe if you trust the file" in refusal(f"--config {path}")
    path.with_name("b.yaml").write_text("optim: {lr: 1}\n")
    assert "allow_pipe" in refusal(f"--config {path} --config {path.with_name('b.yaml')}")
    assert parse_train(["--config", str(path), "--allow-pipe"]).config.data.allow_pipe
    assert not parse_train(["--config", str(path), "--no-allow-pipe"]).config.data.allow_pipe


def test_an_evaluation_names_the_prompts_and_captions_of_training_that_it_does_not_repeat():
    recorded = parse_train(
        shlex.split(
            "--train-data a --caption-key 'concept;name' --caption-key-probs 0.5 0.5 --val-data b "
            "--val-templates {c}"
        )
    ).config
    said = unrepeated(Eval(), recorded)
    assert said.startswith(
        "training evaluated with --caption-key 'concept;name' --caption-key-probs 0.5 0.5 "
        "--val-templates '{c}', and this evaluation does not"
    )
    for captions in ({"caption_key": "name"}, {"caption_keys": "name=1"}):
        said = unrepeated(Eval(reading=captions), recorded)
        assert said.startswith("training evaluated with --val-templates '{c}', and")
        assert unrepeated(Eval(reading=captions, val_templates="a {c}"), recorded) == ""
    assert unrepeated(Eval(), parse_train(["--train-data", "a"]).config) == ""


def test_a_checkpoint_does_not_allow_commands():
    """Evaluation opens the data that a checkpoint records."""
    recorded = RunConfig().data.model_copy(update={"allow_pipe": True, "cache_dir": "kept"})
    assert not recorded_reading(recorded, {}).allow_pipe
    assert recorded_reading(recorded, {"allow_pipe": True}).allow_pipe
    assert recorded_reading(recorded, {"data_format": "csv"}).cache_dir == "kept"
