"""Layout of the repository. `make lint` checks the imports against the contracts in pyproject.toml."""

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("moonlight", "pretrain", "checkpoints", "eval", "examples")
MAX_LINES = 400
MAX_ROOT_MODULES = 8


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_file_is_long():
    long = {
        str(path.relative_to(ROOT)): count
        for path in sources(*PACKAGES, "tests")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long


def test_few_modules_are_outside_a_folder():
    assert len(list((ROOT / "moonlight").glob("*.py"))) <= MAX_ROOT_MODULES


def test_every_package_has_a_docstring():
    undocumented = [path for path in sources(*PACKAGES) if path.name == "__init__.py" and not path.read_text().strip()]
    assert not undocumented


def test_no_public_class_name_is_defined_twice():
    names = Counter(
        node.name
        for path in sources("moonlight", "pretrain", "checkpoints", "eval")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not [name for name, count in names.items() if count > 1]


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 12_000


def test_links_outside_the_site_point_to_files():
    """Links in top-level pages point to existing files. mkdocs checks the links in docs/."""
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
        assert not [link for link in links if "://" not in link and not (ROOT / link).exists()], page
