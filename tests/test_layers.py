"""Imports go downwards only, and what is below the stages neither imports Ray nor needs it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import influencespace

ROOT = Path(influencespace.__file__).parent
BELOW_STAGES = ("core", "models", "estimators", "data", "errors")
STAGES = {*BELOW_STAGES, "stages"}
# What each module or folder of the package may import of it. A new one names its floor here.
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "core": {"errors"},
    "models": {"errors", "core"},
    "estimators": {"errors", "core", "models"},
    "data": {"errors", "core"},
    "stages": set(BELOW_STAGES),
    "config": STAGES,
    "report": {*STAGES, "config"},
    "pipeline": {*STAGES, "config", "report"},
    "sweep": {*STAGES, "config", "report", "pipeline"},
    "plan": {*STAGES, "config", "report", "pipeline"},
    "tasks": {*STAGES, "config", "report", "pipeline"},
    "demo": {*STAGES, "config", "report", "pipeline"},
    "cli": {*STAGES, "config", "report", "pipeline", "sweep", "plan", "demo", "tasks"},
    "__main__": {"cli"},
}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def floor(module: Path) -> str:
    """The module or folder of the package that a file belongs to."""
    return module.parts[0].removesuffix(".py")


def imported(module: Path) -> Iterator[str]:
    """Full names of what a module imports, wherever in it, whatever the way."""
    package = ["influencespace", *module.parent.parts]
    for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            # `from influencespace import x` may mean a module
            yield from (f"{name}.{alias.name}" for alias in node.names)


def own_imports(module: Path) -> set[str]:
    """The floors of the package that a module imports, its own left out."""
    names = {name.split(".")[1] for name in imported(module) if name.startswith("influencespace.")}
    return names - {floor(module), "__version__"}


def test_the_modules_are_found() -> None:
    assert len(MODULES) > 50
    assert {floor(module) for module in MODULES} >= {"core", "models", "estimators", "data", "stages"}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_downwards(module: Path) -> None:
    assert own_imports(module) <= ALLOWED[floor(module)]


def test_no_two_floors_import_each_other() -> None:
    """The table itself has an order: every floor can be laid on those that it stands on."""
    laid: set[str] = set()
    while len(laid) < len(ALLOWED):
        ready = {name for name, below in ALLOWED.items() if below <= laid} - laid
        assert ready, f"a circle among {sorted(set(ALLOWED) - laid)}"
        laid |= ready


@pytest.mark.parametrize("module", [m for m in MODULES if floor(m) in BELOW_STAGES], ids=str)
def test_ray_is_not_imported_below_the_stages(module: Path) -> None:
    assert not [name for name in imported(module) if name.split(".")[0] == "ray"]


def test_the_core_knows_no_files_and_no_models() -> None:
    foreign = {"pyarrow", "pandas", "transformers", "fsspec", "PIL", "safetensors", "os", "pathlib", "json"}
    for module in MODULES:
        if floor(module) == "core":
            assert not {name.split(".")[0] for name in imported(module)} & foreign


WITHOUT_RAY = """
import importlib, pkgutil, sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name == "ray" or name.startswith("ray."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoRay())
for layer in sys.argv[1:]:
    root = importlib.import_module(f"influencespace.{layer}")
    for found in pkgutil.walk_packages(getattr(root, "__path__", []), f"{root.__name__}."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
loaded = [name for name in sys.modules if name.startswith("influencespace.")]
assert not [name for name in loaded if name.split(".")[1] not in sys.argv[1:]], loaded
print(len(loaded))
"""


def test_what_is_below_the_stages_imports_without_ray() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, *BELOW_STAGES], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    below = [m for m in MODULES if floor(m) in BELOW_STAGES and m.name != "__main__.py"]
    assert int(done.stdout) == len(below)
