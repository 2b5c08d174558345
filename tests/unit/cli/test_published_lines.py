"""Published command lines: what each does, how it selects its method, and what it leaves out."""

import shlex
from itertools import pairwise

import pytest

from command_lines import notes, parse, published_lines, refusal, resolved
from neuclip.catalogue.neuclip_readings import STATEMENTS
from neuclip.catalogue.registry import METHODS
from neuclip.cli.published_flags import SWITCHES, spellings
from neuclip.cli.train import flag_names
from neuclip.config.recipes import read_recipe, recipe_names, recipe_path

LINES = published_lines()
TRAINED = [title for title, one in LINES.items() if one.outcome in METHODS]


@pytest.mark.parametrize("title", LINES)
def test_published_line_has_its_outcome(title):
    outcome, line = LINES[title].outcome, LINES[title].line
    if outcome.startswith("refused"):
        message = refusal(line)
        assert "out of scope" in message
        assert outcome.removeprefix("refused: ") in message
        return
    config, said = parse(line), notes(line)
    if outcome == "evaluates":
        assert config.only_evaluates
        assert not any(note.startswith("method") for note in said)
        return
    assert not config.only_evaluates
    assert config.method.method == outcome
    why = "the default" if outcome == "neuclip_pool" else "selected by --"
    assert said[0].startswith(f"method {outcome}, {why}")
    assert ("--method openclip" in said[0]) == (outcome == "neuclip_pool")


def test_open_clips_lines_are_accepted_but_for_coca_and_audio():
    lines = [one for title, one in published_lines().items() if title.startswith("open_clip")]
    refused = [one.outcome for one in lines if one.outcome.startswith("refused")]
    assert sorted(refused) == ["refused: CoCa"] + ["refused: audio"] * 2
    assert len(lines) == 24


SAME_VALUE = {"amp": "amp_fp16", "amp_bfloat16": "amp_bf16", "4e8": "400000000", "[3]": "3"}


@pytest.mark.parametrize("title", TRAINED)
def test_every_value_of_a_published_line_is_in_the_settings(title):
    line, method = LINES[title].line, LINES[title].outcome
    if method == "fastclip_v3":
        line = line.replace("--gamma 10.0", "--gamma 1.0")
    line = line.replace("--lr_tau 0.0133", "--temperature_lr 0.0133")
    line = line.replace("--gamma 10.0", "--rate_offset 10.0") if method == "scent" else line
    tree, checked = parse(line).model_dump(), 0
    for flag, value in pairwise(_words(line)):
        section, _, key = flag_names().get(flag.replace("_", "-"), "").rpartition(".")
        if (
            not flag.startswith("--")
            or value.startswith("--")
            or key not in tree.get(section, tree)
        ):
            continue
        if flag == "--aug-cfg" or (not section and key not in {"name", "seed"}):
            continue
        found, value = tree[section][key] if section else tree[key], SAME_VALUE.get(value, value)
        assert str(found) == value or float(found) == float(value), flag
        checked += 1
    assert checked > 1


def _words(line):
    """The words of a line, `--flag=value` as two."""
    for word in shlex.split(line):
        yield from word.split("=", 1) if word.startswith("--") else [word]


def test_neuclip_line_shows_every_value():
    config = resolved(LINES["NeuCLIP on DFN-14M using 8 GPUs"].line)
    assert config.method.model_dump() == {
        "name": "neuclip",
        "temperature": 0.07,
        "temperature_min": 0.01,
        "rho": 11.0,
        "epsilon": 1e-6,
        "temperature_gradient": "fastclip",
        "objective_scale": "fastclip",
        "gamma": 0.42,
        "gamma_schedule": "cosine",
        "gamma_decay_epochs": 24.0,
        "num_prototypes": 4096,
        "inner_steps": 10,
        "restart_steps": 500,
        "prototype_lr": 1.0,
        "prototype_optimizer": "adagrad_norm",
        "refresh": "restart",
        "restart_from": "earlier",
        "restart_fill": "pool",
        "restart_optimizer": True,
        "mixing": "gamma",
        "gradient": "detached",
        "log_weights": False,
    }
    assert config.data.train_data == "./datasets/dfn2b/medium/shards/0000{0000..1926}.tar"
    assert (config.data.train_num_samples, config.data.data_size) == (13710637, 19270000)
    assert (config.data.batch_size, config.data.workers, config.seed) == (512, 6, 2026)
    assert (config.optim.lr_tau, config.optim.lr_tau_scheduler) == (6.25e-5, "step_thresh")
    assert (config.optim.lr, config.optim.wd, config.optim.warmup) == (5e-4, 0.2, 500)
    assert (config.optim.beta2, config.optim.eps) == (0.98, 1e-6)  # ViT


