"""The rules of the house that can be counted."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for room in ("nlscale", "kernels", "launch") for p in (ROOT / room).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_a_room_and_a_function_a_screen(path: Path) -> None:
    kernel = path.name in ("triton.py", "triton_backward.py")
    assert len(path.read_text().splitlines()) <= (600 if kernel else 300)
    long = [f.name for f in functions(path) if (f.end_lineno or 0) - f.lineno >= (150 if kernel else 60)]
    assert not long


def test_there_is_no_global_state() -> None:
    assert not [
        path for path in SOURCES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Global)
    ]


def test_every_test_asserts() -> None:
    assert len(TESTS) > 8
    empty = [
        f"{path.name}::{function.name}"
        for path in TESTS
        for function in functions(path)
        if function.name.startswith("test_") and not any(map(checks, ast.walk(function)))
    ]
    assert not empty


def test_all_tests_can_be_collected_at_once() -> None:
    """`make matrices` and `make faults` collect every folder: where no folder is a package, names must differ."""
    names = [path.name for path in TESTS if not (path.parent / "__init__.py").exists()]
    assert not {name for name in names if names.count(name) > 1}


def checks(node: ast.AST) -> bool:
    called = node.func if isinstance(node, ast.Call) else None
    name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
    return isinstance(node, ast.Assert) or name in {"raises", "assert_close"}
