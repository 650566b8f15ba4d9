"""Results by content and code: a benchmark that was killed goes on where it was, and no figure outlives the code that made it."""

import ast
import functools
import inspect
import json
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from influencespace.data.artifacts import file_digest, fingerprint, write_json

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("influencespace", "benchmarks")  # whose code a digest covers

deadline = float("inf")  # on the monotonic clock; nothing new is begun after it


class OutOfTimeError(RuntimeError):
    """The minutes that were allowed are over; what is measured is written, and marked as incomplete."""


def cached(folder: Path, key: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON result of `make` for this key and for the code that it runs, computed once.

    Raises OutOfTimeError where it is not there and the time is over.
    """
    path = folder / "results" / f"{fingerprint([key, code_digest(*modules_of(make))])}.json"
    if path.is_file():
        outcome: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return outcome
    if time.monotonic() > deadline:
        raise OutOfTimeError
    result = make()
    write_json(path, result)
    return result


def each_seed(
    folder: Path, seeds: Sequence[int], key: list[Any], make: Callable[..., dict[str, Any]], *about: Any
) -> list[dict[str, Any]]:
    """The cached results of `make(*about, seed)` for every seed."""
    return [cached(folder, [*key, seed], functools.partial(make, *about, seed)) for seed in seeds]


def modules_of(work: Callable[..., Any]) -> list[str]:
    """Modules of `PACKAGES` whose code a function runs: its own, and those of the objects that it is bound to or closes over."""
    result: set[str] = set()
    waiting: list[Any] = [work]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, functools.partial):
            waiting += [one.func, *one.args, *one.keywords.values()]
        elif inspect.ismethod(one):
            waiting += [one.__func__, one.__self__]
        elif inspect.isfunction(one):
            result.add(one.__module__)
            waiting += [cell.cell_contents for cell in one.__closure__ or ()]
        else:
            result.add(type(one).__module__)
    return sorted(name for name in result if name.split(".")[0] in PACKAGES)


@functools.cache
def code_digest(*modules: str, root: Path = ROOT) -> str:
    """32 hex digits of the files of these modules and of all that they import, at any depth and place."""
    files: dict[str, Path] = {}
    for module in modules:
        files |= import_closure(module, root)
    return fingerprint({name: file_digest(path) for name, path in files.items()})


def import_closure(module: str, root: Path = ROOT) -> dict[str, Path]:
    """A module and all modules of `PACKAGES` that it imports, also within functions, with their files."""
    result: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file_of(name, root)
        if name not in result and path is not None:
            result[name] = path
            waiting += _imported(name, path, root)
    return result


def _file_of(module: str, root: Path) -> Path | None:
    if module.split(".")[0] not in PACKAGES:
        return None
    base = root.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _imported(module: str, path: Path, root: Path) -> Iterator[str]:
    """Modules that a file names. What `from package import module` runs of the package itself decides no result."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            below = {alias.name for alias in node.names if _file_of(f"{base}.{alias.name}", root)}
            yield from (f"{base}.{name}" for name in sorted(below))
            if any(name not in below and not name.startswith("__") for name in (a.name for a in node.names)):
                yield base