@pytest.mark.parametrize(
    ("recipe", "title"),
    [
        ("neuclip-dfn14m", "NeuCLIP on DFN-14M using 8 GPUs"),
        ("fastclip_v0-cc3m", "FastCLIP-v0 on CC3M using 8 GPUs"),
        ("fastclip_v1-cc3m", "FastCLIP-v1 on CC3M using 8 GPUs"),
        ("fastclip_v2-cc3m", "FastCLIP-v2 on CC3M using 8 GPUs"),
        ("fastclip_v3-cc3m", "FastCLIP-v3 on CC3M using 8 GPUs (2 nodes and 4 GPUs per node)"),
        ("fastclip_v3-cc12m", "FastCLIP-v3 on CC12M using 8 GPUs"),
        ("fastclip_v3-laion400m", "FastCLIP-v3 on LAION400M using 16 GPUs"),
        ("fastclip_v3-dfn14m", "FastCLIP on DFN-14M using 4 GPUs"),
        ("scent-dfn14m", "SCENT on DFN-14M using 4 GPUs"),
    ],
)
def test_published_recipe_is_the_published_line(recipe, title):
    assert parse(f"--recipe {recipe}") == parse(LINES[title].line)


def test_recipe_of_openclip_is_the_published_line_with_its_method():
    line = LINES["OpenCLIP on CC3M using 8 GPUs"].line
    assert parse("--recipe openclip-cc3m") == parse(f"--method openclip {line}")


def test_recipe_of_amorlip_is_the_published_line():
    recipe, line = (
        parse("--recipe amorlip-cc12m"),
        parse(LINES["AmorLIP on CC12M using 1 GPU"].line),
    )
    assert resolved("--recipe amorlip-cc12m").method == recipe.method == line.method
    own = {"epsilon", "beta1", "beta2", "eps"}
    assert recipe.optim.model_dump(exclude=own) == line.optim.model_dump(exclude=own)
    assert line.evaluation.eval_data_dir == "$DATACOMP_DATA"
    assert "flickr" in str(line.evaluation.eval_tasks)


@pytest.mark.parametrize(
    ("line", "scale", "first"),
    [
        ("--fastclip --multiply_tau --nu_update scent", "drrho", 1.0),
        ("--fastclip --multiply_tau --nu_update scent --first-rate-offset none", "drrho", None),
        ("--fastclip --multiply_tau --nu_update sox", "drrho", ...),
        ("--fastclip --multiply_tau", "fastclip", ...),
        ("--fastclip --multiply_tau --nu_update sox --objective-scale fastclip", "fastclip", ...),
        ("--method scent", "fastclip", None),
        ("--npn", "fastclip", ...),
    ],
)
def test_lines_of_drrho_code_get_its_scale(line, scale, first):
    method = parse(line).method
    assert method.objective_scale == scale
    assert getattr(method, "first_rate_offset", ...) == first


@pytest.mark.parametrize("reading", [each for each in STATEMENTS if each.settled_by])
def test_a_reading_is_marked_in_the_recipe_and_has_a_switch(reading):
    key, _, value = reading.setting.partition(": ")
    assert f"  {reading.setting}  # reading\n" in recipe_path("neuclip-dfn14m").read_text()
    ours = getattr(parse("--npn").method, key)
    assert str(ours).lower() == value
    assert getattr(parse(f"--npn {reading.other}").method, key) != ours


@pytest.mark.parametrize("recipe", recipe_names())
def test_recipes_cite_a_source_and_hold(recipe):
    assert "# Source: " in recipe_path(recipe).read_text()
    # Rules that derive settings from the weights and the data need both.
    needs = "--train-data a --pretrained b" if "derive" in read_recipe(recipe_path(recipe)) else ""
    config = parse(f"--recipe {recipe} {needs}")
    assert config.name or config.derive


# Selecting the method


@pytest.mark.parametrize("method", spellings())
def test_published_switches_select_their_method(method):
    switches = {k: v for k, v in {**SWITCHES, **spellings()[method]}.items() if v is not False}
    line = " ".join(f"--{k}" if v is True else f"--{k} {v}" for k, v in switches.items())
    assert parse(line).method.name == method


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--dataset-type csv",
        "--dataset-type webdataset",
        "--local-loss",
        "--local-loss --gather-with-grad",
        "--dataset-type synthetic --train-num-samples 100",
        "--dataset-resampled --ddp-static-graph --save-most-recent",
        "--precision amp --report-to wandb,tensorboard --wandb-project-name x",
        "--csv-img-key a --csv-caption-key b --csv-separator ,",
        "--aug-cfg scale='(0.4, 1.0)'",
    ],
)
def test_flags_about_data_and_processes_select_no_method(flags):
    assert parse(flags).method.method == "neuclip_pool"
    assert "method neuclip_pool, the default" in notes(flags)[0]
    assert "--method openclip" in notes(flags)[0]


