"""Imports go downwards only, Ray is imported in its rooms alone, and what is below them does without it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import influencespace

ROOT = Path(influencespace.__file__).parent
STAGES = {"errors", "core", "models", "estimators", "data", "engine", "run", "stages"}
PIPELINE = {*STAGES, "config", "report", "pipeline"}
# What each module or folder of the package may import of it. A new one names its layer here.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "core": {"errors"},
    "models": {"errors", "core"},
    "estimators": {"errors", "core", "models"},
    "data": {"errors", "core"},
    "engine": {"errors"},
    "run": {"errors", "data", "engine"},
    "stages": STAGES - {"stages"},
    "config": STAGES,
    "report": {*STAGES, "config"},
    "pipeline": {*STAGES, "config", "report"},
    "planning": PIPELINE,
    "sweep": PIPELINE,
    "tasks": PIPELINE,
    "demo": PIPELINE,
    "api": {*PIPELINE, "planning"},
    "cli": {*PIPELINE, "planning", "sweep", "tasks", "demo", "api"},
    "__init__": {*PIPELINE, "planning", "api"},
    "__main__": {"cli"},
}
RAY = ("engine/", "sweep.py", "stages/training/")
"""Where Ray may be imported, at the top of a module or within a function."""
WITHOUT_RAY = (
    "core",
    "models",
    "estimators",
    "data",
    "run",
    "stages",
    "config",
    "report",
    "pipeline",
    "planning",
)
"""What is imported where there is no Ray; below it what is here of the engine."""
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def layer(module: Path) -> str:
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
    """The layers of the package that a module imports, its own left out."""
    names = {name.split(".")[1] for name in imported(module) if name.startswith("influencespace.")}
    return names - {layer(module), "__version__"}


def test_the_modules_are_found() -> None:
    assert len(MODULES) > 100
    assert {layer(module) for module in MODULES} <= ALLOWED.keys()


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_downwards(module: Path) -> None:
    assert own_imports(module) <= ALLOWED[layer(module)]


def test_no_two_layers_import_each_other() -> None:
    """The table itself has an order: every layer can be laid on those that it stands on."""
    laid: set[str] = set()
    while len(laid) < len(ALLOWED):
        ready = {name for name, below in ALLOWED.items() if below <= laid} - laid
        assert ready, f"a circle among {sorted(set(ALLOWED) - laid)}"
        laid |= ready


def test_ray_is_imported_in_its_rooms_alone() -> None:
    users = {str(m) for m in MODULES if any(name.split(".")[0] == "ray" for name in imported(m))}
    assert users
    assert not [module for module in users if not module.startswith(RAY)]


def test_the_core_knows_no_files_and_no_models() -> None:
    foreign = {"pyarrow", "pandas", "transformers", "fsspec", "PIL", "safetensors", "os", "pathlib", "json"}
    for module in MODULES:
        if layer(module) == "core":
            assert not {name.split(".")[0] for name in imported(module)} & foreign


IMPORT_ALL = """
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
assert not [name for name in loaded if name.split(".")[1] not in (*sys.argv[1:], "errors", "engine")], loaded
print(len([name for name in loaded if name.split(".")[1] in sys.argv[1:]]))
"""


def test_what_needs_no_ray_imports_without_it() -> None:
    command = [sys.executable, "-c", IMPORT_ALL, *WITHOUT_RAY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    modules = [m for m in MODULES if layer(m) in WITHOUT_RAY and m.name != "__main__.py"]
    assert int(done.stdout) == len(modules)
