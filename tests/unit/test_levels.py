"""The plan of docs/architecture.md: a package imports from lower packages only.

The order is that of LEVELS, lowest first; entries of one line do not import each other. INSIDE has
the order within some packages.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "neuclip"

LEVELS = [
    ["errors", "masking", "untrusted"],
    ["files", "first_bytes", "templates", "console", "interrupts"],
    ["run_folder", "parallel"],
    ["method"],
    ["catalogue"],
    ["config"],
    ["data", "checkpoint"],
    ["model", "evaluation"],
    ["embedding"],
    ["report", "export", "search"],
    ["training"],
    ["cli"],
    ["__init__", "__main__"],
]
INSIDE = {
    "parallel": [
        ["launch"],
        ["rendezvous", "heartbeat", "folder_lock"],
        ["process_group"],
        ["collectives"],
        ["work_sharing", "rank_consistency", "fsdp"],
    ],
    "data": [
        ["distinct", "outlines"],
        [
            "samples",
            "order",
            "progress",
            "shard_writer",
            "watchdog",
            "folder_contents",
            "truncation",
            "patterns",
        ],
        ["captions", "decode", "damage"],
        ["endings", "annotations"],
        ["sources"],
        ["remote"],
        ["recognition", "identity"],
        ["opening", "groups", "epoch_description"],
        ["batch"],
        ["reading"],
        ["loader"],
        ["tools", "demo", "icons"],
    ],
    "data.sources": [
        ["source", "tar_headers", "file_tree"],
        ["columns", "delimited", "image_files"],
        [
            "folders",
            "image_list",
            "tables",
            "arrow_columns",
            "mixture",
            "part",
            "tar_samples",
            "synthetic",
        ],
        ["class_folders", "arrow", "json_lines", "tar_index"],
        ["shards"],
    ],
    "data.remote": [
        ["manifest", "transport", "hub"],
        ["fetch"],
        ["cache"],
        ["prefetch"],
        ["remote_shards"],
    ],
    "data.tools": [
        ["duplicates"],
        ["inspection", "pack", "bench"],
        ["inspection_page"],
    ],
    "data.demo": [["fonts"], ["splits"], ["build"]],
    "data.icons": [
        ["npm_packages", "set_names", "outlines"],
        ["rendering", "pair_folder"],
        ["held_out", "picture_set"],
        ["icon_collection"],
        ["icon_sets", "emoji_sets"],
    ],
    "embedding": [
        ["trained_model", "shard_files", "kept_samples"],
        ["mapped_array"],
        ["embedding_store"],
        ["sharded_embedding", "stored_images", "pair_scores", "near_duplicates"],
    ],
    "evaluation": [
        [
            "blend_choice",
            "metrics",
            "metric_names",
            "outcomes",
            "results",
            "ranking",
            "class_draws",
        ],
        ["linear_probe", "nearest_neighbours"],
        ["class_names"],
        ["label_classes"],
        ["split_layouts"],
        ["splits"],
        ["interfaces"],
        ["embed", "gallery", "normalizer_error", "retrieval", "held_out"],
        ["validation_loss", "own_splits"],
        ["zero_shot"],
        ["probe_samples"],
        ["probes"],
        ["split_evaluation", "datacomp"],
        ["evaluate"],
    ],
    "training": [
        [
            "warning_signs",
            "learning_rate",
            "loss_arithmetic",
            "loss_scale",
            "optimizer_kind",
            "parameter_groups",
            "sameness",
            "best_metric",
            "training_data",
        ],
        ["evaluation_plan"],
        ["records", "optim", "oom_advice"],
        ["open_run"],
        ["nonfinite", "device_prefetch"],
        ["teacher", "momentum", "token_supervision"],
        ["components"],
        ["accumulation", "run_state", "evaluating", "finetuning"],
        ["step", "evaluate_only"],
        ["trainer"],
        ["assemble"],
    ],
}

# Doors that published command lines go through: they only call the command line.
ENTRY_POINTS = {"training.main", "evaluation.datacomp.__main__"}

# Who alone may import what.
DOORS = {
    "open_clip": {
        "model.absent",
        "model.architecture",
        "model.clip",
        "model.export_info",
        "model.foreign_weights",
        "model.positions",
        "model.published",
        "model.transformers_siglip",
    },
    "torch.distributed": {"parallel", "checkpoint.sharded"},
    "huggingface_hub": {
        "data.remote.hub",
        "evaluation.datacomp.download",
        "export.push",
        "model.clip",
    },
    "tyro": {"cli"},
    "timm": {
        "model.positions",
        "model.published",
        "model.tower_layers",
        "model.transformers_siglip",
        "training.optimizer_kind",
    },
    "triton": {"method.softmax.fused"},
    "jinja2": {"templates"},
    "rich": {"cli", "console"},
    "faiss": {"search.approximate_search"},
    "matplotlib": {"report.blend_curve", "report.figures", "report.panels", "data.demo.fonts"},
}
TORCH_FREE = [
    "errors",
    "files",
    "first_bytes",
    "console",
    "interrupts",
    "run_folder",
    "catalogue",
    "config",
    "report",
    "cli",
]
LOOSE_MODULES = 10


def modules():
    for path in sorted(SRC.rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), path


MODULES = dict(modules())


def imports(path, top_only=False):
    """Full names of what a file imports; of the package's own modules, the module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                known = full.removeprefix("neuclip.") in MODULES or "torch.distributed" in full
                yield full if known else node.module