def test_flags_about_data_leave_the_method_of_the_line_and_of_the_recipe():
    flags = "--dataset-type csv --local-loss --gather-with-grad"
    assert parse(f"--method siglip {flags}").method.method == "siglip"
    assert parse(f"--recipe openclip-cc3m {flags}").method.method == "openclip"


@pytest.mark.parametrize(
    ("line", "method", "gradient"),
    [
        ("", "neuclip_pool", "exact"),
        ("--method neuclip_pool", "neuclip_pool", "exact"),
        ("--method neuclip", "neuclip", "fastclip"),
        ("--npn", "neuclip", "fastclip"),
        ("--npn --temperature_gradient exact", "neuclip", "exact"),
        ("--fastclip --multiply_tau", "fastclip_v3", "fastclip"),
        ("--method fastclip_v3", "fastclip_v3", "exact"),
        ("--method neuclip --fastclip --npn", "neuclip", "fastclip"),
        ("--method rgcl_batch --gather-with-grad", "rgcl_batch", "exact"),
        ("--recipe neuclip-dfn14m --local-loss", "neuclip", "fastclip"),
        ("--recipe demo-neuclip --npn", "neuclip", "exact"),
        ("--recipe demo-neuclip_pool --npn", "neuclip", "fastclip"),
        ("--recipe openclip-cc3m --npn", "neuclip", "fastclip"),
        ("--recipe neuclip-dfn14m --method rgcl_batch", "rgcl_batch", "exact"),
    ],
)
def test_method_and_temperature_gradient(line, method, gradient):
    config = parse(line)
    assert (config.method.name, config.method.temperature_gradient) == (method, gradient)


PUBLISHED_NETWORK = {
    "num_prototypes": 4096,
    "refresh": "restart",
    "inner_steps": 10,
    "gradient": "detached",
    "gamma": 0.3368,  # by the rule
}


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("--npn", {}),
        ("--method neuclip", {}),
        ("--method neuclip --fastclip --npn", {}),
        ("--npn --npn_num_protos 8", {"num_prototypes": 8}),
        ("--npn --refresh rolling --gradient full", {"refresh": "rolling", "gradient": "full"}),
        ("--recipe neuclip-paper", {}),
        ("--recipe neuclip-dfn14m", {"gamma": 0.42}),
        ("--npn --gamma 0.5", {"gamma": 0.5}),
    ],
)
def test_published_spelling_has_the_published_network(line, changes):
    settings = resolved(f"{line} --epochs 32").method.model_dump()
    assert {key: settings[key] for key in PUBLISHED_NETWORK} == {**PUBLISHED_NETWORK, **changes}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--npn --temperature_scheme individual", "contradict each other; neuclip is selected by"),
        ("--npn --temperature_scheme individual_learnable", "contradict each other"),
        ("--fastclip --npn --temperature_scheme global_constant", "contradict each other"),
        ("--npn --nu_update scent", "contradict each other"),
        ("--method openclip --npn", "--npn contradicts --method openclip"),
        ("--method rgcl_batch --fastclip", "--fastclip contradicts --method rgcl_batch"),
        ("--method neuclip --siglip", "--siglip contradicts --method neuclip"),
        ("--multiply_tau", "--multiply-tau selects no method; these do"),
        ("--temperature_scheme global_learnable", "openclip among them: --method NAME"),
        ("--scale_loss", "amorlip: --scale-loss --calculate-full --learn-logit-scale"),
    ],
)
def test_switches_that_select_nothing_are_refused(line, message):
    assert message in refusal(line)


# What a line leaves out

