"""The house of docs/architecture.md: a module imports only from lower levels, never sideways."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"

# Lowest first. A package stands for its modules, which may import each other unless they are
# listed on their own; modules of one level do not import each other.
LEVELS = [
    ["errors"],
    ["launch"],
    ["heartbeat", "meeting"],
    ["group"],
    ["settings"],
    ["methods", "sections"],
    ["config", "distributed", "method.schedule"],
    ["method.interfaces", "sharing", "batches"],
    ["method.objective", "method.blocks", "method.sample_table", "method.inputs", "sharding"],
    ["method.fused"],
    ["method.normalizers", "method.temperature", "method.log_inner"],
    ["method.losses"],
    ["method.factory"],
    ["data", "flag_table", "published", "evaluation.suite", "training.checkpoint_files"],
    ["training.sharded_checkpoint"],
    [
        "training.model",
        "training.towers",
        "training.optim",
        "training.agreement",
        "training.ema",
        "training.memory",
        "training.randomness",
        "training.checkpoint",
        "training.memory",
        "training.fingerprint",
        "training.timing",
        "training.tracking",
        "training.feed",
        "training.verdict",
        "evaluation",
    ],
    ["training.run_folder", "training.saver"],
    [
        "training.accumulation",
        "training.parts",
        "training.recorder",
        "training.restore",
        "training.pretrained",
        "training.watch",
    ],
    ["training.judging", "training.step", "training.starting_weights"],
    ["training.trainer", "training.judge_only"],
    ["training.assemble"],
    ["flags", "report", "terminal", "export", "search"],
    ["checkpoint_cli", "data_cli"],
    ["eval_cli", "export_cli", "report_cli"],
    ["search_cli"],
    ["cli"],
    ["training.main", "__main__", "evaluation.datacomp"],
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}

# Who alone may import what.
KEPT = {
    "open_clip": {"training.model"},
    "torch.distributed": {
        "distributed",
        "group",
        "meeting",
        "sharding",
        "training.sharded_checkpoint",
    },
    "tyro": {
        "checkpoint_cli",
        "cli",
        "data_cli",
        "eval_cli",
        "export_cli",
        "report_cli",
        "search_cli",
        "flags",
        "flag_table",
        "published",
    },
    "triton": {"method.fused"},
    "rich": {"terminal", "training.tracking", "cli"},
    "matplotlib": {"report.figures", "report.panels", "data.faces"},
}
TORCH_FREE = {
    "errors",
    "settings",
    "methods",
    "config",
    "sections",
    "batches",
    "launch",
    "heartbeat",
    "flag_table",
    "published",
    "flags",
    "checkpoint_cli",
    "cli",
    "data_cli",
    "eval_cli",
    "export_cli",
    "report_cli",
    "search_cli",
    "evaluation.suite",
}


def modules():
    for path in sorted(SRC.rglob("*.py")):
        name = ".".join(path.relative_to(SRC / "neuclip").with_suffix("").parts)
        yield name.removesuffix(".__init__").removesuffix("__init__"), path


MODULES = dict(modules())


def room(module):
    """The entry of LEVELS a module belongs to."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in LEVEL:
            return name
    return None


def imports(path, top_only=False):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                own = full.removeprefix("neuclip.")
                yield (
                    full if own in MODULES or full.startswith("torch.distributed") else node.module
                )


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_go_down(module):
    own = room(module)
    if own is None:
        assert MODULES[module].name == "__init__.py", f"{module} has no level"
        return
    for imported in imports(MODULES[module]):
        if not imported.startswith("neuclip."):
            continue
        other = room(imported.removeprefix("neuclip."))
        if other is None or other == own:
            continue
        assert LEVEL[other] < LEVEL[own], f"{module} (level of {own}) imports {imported}"


@pytest.mark.parametrize("package", KEPT)
def test_libraries_have_one_door(package):
    for module, path in MODULES.items():
        used = any(name == package or name.startswith(package + ".") for name in imports(path))
        assert not used or module in KEPT[package], f"{module} imports {package}"


@pytest.mark.parametrize("module", sorted(TORCH_FREE))
def test_help_needs_no_torch(module):
    names = list(imports(MODULES[module], top_only=True))
    assert not any(name.split(".")[0] in {"torch", "torchvision"} for name in names)
