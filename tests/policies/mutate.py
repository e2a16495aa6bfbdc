"""Mutation testing of the decision code: `make mutants`, or `python tests/policies/mutate.py [--slice K/N] [file …]`.

Each mutant changes one place of one module; the fast decision tests must fail on it. Prints the
survivors and exits with 1 if fewer than 95 % die; a slice (every Nth mutant, from the Kth on) may keep one more, since
few mutants round badly. Mutants live in a temporary copy of the package.
"""

from __future__ import annotations

import argparse
import ast
import copy
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cedarpy  # noqa: F401 - as the next, for the tests: forked processes find it imported
import hypothesis.strategies  # noqa: F401
import pydantic  # noqa: F401
import pytest
import sqlalchemy.orm  # noqa: F401
from tqdm import tqdm

LONGEST_S = 600  # a test run; many times what it takes
TESTS = Path(__file__).parent
SOURCE = TESTS.parents[1] / "policies"
MODULES = [
    "compiled/agreements.py",
    "compiled/compiler.py",
    "decide.py",
    "entitlements.py",
    "incremental.py",
    "snapshot.py",
    "vocabulary.py",
]
KILLERS = [
    "test_decide.py",
    "test_default_deny.py",
    "test_messages.py",
    "test_snapshot.py",
    "test_cache.py",
    "test_oracle.py",
    "test_precedence.py",
    "test_properties.py",
    "test_incremental.py",
    "test_stored_agreements.py",
    "test_required.py",
    "test_agreements.py",
]
COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS = {ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.Sub: ast.BitOr, ast.Add: ast.Sub}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}


def places(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """Every single change: which node, and which of its variants."""
    annotations = {id(node) for note in _annotations(tree) for node in ast.walk(note)}
    for index, node in enumerate(ast.walk(tree)):
        if id(node) in annotations:
            continue
        for variant in range(_variants(node)):
            yield index, variant


def mutant(tree: ast.Module, index: int, variant: int) -> tuple[int, str, ast.Module]:
    """Line, what was done, and the changed tree."""
    changed = copy.deepcopy(tree)
    target = next(n for i, n in enumerate(ast.walk(changed)) if i == index)
    before = ast.unparse(target).splitlines()[0]
    _change(target, variant)
    return getattr(target, "lineno", 0), f"{before} -> {ast.unparse(target)}", changed


def _annotations(tree: ast.Module) -> Iterator[ast.expr]:
    """Annotations, decorators and declarations of fields: they decide no request."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "field":
            yield node
        yield from getattr(node, "decorator_list", ())
        for note in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if note is not None:
                yield note


def _variants(node: ast.AST) -> int:
    """In how many ways `_change` can change the node."""
    match node:
        case ast.Compare():
            return sum(type(op) in COMPARISONS for op in node.ops)
        case ast.BoolOp():
            return 1
        case ast.BinOp() | ast.AugAssign():
            return int(type(node.op) in OPERATORS)
        case ast.Call(func=ast.Name(id=name)):
            return int(name in CALLS)
        case ast.If() | ast.IfExp():
            return 2
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            return 1
        case ast.Continue():
            return 1
        case ast.Constant(value=bool() | int() | float()):
            return 1
    return 0


def _change(node: ast.AST, variant: int) -> None:
    match node:
        case ast.Compare():
            node.ops[variant] = COMPARISONS[type(node.ops[variant])]()
        case ast.BoolOp():
            node.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        case ast.BinOp() | ast.AugAssign():
            node.op = OPERATORS[type(node.op)]()
        case ast.Call(func=ast.Name() as function):
            function.id = CALLS[function.id]
        case ast.If() | ast.IfExp():
            node.test = ast.Constant(value=bool(variant))
        case ast.UnaryOp():
            node.op = ast.UAdd() if isinstance(node.op, ast.USub) else ast.Invert()
            if isinstance(node.op, ast.Invert):
                node.op, node.operand = ast.Not(), ast.UnaryOp(ast.Not(), node.operand)
        case ast.Continue():
            node.__class__ = ast.Pass
        case ast.Constant(value=bool(value)):
            node.value = not value
        case ast.Constant(value=value):
            node.value = value + 1


def survives(parent: Path) -> bool:
    """Whether the fast tests pass with the package that lies in `parent`; one that hangs them does not."""
    process = multiprocessing.get_context("fork").Process(target=_test, args=(parent,))
    process.start()
    process.join(LONGEST_S)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode == 0


def _test(parent: Path) -> None:
    """Run the tests in this forked process, which has imported all they need but the package itself."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.chdir(TESTS.parents[1])
    sys.path.insert(0, str(parent))
    chosen = [str(TESTS / name) for name in KILLERS]
    options = ["-x", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-m", "not slow"]
    os._exit(int(pytest.main([*options, *chosen])))


def main(arguments: list[str]) -> int:
    """Try every mutant, or a slice of them; returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("modules", nargs="*", default=MODULES)
    parser.add_argument("--slice", default="1/1", metavar="K/N")
    options = parser.parse_args(arguments)
    first, step = map(int, options.slice.split("/"))
    trees = {name: ast.parse((SOURCE / name).read_text()) for name in options.modules}
    changes = [(name, *place) for name, tree in trees.items() for place in places(tree)][first - 1 :: step]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "flexgate" / "policies"
        shutil.copytree(SOURCE, package)
        if not survives(Path(folder)):
            sys.exit("the tests fail without a mutation")
        for name, index, variant in tqdm(changes, unit="mutant"):
            line, what, tree = mutant(trees[name], index, variant)
            (package / name).write_text(ast.unparse(ast.fix_missing_locations(tree)))
            if survives(Path(folder)):
                survivors.append(f"{name}:{line}: {what}")
                tqdm.write(f"survived  {survivors[-1]}")
            shutil.copy(SOURCE / name, package / name)
    sys.stdout.write(f"{len(changes) - len(survivors)} of {len(changes)} mutants killed\n")
    return 0 if len(survivors) <= 0.05 * len(changes) + (step > 1) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
