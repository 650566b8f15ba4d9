"""The key of a cached result covers all the code that made it."""

import functools
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cache
from benchmarks.cache import OutOfTimeError, cached, code_digest, each_seed, import_closure, modules_of
from benchmarks.run import NAMES

FILES = {
    "influencespace/__init__.py": "from influencespace.far import everything\n__version__ = '1'\n",
    "influencespace/core/__init__.py": "",
    "influencespace/core/leaf.py": "x = 1\n",
    "influencespace/core/lazy.py": "import numpy\n",
    "influencespace/middle.py": "from influencespace.core import leaf\ndef f():\n    from .core.lazy import y\n",
    "influencespace/far.py": "everything = 1\n",
    "influencespace/own/__init__.py": "z = 1\n",
    "benchmarks/part.py": "import numpy\nfrom influencespace import middle, __version__\nimport influencespace.own\n",
}
CLOSURE = {"benchmarks.part", "influencespace.middle", "influencespace.own"}
CLOSURE |= {"influencespace.core.leaf", "influencespace.core.lazy"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_closure_follows_imports_of_every_kind(root: Path) -> None:
    assert set(import_closure("benchmarks.part", root)) == CLOSURE


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_of_the_closure_and_no_other_changes_the_key(root: Path, name: str) -> None:
    before = code_digest("benchmarks.part", root=root)
    code_digest.cache_clear()
    (root / name).write_text(FILES[name] + "# changed\n")
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert (code_digest("benchmarks.part", root=root) != before) == (module in CLOSURE)


def test_the_closure_of_curation_has_what_a_list_by_hand_had_forgotten() -> None:
    closure = import_closure("benchmarks.curation.quality")
    assert {"influencespace.core.histogram", "influencespace.models.fusion"} <= set(closure)
    assert "benchmarks.data.shuffle" in closure


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_a_key(name: str) -> None:
    assert len(code_digest(f"benchmarks.{name.replace('/', '.')}")) == 32


def test_a_result_is_made_once_for_its_key_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def make(*about: Any) -> dict[str, Any]:
        calls.append(about)
        return {"value": len(calls)}

    assert cached(tmp_path, "a", make) == cached(tmp_path, "a", make) == {"value": 1}
    assert cached(tmp_path, "b", make) == {"value": 2}
    monkeypatch.setattr(cache, "code_digest", lambda *modules: "other code")
    assert cached(tmp_path, "a", make) == {"value": 3}
    assert [run["value"] for run in each_seed(tmp_path, (0, 1), ["c"], make, "about")] == [4, 5]
    assert calls[-2:] == [("about", 0), ("about", 1)]


def test_nothing_new_is_begun_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(tmp_path, "a", dict)
    monkeypatch.setattr(cache, "deadline", time.monotonic() - 1)
    assert cached(tmp_path, "a", lambda: {"never": 1}) == {}
    with pytest.raises(OutOfTimeError):
        cached(tmp_path, "b", dict)


class Base:
    def work(self) -> dict[str, Any]:
        return self.later()

    def later(self) -> dict[str, Any]:
        return cached(Path(), "key", lambda: self.work())


class Derived(Base): ...


Base.__module__, Derived.__module__ = "benchmarks.base", "benchmarks.derived"


def test_the_code_is_that_of_what_runs_and_of_whose_it_is() -> None:
    work: Any = functools.partial(functools.partial(import_closure), Derived(), root=Path())
    assert modules_of(work) == ["benchmarks.cache", "benchmarks.derived"]
    assert modules_of(Derived().work) == ["benchmarks.derived"]


def test_what_a_function_closes_over_is_its_code_too(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[Any] = []
    monkeypatch.setattr(cache, "code_digest", lambda *modules: keys.append(modules))
    monkeypatch.setattr(cache, "deadline", 0.0)
    with pytest.raises(OutOfTimeError):
        Derived().later()
    assert keys == [("benchmarks.derived",)]
