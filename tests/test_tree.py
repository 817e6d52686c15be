"""The shape of the tree. What imports what is held by the contracts in pyproject.toml, which `make lint` checks."""

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


def test_few_modules_lie_outside_a_folder():
    assert len(list((ROOT / "moonlight").glob("*.py"))) <= MAX_ROOT_MODULES


def test_every_package_says_what_it_holds():
    undocumented = [path for path in sources(*PACKAGES) if path.name == "__init__.py" and not path.read_text().strip()]
    assert not undocumented
