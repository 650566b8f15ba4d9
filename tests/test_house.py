"""The house stays small: no file, function or list of arguments that cannot be read at one look."""

import ast
from collections.abc import Iterator
from pathlib import Path

import influencespace

ROOT = Path(influencespace.__file__).parent
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_POSITIONAL = 350, 60, 6
FILES = sorted(ROOT.rglob("*.py"))


def functions() -> Iterator[tuple[str, "ast.FunctionDef | ast.AsyncFunctionDef", bool]]:
    """Where it is, each function and whether it is a method."""
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        methods = {
            id(node) for owner in ast.walk(tree) if isinstance(owner, ast.ClassDef) for node in owner.body
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                place = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                yield place, node, id(node) in methods


def test_no_function_takes_many_positional_parameters() -> None:
    counts = {}
    for place, node, is_method in functions():
        static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
        counts[place] = len(node.args.posonlyargs + node.args.args) - (is_method and not static)
    assert len(counts) > 500
    assert {place: count for place, count in counts.items() if count > MAX_POSITIONAL} == {}


def test_no_function_is_long() -> None:
    lengths = {place: (node.end_lineno or 0) - node.lineno + 1 for place, node, _ in functions()}
    assert {place: lines for place, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}


def test_no_file_is_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}
