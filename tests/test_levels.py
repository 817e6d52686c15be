"""The shape of the tree: imports go downwards only, few files know Megatron, no file is long."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("moonlight", "pretrain", "checkpoints", "eval", "examples")
MAX_LINES = 400

LEVELS = (
    ("moonlight.cli", "moonlight.cli_bench", "moonlight.cli_chat", "moonlight.cli_eval", "examples"),
    (
        "moonlight.quickstart",
        "moonlight.quickstart_chat",
        "moonlight.bench",
        "moonlight.report",
        "moonlight.ablations",
        "moonlight.scaling",
    ),
    ("pretrain", "checkpoints", "eval"),
    ("moonlight.plan.command", "moonlight.plan.compare"),
    ("moonlight.train", "moonlight.dry_run"),
    ("moonlight.model", "moonlight.data", "moonlight.optim", "moonlight.parallel", "moonlight.cpu"),
    ("moonlight.kernels",),
    (
        "moonlight.config",
        "moonlight.config_checks",
        "moonlight.config_data",
        "moonlight.config_io",
        "moonlight.config_model",
        "moonlight.config_monitor",
        "moonlight.config_optim",
        "moonlight.config_stages",
        "moonlight.direct",
        "moonlight.flops",
        "moonlight.hardware",
        "moonlight.mapping",
        "moonlight.pipeline",
        "moonlight.plan",
        "moonlight.tiles",
        "moonlight.timeline",
        "moonlight.optim.groups",
        "moonlight.optim.partition",
        "moonlight.optim.placement",
        "moonlight.optim.routing",
        "moonlight.optim.shares",
        "moonlight.files",
        "moonlight.progress",
        "moonlight.errors",
    ),
)
"""From the top; a module belongs to the longest name that begins its own. The lowest level knows no torch."""

STRANGERS = LEVELS[2]
"""Packages of one level that must not import each other."""

KNOW_MEGATRON = {
    "moonlight/cpu.py",
    "moonlight/dry_run.py",
    "moonlight/parallel.py",
    "moonlight/bench/checkpoint.py",
    "moonlight/bench/loader.py",
    "moonlight/bench/monitors.py",
    "moonlight/data/loader.py",
    "moonlight/data/prepare.py",
    "moonlight/model/build.py",
    "moonlight/model/experts.py",
    "moonlight/model/language_model.py",
    "moonlight/model/latent_attention.py",
    "moonlight/model/mlp.py",
    "moonlight/model/shards.py",
    "moonlight/optim/data_parallel.py",
    "moonlight/optim/parameters.py",
    "moonlight/optim/sharded.py",
    "moonlight/train/step.py",
    "moonlight/train/validate.py",
}


def sources():
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def level(module):
    """Depth of a module, 0 at the top, and the entry that decided it."""
    matches = [
        (len(name), depth, name)
        for depth, names in enumerate(LEVELS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert matches, f"{module} belongs to no level"
    _, depth, name = max(matches)
    return depth, name


def imports(path):
    """Every module that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_go_downwards():
    modules = {module_name(path) for path in sources()}
    wrong = []
    for path in sources():
        module = module_name(path)
        if module in PACKAGES and module == "moonlight":
            continue
        depth, own = level(module)
        for target in imports(path) & modules - {"moonlight"}:
            target_depth, other = level(target)
            if target_depth < depth or (own in STRANGERS and other in STRANGERS and own != other):
                wrong.append(f"{module} imports {target}")
    assert not wrong


def test_the_lowest_level_knows_no_torch():
    for path in sources():
        module = module_name(path)
        if module != "moonlight" and level(module)[0] == len(LEVELS) - 1:
            assert not {name for name in imports(path) if name.split(".")[0] in ("torch", "megatron")}, path


def test_megatron_is_known_to_few_files():
    knowing = {
        str(path.relative_to(ROOT))
        for path in sources()
        if any(name.split(".")[0] == "megatron" for name in imports(path))
    }
    assert knowing == KNOW_MEGATRON


def test_no_file_is_long():
    long = {
        str(path): count
        for path in [*sources(), *(ROOT / "tests").rglob("*.py")]
        if (count := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long


def test_the_map_in_the_readme_names_every_file():
    readme = (ROOT / "README.md").read_text()
    missing = [
        str(path.relative_to(ROOT))
        for path in sources()
        if path.name != "__init__.py" and f"`{path.relative_to(ROOT)}`" not in readme
    ]
    assert not missing