FASTCLIP = "--fastclip --multiply_tau"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (FASTCLIP, {"rho": 8.0, "gamma": 0.8, "gamma_decay_epochs": 10.0, "epsilon": 1e-14}),
        (f"{FASTCLIP} --rho 3", {"rho": 3.0, "gamma": 0.8}),
        ("--fastclip", {"gamma": 0.8, "gamma_decay_epochs": 10.0}),
        (
            "--fastclip --temperature_scheme individual_learnable --lr 1e-3",
            {"rho": 8.0, "temperature": 0.07, "temperature_lr": 1e-3},
        ),
        (
            "--fastclip --temperature_scheme individual_learnable --lr_tau 0.01",
            {"temperature_lr": 0.01},
        ),
        (f"{FASTCLIP} --nu_update scent", {"rho": 8.0, "rate_offset": 0.8, "epsilon": 1e-14}),
        (
            "--scale_loss --calculate_full --learn_logit_scale --grad-clip-norm 0.5",
            {
                "positive_weight": 1.0,
                "fit_previous": False,
                "previous_epochs": 15.0,
                "ema_rate": 0.9997,
                "ema_steps": 1,
                "restart_epochs": 0,
                "lambda_clip_norm": 0.5,
            },
        ),
    ],
)
def test_settings_left_out_of_a_published_line_are_the_trainers(line, expected):
    config = parse(line)
    settings = config.method.model_dump()
    assert {key: settings[key] for key in expected} == expected
    assert (config.model.name, config.output.log_every_n_steps) == ("RN50", 100)
    assert (resolved(line).optim.beta2, resolved(line).optim.eps) == (0.999, 1e-8)
    said = [note for note in notes(line) if "for what the line leaves out" in note]
    assert len(said) == 1
    assert "model RN50" in said[0]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (FASTCLIP, (10_000, None, "same")),
        (f"{FASTCLIP} --lr-scheduler const --warmup 100", (0, 5e-4, "cosine")),
        (f"{FASTCLIP} --lr_tau 1e-4 --lr_min 1e-5", (10_000, 1e-4, "cosine")),
        (f"{FASTCLIP} --lr 1e-3 --lr_tau_scheduler step_thresh", (10_000, 1e-3, "step_thresh")),
        ("--fastclip --temperature_scheme global_constant --lr_tau_scheduler const",
         (10_000, None, "const")),
        ("--scale_loss --calculate_full --learn_logit_scale", (10_000, None, "same")),
        (
            "--scale_loss --calculate_full --learn_logit_scale --lr_tau 1e-4",
            (10_000, 1e-4, "step_thresh"),
        ),
    ],
)  # fmt: skip
def test_rates_left_out_of_a_published_line_are_the_trainers(line, expected):
    optim = parse(line).optim
    assert (optim.warmup, optim.lr_tau, optim.lr_tau_scheduler) == expected


@pytest.mark.parametrize("line", ["--method fastclip_v3", "--recipe fastclip_v3-cc12m", "--npn"])
def test_other_lines_keep_our_defaults(line):
    assert parse(line).model.name == "ViT-B-32"
    assert not any("leaves out: rho" in note for note in notes(line))


def test_files_come_before_the_trainers_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {name: ViT-S-16}\noutput: {log_every_n_steps: 7}\n")
    config = parse(f"{FASTCLIP} --config {tmp_path / 'a.yaml'}")
    assert (config.model.name, config.output.log_every_n_steps) == ("ViT-S-16", 7)


def test_rho_list_is_two_values_of_rho():
    amorlip = "--scale_loss --calculate_full --learn_logit_scale"
    settings = parse(f"{amorlip} --epochs 34 --rho_list '[1 2 2]'").method.model_dump()
    assert (settings["rho"], settings["late_rho"], settings["late_rho_epoch"]) == (1, 2, 11)
    settings = parse(f"{amorlip} --rho_list 4").method.model_dump()
    assert (settings["rho"], settings["late_rho"]) == (4, 4)
    assert "changes at most once" in refusal(f"{amorlip} --rho_list '[1 2 3]'")


def test_fastclip_line_with_a_rate_above_one():
    """`--gamma 10.0 --nu_update sox`, as published for DFN-14M: no moving average has that rate."""
    line = LINES["FastCLIP on DFN-14M using 4 GPUs"].line
    assert parse(line).method.model_dump()["gamma"] == 1.0
    assert any("--gamma 10 is above 1" in note for note in notes(line))


def test_individual_temperatures_take_lr_tau():
    config = parse(LINES["FastCLIP-v2 on CC3M using 8 GPUs"].line)
    assert config.method.model_dump()["temperature_lr"] == 0.0133
    assert config.optim.lr_tau is None


def test_the_line_of_scent_sets_its_offset():
    settings = parse(LINES["SCENT on DFN-14M using 4 GPUs"].line).method.model_dump()
    assert settings["rate_offset"] == 10.0
    assert not {"gamma", "gamma_schedule", "gamma_decay_epochs"} & settings.keys()