def own_imports(path):
    """Names of the package's modules that a file imports, without `neuclip.`."""
    for name in imports(path):
        if name.startswith("neuclip."):  # `neuclip` itself imports nothing
            yield name.removeprefix("neuclip.")


def wrong_ways(levels, prefix=""):
    """Imports that do not go down; a module or package without a level is wrong too."""
    level = {name: number for number, names in enumerate(levels) for name in names}
    assert len(level) == sum(map(len, levels)), "an entry stands twice"
    for module, path in MODULES.items():
        if not module.startswith(prefix) or module == prefix.removesuffix("."):
            continue
        if module in ENTRY_POINTS:
            continue
        own = module.removeprefix(prefix).split(".")[0]
        if own not in level:
            yield f"{module} has no level"
            continue
        for imported in own_imports(path):
            if imported.startswith(prefix) and imported != prefix.removesuffix("."):
                other = imported.removeprefix(prefix).split(".")[0]
                if other != own and level.get(other, -1) >= level[own]:
                    yield f"{module} imports {imported}"


def test_imports_go_down():
    assert not list(wrong_ways(LEVELS))


@pytest.mark.parametrize("package", INSIDE)
def test_imports_go_down_inside(package):
    assert not list(wrong_ways(INSIDE[package], f"{package}."))


def test_every_level_exists():
    here = {part for module in MODULES for part in module.split(".")}
    levels = [*LEVELS, *(level for inside in INSIDE.values() for level in inside)]
    assert {name for level in levels for name in level} <= here


@pytest.mark.parametrize(
    "package", [m for m, path in MODULES.items() if "In reading order:" in path.read_text()]
)
def test_a_list_of_modules_is_complete(package):
    listed = re.findall(
        r"^- `(\w+)`: ", ast.get_docstring(ast.parse(MODULES[package].read_text())), re.M
    )
    inside = [m.removeprefix(f"{package}.") for m in MODULES if m.startswith(f"{package}.")]
    assert sorted(listed) == sorted({name.split(".")[0] for name in inside})


@pytest.mark.parametrize("library", DOORS)
def test_libraries_have_one_door(library):
    for module, path in MODULES.items():
        used = any(name == library or name.startswith(library + ".") for name in imports(path))
        allowed = any(f"{module}.".startswith(f"{door}.") for door in DOORS[library])
        assert not used or allowed, f"{module} imports {library}"


def test_help_needs_no_torch():
    for module, path in MODULES.items():
        if module.split(".")[0] in TORCH_FREE:
            libraries = {name.split(".")[0] for name in imports(path, top_only=True)}
            assert not libraries & {"torch", "torchvision", "open_clip"}, module


def test_few_modules_are_loose():
    assert len(list(SRC.glob("*.py"))) <= LOOSE_MODULES


def edits(one, other):
    """Whether two names are equal but for one letter that was changed, added or left out."""
    if abs(len(one) - len(other)) > 1 or one == other:
        return False
    start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if start is None:
        return True
    return (
        one[start + 1 :] == other[start + 1 :]
        or one[start + 1 :] == other[start:]
        or one[start:] == other[start + 1 :]
    )


def test_a_class_name_has_one_meaning():
    homes = {}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    assert not {name: modules for name, modules in homes.items() if len(modules) > 1}


def test_names_are_told_apart():
    """Modules' names differ by more than one letter, and none is the standard library's."""
    names = {module.split(".")[-1] for module, path in MODULES.items() if path.stem != "__init__"}
    assert not sorted((a, b) for a in names for b in names if a < b and edits(a, b))
    assert not names & set(sys.stdlib_module_names)
